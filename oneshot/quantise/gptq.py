"""GPTQ (arXiv 2210.17323): round column by column; those to the right compensate for the rounding error.

It is SparseGPT's loop (prune/solvers/sparsegpt.py) with the mask given: a weight that is not kept is "rounded" to zero,
and what compensation brings there goes on to the right. A group's scale is chosen when the loop gets there, from the
weights as they are by then, as in the paper; unless that cuts off too much, it is smaller than the largest asks for.

Nothing in that says that a row's error is below that of rounding to nearest; with coarse grids now and then it is not.
Rows are independent, so such a row is rounded to nearest instead: by the error (w-ŵ) G (w-ŵ)ᵀ no row is ever worse.
"""

from dataclasses import dataclass

import torch

from ..calibrate import Statistics
from ..prune.patterns import Dense
from ..prune.solvers import Solution, sparsegpt
from ..runtime.flag import flag
from . import rtn
from .grids import Grid

needs = frozenset({"outer"})


@dataclass(frozen=True)
class Config:
    damping: float = flag(0.01, "λ as a share of the mean of G's diagonal")
    search: bool = flag(True, "try smaller scales, which cut off a group's largest weights and round the others finer")

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"--gptq.damping {self.damping}: must not be negative")


def quantise(W: torch.Tensor, solution: Solution, statistics: Statistics, grid: Grid, cfg: Config) -> Solution:
    """Round what is kept of W, with compensation.

    info: rows_to_nearest, how many rows were better off without. Raises NumericalError when G cannot be used, or a
    scale does not fit float16.
    """
    own = sparsegpt.Config(damping=cfg.damping)
    found = sparsegpt.sweep(W, statistics, Dense(), own, solution.mask, grid, cfg.search)
    plain = rtn.quantise(W, solution, statistics, grid, rtn.Config())
    worse = row_errors(W, found.W_hat, statistics) > row_errors(W, plain.W_hat, statistics)
    if worse.any():
        rows = worse.unsqueeze(1)
        found.W_hat, found.scales = (torch.where(rows, a, b) for a, b in ((plain.W_hat, found.W_hat),
                                                                          (plain.scales, found.scales)))
        found.info["rows_to_nearest"] = int(worse.sum())
    return found


def row_errors(W: torch.Tensor, W_hat: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """(w-ŵ) G (w-ŵ)ᵀ of each row, (R,)."""
    D = W - W_hat
    return ((D @ statistics.G.to(D)) * D).sum(1)
