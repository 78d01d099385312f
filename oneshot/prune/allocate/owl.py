"""OWL, outlier weighed layerwise sparsity (arXiv 2310.05175): blocks with more outliers are pruned less.

    S       |W_ij| · sqrt(E[x_j²]) of all linears of a block, Wanda's score
    D_b     share of the scores S in block b that exceed M times their mean
    s_b     s - 2λ (D_b - min D) / (max D - min D) + a constant that keeps the mean, weighted by parameters, at s

As in the authors' code (github.com/luuyin/OWL, `lib/prune_all.py`), the range of sparsities is 2λ wide and placed so
that the mean is s; it is not [s - λ, s + λ]. Their code weights all blocks equally, which misses the sparsity if sizes
differ, and divides by zero if all D are equal; here that gives the uniform plan. M and λ are the paper's for LLaMA-7B.
"""

from dataclasses import dataclass

import torch

from ...runtime.flag import flag
from ..linalg import input_weighted
from ..patterns import Pattern
from . import Blocks, Linears, Measured, Plan, meet

needs = frozenset({"sum_sq"})


@dataclass(frozen=True)
class Config:
    spread: float = flag(0.08, "λ, half the difference between the most and the least pruned block")
    outlier: float = flag(5.0, "M, a score counts as an outlier above this multiple of its block's mean")

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 0.5:
            raise ValueError(f"--owl.spread {self.spread}: must be from 0 to 0.5")
        if not self.outlier > 0:
            raise ValueError(f"--owl.outlier {self.outlier}: must be positive")


def measure(linears: Linears, pattern: Pattern, cfg: Config) -> Measured:
    """{name: {"outliers": number of scores above M times the block's mean, "weights": number of scores}}."""
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


def plan(measured: Measured, blocks: Blocks, pattern: Pattern, cfg: Config) -> Plan:
    """One sparsity per block, from its share of outliers."""
    D = []
    for block in blocks:
        seen = [measured[name] for name in block if name in measured]
        D.append(sum(m["outliers"] for m in seen) / sum(m["weights"] for m in seen) if seen else None)
    known = [d for d in D if d is not None] or [0.0]
    span, usual = max(known) - min(known), sum(known) / len(known)
    wanted = {name: -2 * cfg.spread * ((usual if d is None else d) - min(known)) / (span or 1)
              for d, block in zip(D, blocks, strict=True) for name in block}
    return meet(wanted, blocks, pattern)
