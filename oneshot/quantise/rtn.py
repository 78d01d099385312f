"""RTN: each weight to the nearest value of the grid. No data, no search.

It also gives the rows of `--quantised`: what the same number of bytes achieves without pruning. A pruned model should
be compared not with the dense model but with a quantised model of the same size.

Quantisation is simulated: s·code is written back, rounded to the stored dtype, which is what kernels that compute in
that dtype use.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import models
from ..calibrate import Statistics
from ..prune.linalg import NumericalError
from ..prune.solvers import Solution
from .grids import Grid, largest

needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Config:
    pass


def quantise(W: torch.Tensor, solution: Solution, statistics: Statistics | None, grid: Grid, cfg: Config) -> Solution:
    """Round what is kept of W to the nearest values. Raises NumericalError when a scale does not fit float16."""
    kept = W * solution.mask
    s = grid.scales(kept)
    if not torch.isfinite(s).all():
        raise NumericalError(f"its weights are too large for the float16 scales of {grid}")
    found = Solution(grid.value(grid.round(kept, s), s), solution.mask, scales=s)
    if lost := vanished(kept, s, grid):
        found.info["warnings"] = [f"{lost} groups became zero, their float16 scale vanished"]
    return found


def vanished(W: torch.Tensor, s: torch.Tensor, grid: Grid) -> int:
    """How many groups of W (R, C) are not zero, but have a scale that is."""
    return int(((torch.cat([largest(part) for part in grid.groups(W)], dim=1) > 0) & (s == 0)).sum())


def round_to_nearest(W: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, int]:
    """(Ŵ (R, C), number of groups that became zero because their scale underflowed float16) for W (R, C).

    W is float32 or float64; Ŵ has its dtype.
    """
    s = grid.scales(W)
    return grid.value(grid.round(W, s), s), vanished(W, s, grid)


@torch.no_grad()
def quantise_model(model: nn.Module, grid: Grid) -> list[str]:
    """Round every prunable linear of an offloaded model in place; returns warnings.

    Raises ValueError naming a linear whose weights are too large for float16 scales.
    """
    warnings = []
    for weight in models.all_weights(model):
        W, lost = round_to_nearest(weight.get(), grid)
        if not torch.isfinite(W.sum()):
            raise ValueError(f"{weight.name}: its weights are too large for the float16 scales of {grid}")
        weight.set(W)
        if lost:
            warnings.append(f"{weight.name}: {lost} groups became zero, their float16 scale vanished")
    return warnings
