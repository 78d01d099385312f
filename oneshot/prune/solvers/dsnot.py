"""DSnoT, dynamic sparse no training (arXiv 2310.08915): swap removed for kept weights until a row's mean error is low.

    c_ij    W_ij E[x_j], what a weight contributes to its output on average
    e_i     Σ_{removed j} c_ij, the expected error of output i
    grow    of the removed weights whose return lowers |e_i|, the one of largest |c_ij| / Var(x_j)
    drop    of the kept weights whose loss lowers |e_i|, the one of lowest |W_ij| · sqrt(E[x_j²])

From a start mask (`start`), every row tries at most `cycles` swaps, all rows at once; a weight moves at most once, so
a swap is never undone. N:M drops within the group of the weight that returns, a group of columns within those columns;
counts never change. No weight is updated. Weights on inputs of mean 0 contribute nothing and are never moved.

Against the paper and its code (github.com/zyxxmu/DSnoT, `lib/prune.py`):
- A row stops when |e_i| is at most `threshold` times what it was at the start. In the code 0.1 is compared with an
  error summed over the tokens of a window, which depends on the window's length and on the scale of the activations;
  and `--without_same_sign` (type=bool, True whatever is given) lets unstructured rows swap on past zero, up to the
  last cycle. Here a swap that would not lower |e_i| is not made, and the row stops.
- N:M there drops the lowest score of the group even where that raises |e_i|; here such a candidate is passed over.
- There, when the candidates of one sign run out, kept weights are "grown" and a count drifts; here the row stops.
- The code leaves the MLP alone by default (`--skip_layer mlp`); here all linears are treated alike: a solver sees one
  linear, not its place. On the small models tried, the swaps in the MLP are what costs.
"""

from dataclasses import dataclass

import torch

from ...runtime.flag import flag
from ..linalg import input_weighted
from ..patterns import NM
from . import Solution

needs = frozenset({"sum", "sum_sq"})
updates = False
STARTS = ("wanda", "magnitude")


@dataclass(frozen=True)
class Config:
    start: str = flag("wanda", "whose mask to start from", choices=STARTS)
    cycles: int = flag(50, "swaps a row may try")
    threshold: float = flag(0.1, "share of its first expected error at which a row stops")
    group = "row"

    def __post_init__(self):
        if self.start not in STARTS:
            raise ValueError(f"--dsnot.start {self.start}: give {' or '.join(STARTS)}")
        if self.cycles < 0:
            raise ValueError(f"--dsnot.cycles {self.cycles}: must not be negative")
        if not self.threshold >= 0:
            raise ValueError(f"--dsnot.threshold {self.threshold}: must not be negative")


def prune(W, statistics, pattern, cfg):
    """The mask after the swaps; kept weights stay as they are. info["swaps"]: how many were made in all.

    Raises NumericalError when the inputs are not finite.
    """
    score = input_weighted(W, statistics)
    pattern = pattern.with_default_group(cfg.group)
    mask = pattern.keep(score if cfg.start == "wanda" else W.abs())
    mean, mean_sq = statistics.mean.to(W), statistics.mean_sq.to(W)
    rounding = 8 * torch.finfo(W.dtype).eps * mean_sq  # a constant input's variance is lost in the subtraction
    var = torch.maximum(mean_sq - mean.square(), rounding)
    c = W * mean
    gain = torch.where(c == 0, 0, c.abs() / var)
    swaps = swap(mask, c, gain, score, pattern, cfg)
    return Solution(W * mask, mask, {"swaps": swaps})


def swap(mask, c, gain, score, pattern, cfg):
    """Make the swaps in `mask` (R, C), in place; how many."""
    C = mask.shape[1]
    width = pattern.m if isinstance(pattern, NM) else pattern.group if isinstance(pattern.group, int) else None
    growable = torch.stack([candidates(gain, ~mask & (c * sign > 0), cfg.cycles) for sign in (1, -1)])
    if width is None:  # of a whole row only the first few of either sign can ever be dropped
        window = torch.cat([candidates(-score, mask & (c * sign > 0), cfg.cycles) for sign in (1, -1)], dim=1)
    k, rows, swaps = growable.shape[2], torch.arange(len(mask), device=mask.device), 0
    place = torch.zeros(2, len(mask), dtype=torch.long, device=mask.device)  # how many candidates have had their turn
    free = mask.clone()  # kept from the start on, may be dropped
    e = (c * ~mask).sum(1)
    enough, active = cfg.threshold * e.abs(), e != 0
    for _ in range(cfg.cycles):
        side = (e < 0).long()
        at = place[side, rows]
        grown = growable[side, rows, at.clamp(max=k - 1)]
        active &= (e.abs() > enough) & (at < k) & (grown >= 0)
        if not active.any():
            break
        grown = grown.clamp(min=0)
        if width is not None:
            window = window_of(grown, width, C)
        dropped, found = lowest_in(window, score, c, free, e)
        after = e - c[rows, grown] + c[rows, dropped]
        do = active & found & (after.abs() < e.abs())
        if width is None:
            active = do
        mask[rows[do], grown[do]] = True
        mask[rows[do], dropped[do]] = free[rows[do], dropped[do]] = False
        e = torch.where(do, after, e)
        place[side, rows] += 1
        swaps += int(do.sum())
    return swaps


def candidates(value, eligible, n):
    """Columns of the n largest values among the eligible of each row, (R, n or fewer), -1 where there are no more."""
    top = value.masked_fill(~eligible, -torch.inf).topk(min(n, value.shape[1]), dim=1)
    return top.indices.masked_fill(top.values == -torch.inf, -1)


def window_of(columns, width, C):
    """The columns that share a group of `width` with each of columns (R,): (R, width), -1 beyond the last column."""
    first = (columns - columns % width).unsqueeze(1)
    window = first + torch.arange(width, device=columns.device)
    return window.masked_fill(window >= C, -1)


def lowest_in(window, score, c, free, e):
    """(column, found), (R,) both: of each row's window the free weight of lowest score whose loss lowers |e|."""
    at = window.clamp(min=0)
    may_go = (window >= 0) & free.gather(1, at) & (c.gather(1, at) * e.unsqueeze(1) < 0)
    value, place = score.gather(1, at).masked_fill(~may_go, torch.inf).min(dim=1, keepdim=True)
    return at.gather(1, place).squeeze(1), value.squeeze(1) < torch.inf
