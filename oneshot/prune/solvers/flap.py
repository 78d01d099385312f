"""FLAP (arXiv 2312.11983): remove inputs that fluctuate little; their mean goes into the bias.

    S_ij = W_ij² · (E[x_j²] - E[x_j]²)         summed over a column: FLAP's WIFV, S_j = Var(x_j) ‖W_:j‖²
    b   += Σ_{removed j} W_ij E[x_j]

A head's score is the sum of S_j² over its columns, as in the authors' code. How many columns go where is given; FLAP's
own choice, by scores standardised over each layer, is in structured/spread.py. Without `bias` the weights alone are
removed. The published bias is made for whole columns; for single weights it is the same sum.
"""

from dataclasses import dataclass

import torch

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from ..linalg import require_finite
from ..patterns import Columns, Pattern
from . import Solution

needs = frozenset({"sum", "sum_sq"})
updates = False


@dataclass(frozen=True)
class Config:
    bias: bool = flag(True, "put the mean of what is removed into the linear's bias (whole columns only)")
    group = "row"


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Keep the highest scores; kept weights are unchanged. Raises NumericalError when the inputs are not finite."""
    size = pattern.size if isinstance(pattern, Columns) else 1
    mask = pattern.with_default_group(cfg.group).keep(scores(W, statistics, size))
    bias = (W * ~mask) @ statistics.mean.to(W) if cfg.bias and isinstance(pattern, Columns) else None
    return Solution(W * mask, mask, bias=bias)


def scores(W: torch.Tensor, statistics: Statistics, size: int = 1) -> torch.Tensor:
    """Scores (R, C), which summed over a column are S_j, or S_j² where units are heads of `size` columns.

    Raises NumericalError when the inputs are not finite.
    """
    require_finite(statistics.mean_sq)
    mean, mean_sq = statistics.mean.to(W), statistics.mean_sq.to(W)
    rounding = 8 * torch.finfo(W.dtype).eps * mean_sq  # the variance of a constant input is lost in the subtraction
    found = W.square() * torch.maximum(mean_sq - mean.square(), rounding)
    return found * found.sum(0) if size > 1 else found
