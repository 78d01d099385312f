"""Magnitude: remove the smallest weights. The baseline of every pruning paper; needs no data."""

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
    """Keep the largest |W|; kept weights are unchanged."""
    mask = pattern.keep(strength(W, pattern))
    return Solution(W * mask, mask)
