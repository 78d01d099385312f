"""Arithmetic: sparsity increases (or decreases) by the same step from block to block.

ATP, "Determining layer-wise sparsity ... through a theoretical perspective" (arXiv 2502.14770): errors made in early
blocks grow on their way through the model, so early blocks are pruned less. There is a single parameter; the paper
searches its step β in 0.002, 0.004, ... for each model and sparsity. `slope` is β times the number of steps, so that it
means the same at any depth. It is not searched here: the default has the same range as OWL's.
"""

from dataclasses import dataclass

from ...runtime.flag import flag
from ..patterns import Pattern
from . import Blocks, Measured, Plan, meet

needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Config:
    slope: float = flag(0.16, "sparsity of the last block minus that of the first; negative: later blocks are pruned "
                              "less")

    def __post_init__(self) -> None:
        if not -1 < self.slope < 1:
            raise ValueError(f"--arithmetic.slope {self.slope}: must be between -1 and 1")


def plan(measured: Measured, blocks: Blocks, pattern: Pattern, cfg: Config) -> Plan:
    """One sparsity per block, linear in the block's number, at least 0 and below 1."""
    last = max(len(blocks) - 1, 1)
    wanted = {name: cfg.slope * b / last for b, block in enumerate(blocks) for name in block}
    return meet(wanted, blocks, pattern)
