"""Magnitude: the smallest weights go. The baseline of every pruning paper; looks at no data."""

from dataclasses import dataclass

from . import Solution

needs = frozenset()
updates = False


@dataclass(frozen=True)
class Config:
    group = "matrix"


def prune(W, statistics, pattern, cfg):
    """Keep the largest |W|; kept weights stay as they are."""
    mask = pattern.keep(W.abs())
    return Solution(W * mask, mask)
