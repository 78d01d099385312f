"""FLAP (arXiv 2312.11983): remove inputs that fluctuate little; their mean goes into the bias.

    S_ij = W_ij² · (E[x_j²] - E[x_j]²)         summed over a column: FLAP's WIFV, Var(x_j) ‖W_:j‖²
    b   += Σ_{removed j} W_ij E[x_j]

The score standardised over layers decides only how many columns go where; here the counts are given. Without `bias` the
weights alone are removed. The published bias is made for whole columns; for single weights it is the same sum.
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
    require_finite(statistics.mean_sq)
    mean, mean_sq = statistics.mean.to(W), statistics.mean_sq.to(W)
    rounding = 8 * torch.finfo(W.dtype).eps * mean_sq  # the variance of a constant input is lost in the subtraction
    variance = torch.maximum(mean_sq - mean.square(), rounding)
    mask = pattern.with_default_group(cfg.group).keep(W.square() * variance)
    bias = (W * ~mask) @ mean if cfg.bias and isinstance(pattern, Columns) else None
    return Solution(W * mask, mask, bias=bias)
