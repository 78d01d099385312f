"""Taylor: by how much the loss changes, to first order, when a weight becomes zero (LLM-Pruner, arXiv 2305.11627).

    S_ij = |W_ij · ∂L/∂W_ij|,  L the mean loss over the calibration windows

For whole columns the terms are added as absolute values. No weight is updated.
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
    require_finite(statistics.gradient.mean)
    mask = pattern.with_default_group(cfg.group).keep((W * statistics.gradient.mean.to(W)).abs())
    return Solution(W * mask, mask)
