"""OWL, outlier weighed layerwise sparsity (arXiv 2310.05175): a block with more outliers loses less.

    S       |W_ij| · sqrt(E[x_j²]) of all linears of a block, Wanda's score
    D_b     share of S above M times the block's mean of S, in block b
    s_b     s - 2λ (D_b - min D) / (max D - min D) + what keeps the mean, weighted by parameters, at s

As the authors' code has it (github.com/luuyin/OWL, `lib/prune_all.py`): the range is 2λ wide, placed so that the mean
is s, not so that it is [s - λ, s + λ]. The code weighs blocks alike, which misses the sparsity where sizes differ, and
divides by zero when all D are equal: here that is the uniform plan. M and λ are the paper's for LLaMA-7B.
"""

from dataclasses import dataclass

import torch

from ...runtime.flag import flag
from ..linalg import input_weighted
from . import meet

needs = frozenset({"sum_sq"})


@dataclass(frozen=True)
class Config:
    spread: float = flag(0.08, "λ, half the difference between most and least pruned block")
    outlier: float = flag(5.0, "M, an outlier's score in multiples of its block's mean")

    def __post_init__(self):
        if not 0 <= self.spread <= 0.5:
            raise ValueError(f"--owl.spread {self.spread}: must be from 0 to 0.5")
        if not self.outlier > 0:
            raise ValueError(f"--owl.outlier {self.outlier}: must be positive")


def measure(linears, pattern, cfg):
    """{name: {"outliers": scores above M times the block's mean, "weights": how many there are}}."""
    total = weights = 0
    for weight, statistics in linears.values():
        S = input_weighted(weight(), statistics)
        total, weights = total + S.sum(dtype=torch.float64).item(), weights + S.numel()
    threshold = cfg.outlier * total / max(weights, 1)
    measured = {}
    for name, (weight, statistics) in linears.items():
        S = input_weighted(weight(), statistics)
        measured[name] = {"outliers": int(S.gt(threshold).sum()), "weights": S.numel()}
    return measured


def plan(measured, blocks, pattern, cfg):
    """One sparsity a block, by its share of outliers."""
    D = []
    for block in blocks:
        seen = [measured[name] for name in block if name in measured]
        D.append(sum(m["outliers"] for m in seen) / sum(m["weights"] for m in seen) if seen else None)
    known = [d for d in D if d is not None] or [0.0]
    span, usual = max(known) - min(known), sum(known) / len(known)
    wanted = {name: -2 * cfg.spread * ((usual if d is None else d) - min(known)) / (span or 1)
              for d, block in zip(D, blocks, strict=True) for name in block}
    return meet(wanted, blocks, pattern)
