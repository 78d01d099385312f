"""Joint: SparseGPT chooses the mask and rounds in one pass (arXiv 2301.00774, section 3.5); for `--method sparsegpt`.

A column's removed weights and the rounding error of its kept ones are compensated together, by weights that are neither
removed nor rounded yet. Damping and mask blocks are those of the solver (`--sparsegpt.damping`); scales are searched as
GPTQ's are (`--gptq.search`).
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..calibrate import Statistics
from ..prune.patterns import Pattern
from ..prune.solvers import Solution, sparsegpt
from . import gptq
from .grids import Grid

needs = frozenset({"outer"})
solver = "sparsegpt"


@dataclass(frozen=True)
class Config:
    pass


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Any, grid: Grid) -> Solution:
    """The mask and the rounded weights. cfg: SparseGPT's. Raises NumericalError as `gptq.quantise` does."""
    return sparsegpt.sweep(W, statistics, pattern, cfg, grid=grid, search=True)


def quantise(W: torch.Tensor, solution: Solution, statistics: Statistics, grid: Grid, cfg: Config) -> Solution:
    """Where the mask is given there is nothing to choose: GPTQ."""
    return gptq.quantise(W, solution, statistics, grid, gptq.Config())
