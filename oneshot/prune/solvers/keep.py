"""Keep: the zeros that the model has, and all other weights as they are; for a model that is pruned already.

It is magnitude pruning of a weight that has the pattern: nothing changes. The pipeline refuses a model that has not.
"""

from dataclasses import dataclass

import torch

from ...calibrate.statistics import Statistics
from ..patterns import Pattern, strength
from . import Solution

needs: frozenset[str] = frozenset()
updates = False


@dataclass(frozen=True)
class Config:
    group = "matrix"


def prune(W: torch.Tensor, statistics: Statistics | None, pattern: Pattern, cfg: Config) -> Solution:
    """Keep what is not zero, and of the zeros as many as the pattern allows."""
    mask = pattern.keep(strength(W, pattern))
    return Solution(W * mask, mask)
