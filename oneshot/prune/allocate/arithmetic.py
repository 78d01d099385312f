"""Arithmetic: sparsity rises (or falls) by the same step from block to block.

ATP, "Determining layer-wise sparsity ... through a theoretical perspective" (arXiv 2502.14770): errors made early grow
on their way through the model, so early blocks lose less. One number says all; the paper searches its step β in 0.002,
0.004, ... for each model and sparsity. `slope` is β times the number of steps, so that it means the same at any depth.
It is not searched here: the default spans as much as OWL's.
"""

from dataclasses import dataclass

from ...runtime.flag import flag
from . import meet

needs = frozenset()


@dataclass(frozen=True)
class Config:
    slope: float = flag(0.16, "sparsity of the last block minus that of the first; negative: later blocks lose less")

    def __post_init__(self):
        if not -1 < self.slope < 1:
            raise ValueError(f"--arithmetic.slope {self.slope}: must be between -1 and 1")


def plan(measured, blocks, pattern, cfg):
    """One sparsity a block, linear in its number, cut at 0 and below 1."""
    last = max(len(blocks) - 1, 1)
    wanted = {name: cfg.slope * b / last for b, block in enumerate(blocks) for name in block}
    return meet(wanted, blocks, pattern)
