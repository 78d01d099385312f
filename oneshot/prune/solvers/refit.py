"""Refit: exact least squares on the support that a solver chose; the mask stays.

Each row of Ŵ moves to min (w-ŵ) G (w-ŵ)ᵀ over its kept weights, by conjugate gradients on all rows at once
(`linalg.refit`). G is undamped, but a move from the solver's values has a small price ε (`linalg.epsilon`): of all
values that a singular G cannot tell apart, the nearest to the solver's are taken, and none blows up.

SparseGPT's values lie 17-64 % above this minimum, Wanda's 60-400 % (layers of stories260k, craftgpt-5m and the demo).
Ten steps end 0-5 % above it, twenty 0-1.4 %.

Floor: 2·R·C² operations a step, and as much for the residual and for the proof that no row got worse.
"""

from dataclasses import dataclass

from ...runtime.flag import flag
from .. import linalg
from . import Solution

needs = frozenset({"outer"})
updates = True


@dataclass(frozen=True)
class Config:
    steps: int = flag(30, "conjugate gradient steps at most")
    tolerance: float = flag(1e-3, "end with a step that lowers the layer's error by less than this share of it")

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"--refit.steps {self.steps}: must not be negative")
        if not self.tolerance >= 0:
            raise ValueError(f"--refit.tolerance {self.tolerance}: must not be negative")


def refine(W, solution, statistics, pattern, cfg):
    """The same mask with the best values.

    Raises NumericalError when the inputs are not finite.
    """
    W_hat, used = linalg.refit(W, solution.W_hat, solution.mask, statistics, cfg.steps, cfg.tolerance)
    return Solution(W_hat, solution.mask.clone(), {"steps": used})
