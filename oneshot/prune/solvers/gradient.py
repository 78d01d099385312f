"""Gradient: weight magnitude times the size of its gradient (GBLM-Pruner's score without activations, 2311.04902).

    S_ij = |W_ij| · sqrt(E_b[g_ij²]),  g = ∂L_b/∂W, L_b the loss of one batch of calibration windows

No weight is updated.
"""

from dataclasses import dataclass

import torch

from ...calibrate.statistics import Statistics
from ..linalg import require_finite
from ..patterns import Pattern
from . import Solution

needs = frozenset({"gradient"})
updates = False


@dataclass(frozen=True)
class Config:
    group = "row"


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Keep the highest scores; kept weights are unchanged. Raises NumericalError when a gradient is not finite."""
    require_finite(statistics.gradient.mean_sq)
    mask = pattern.with_default_group(cfg.group).keep(W.abs() * statistics.gradient.mean_sq.sqrt().to(W))
    return Solution(W * mask, mask)
