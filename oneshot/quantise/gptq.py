"""GPTQ (arXiv 2210.17323): round column by column; those still to come compensate for the rounding error.

It is SparseGPT's loop (prune/solvers/sparsegpt.py) with the mask given: a weight that is not kept is "rounded" to zero,
and what compensation brings there goes on. Columns go by the size of their inputs, the largest first ("act order" in
the paper's code), with scales chosen before; or from the left, with a group's scale chosen when the loop gets there. A
scale is smaller than a group's largest weight asks for where that pays.

Nothing in that says that a row's error is below that of rounding to nearest; with coarse grids now and then it is not.
Rows are independent, so such a row is rounded to nearest instead: by the error (w-ŵ) G (w-ŵ)ᵀ no row is ever worse.
"""

from dataclasses import dataclass

import torch

from ..calibrate import Statistics
from ..prune.linalg import upper_factor
from ..prune.patterns import Dense
from ..prune.solvers import Solution, sparsegpt
from ..runtime.flag import flag
from . import rtn
from .grids import Grid

needs = frozenset({"outer"})


@dataclass(frozen=True)
class Config:
    damping: float = flag(0.01, "λ as a share of the mean of G's diagonal")
    order: bool = flag(True, "round the columns of the largest inputs first, while the others can still compensate")
    search: bool = flag(True, "try smaller scales, which cut off a group's largest weights and round the others finer")

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"--gptq.damping {self.damping}: must not be negative")


def quantise(W: torch.Tensor, solution: Solution, statistics: Statistics, grid: Grid, cfg: Config) -> Solution:
    """Round what is kept of W, with compensation.

    info: rows_to_nearest, how many rows were better off without. Raises NumericalError when G cannot be used, or a
    scale does not fit float16.
    """
    found = (by_size if cfg.order else by_place)(W, solution, statistics, grid, cfg)
    plain = rtn.quantise(W, solution, statistics, grid, rtn.Config())
    worse = more_error(W, found.W_hat, plain.W_hat, statistics) > 0
    if worse.any():
        rows = worse.unsqueeze(1)
        found.W_hat, found.scales = (torch.where(rows, a, b) for a, b in ((plain.W_hat, found.W_hat),
                                                                          (plain.scales, found.scales)))
        found.info["rows_to_nearest"] = int(worse.sum())
    return found


def by_place(W: torch.Tensor, solution: Solution, statistics: Statistics, grid: Grid, cfg: Config) -> Solution:
    """From the left, with a group's scale from the weights as they are when the loop gets there."""
    own = sparsegpt.Config(damping=cfg.damping)
    return sparsegpt.sweep(W, statistics, Dense(), own, solution.mask, grid, cfg.search)


def by_size(W: torch.Tensor, solution: Solution, statistics: Statistics, grid: Grid, cfg: Config) -> Solution:
    """From the largest input to the smallest, with scales from the weights as they are given.

    So they stand, columns and scales, where they stood: a group is still one of neighbours.
    """
    order = statistics.derived("order", lambda: statistics.G.diagonal().argsort(descending=True, stable=True))
    there = statistics.derived("in order", lambda: statistics.in_order(order))
    V, _, info = upper_factor(there, cfg.damping, W.dtype)
    d, kept = V.new_empty(len(V), 1), (W * solution.mask).T
    d[order] = V.diagonal().unsqueeze(1)
    parts = zip(kept.split(grid.width(len(d))), d.split(grid.width(len(d))), strict=True)
    scales = torch.cat([sparsegpt.scales_of(grid, part, own if cfg.search else None) for part, own in parts]).T
    each, W_hat = grid.spread(scales, len(d)).T, torch.empty_like(kept)
    W_hat[order] = sparsegpt.rounded(kept[order], V, solution.mask.T[order], each[order], grid)
    return Solution(W_hat.T, solution.mask, info, scales=scales)


def more_error(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """By how much the error (w-a) G (w-a)ᵀ of each row of A is above that of B, (R,); with a single product."""
    return ((B - A) @ statistics.G.to(W)).mul_(2 * W - A - B).sum(1)
