"""DSnoT, dynamic sparse no training (arXiv 2310.08915): swap removed and kept weights to lower each row's mean error.

    c_ij    W_ij E[x_j], what a weight contributes to its output on average
    e_i     Σ_{removed j} c_ij, the expected error of output i
    grow    of the removed weights whose return lowers |e_i|, the one with the largest |c_ij| / Var(x_j)
    drop    of the kept weights whose removal lowers |e_i|, the one with the lowest |W_ij| · sqrt(E[x_j²])

From a start mask (`start`), every row tries at most `cycles` swaps, all rows at once. A weight moves at most once, so a
swap is never undone. With N:M the dropped weight is in the same group as the grown one, with a group of columns within
those columns, so counts never change. No weight is updated. Weights on inputs of mean 0 contribute nothing and never
move.

Differences from the paper and its code (github.com/zyxxmu/DSnoT, `lib/prune.py`):
- A row stops when |e_i| is at most `threshold` times its value at the start. Their code compares 0.1 with an error
  summed over the tokens of a window, which depends on the window's length and on the scale of the activations; and
  `--without_same_sign` (type=bool, so True whatever is given) lets unstructured rows swap past zero until the last
  cycle. Here a swap that would not lower |e_i| is not made, and the row stops.
- With N:M their code drops the lowest score of the group even if that raises |e_i|; here such a candidate is skipped.
- When the candidates of one sign run out, their code "grows" kept weights and a count drifts; here the row stops.
- Their code skips the MLP by default (`--skip_layer mlp`). Here all linears are treated alike, because a solver sees
  one linear and not its place in the model. On the small models tried, it is the swaps in the MLP that do harm.
"""

from dataclasses import dataclass

import torch

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from ..linalg import input_weighted
from ..patterns import NM, Columns, Pattern, strength
from . import Solution

needs = frozenset({"sum", "sum_sq"})
updates = False
STARTS = ("wanda", "magnitude")


@dataclass(frozen=True)
class Config:
    start: str = flag("wanda", "method whose mask to start from", choices=STARTS)
    cycles: int = flag(50, "maximum number of swaps per row")
    threshold: float = flag(0.1, "a row stops when its expected error is at most this share of the initial one")
    group = "row"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"--dsnot.start {self.start}: give {' or '.join(STARTS)}")
        if self.cycles < 0:
            raise ValueError(f"--dsnot.cycles {self.cycles}: must not be negative")
        if not self.threshold >= 0:
            raise ValueError(f"--dsnot.threshold {self.threshold}: must not be negative")


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """The mask after the swaps; kept weights are unchanged. info["swaps"]: the number of swaps over all rows.

    Raises NumericalError when the inputs are not finite.
    """
    score = input_weighted(W, statistics)
    pattern = pattern.with_default_group(cfg.group)
    mask = pattern.keep(score if cfg.start == "wanda" else strength(W, pattern))
    if isinstance(pattern, Columns):  # whole columns: no single weight may be exchanged
        return Solution(W * mask, mask, {"swaps": 0})
    mean, mean_sq = statistics.mean.to(W), statistics.mean_sq.to(W)
    rounding = 8 * torch.finfo(W.dtype).eps * mean_sq  # the variance of a constant input is lost in the subtraction
    var = torch.maximum(mean_sq - mean.square(), rounding)
    c = W * mean
    gain = torch.where(c == 0, 0, c.abs() / var)
    swaps = swap(mask, c, gain, score, pattern, cfg)
    return Solution(W * mask, mask, {"swaps": swaps})


def swap(mask: torch.Tensor, c: torch.Tensor, gain: torch.Tensor, score: torch.Tensor, pattern: Pattern,
         cfg: Config) -> int:
    """Make the swaps in `mask` in place and return their number. mask, c, gain (to grow), score (to drop): (R, C)."""
    C = mask.shape[1]
    width = pattern.m if isinstance(pattern, NM) else pattern.group if isinstance(pattern.group, int) else None
    growable = torch.stack([candidates(gain, ~mask & (c * sign > 0), cfg.cycles) for sign in (1, -1)])
    if width is None:  # in a whole row, only the lowest few of either sign can ever be dropped
        window = torch.cat([candidates(-score, mask & (c * sign > 0), cfg.cycles) for sign in (1, -1)], dim=1)
    k, rows, swaps = growable.shape[2], torch.arange(len(mask), device=mask.device), 0
    place = torch.zeros(2, len(mask), dtype=torch.long, device=mask.device)  # how many candidates were already tried
    free = mask.clone()  # kept since the start, so they may be dropped
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


def candidates(value: torch.Tensor, eligible: torch.Tensor, n: int) -> torch.Tensor:
    """Columns of the n largest eligible values of each row, int64 (R, min(n, C)); -1 where there are no more.

    value, eligible (bool): (R, C).
    """
    top = value.masked_fill(~eligible, -torch.inf).topk(min(n, value.shape[1]), dim=1)
    return top.indices.masked_fill(top.values == -torch.inf, -1)


def window_of(columns: torch.Tensor, width: int, C: int) -> torch.Tensor:
    """The columns in the same group of `width` as columns (R,): int64 (R, width), -1 beyond the last column."""
    first = (columns - columns % width).unsqueeze(1)
    window = first + torch.arange(width, device=columns.device)
    return window.masked_fill(window >= C, -1)


def lowest_in(window: torch.Tensor, score: torch.Tensor, c: torch.Tensor, free: torch.Tensor,
              e: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(column, found), both (R,): in each row's window, the free weight of lowest score whose removal lowers |e|.

    window: columns, int64 (R, n), -1 for none. score, c, free (bool): (R, C). e: (R,).
    """
    at = window.clamp(min=0)
    may_go = (window >= 0) & free.gather(1, at) & (c.gather(1, at) * e.unsqueeze(1) < 0)
    value, place = score.gather(1, at).masked_fill(~may_go, torch.inf).min(dim=1, keepdim=True)
    return at.gather(1, place).squeeze(1), value.squeeze(1) < torch.inf
