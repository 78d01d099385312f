"""Walk: how a quantiser takes part in the block loop (prune/loop.py), which rounds one block after the other.

Each block is rounded on the outputs of the already rounded blocks before it, with statistics of their own: those of
the model as pruning and healing have left it. A weight that is zero stays zero, also where the plan says dense: it may
have been pruned before. What the loop proves of a pruned weight it proves of a rounded one: its pattern, on what is
stored. A linear without a grid is left as it is.
"""

import functools
import time
from dataclasses import replace
from types import ModuleType
from typing import Any

from ..calibrate import Statistics
from ..models import Weight
from ..prune import linear
from ..prune.job import Job
from ..prune.linalg import NumericalError
from ..prune.linear import Solved
from ..prune.options import Options
from ..prune.patterns import Dense, Pattern
from ..prune.solvers import Solution
from . import rtn, scaling
from .mixed import Grids


def rounding(plan: dict[str, Pattern], options: Options, method: ModuleType, cfg: Any, grids: Grids,
             scales: bool = False) -> Job:
    """The job of rounding a pruned model by a quantiser. plan: {full linear name: the Pattern it has}.

    It goes over the linears that have a grid. scales: whether columns are scaled first (scaling.py).
    """
    own = {"method": method, "cfg": cfg, "grids": grids}
    return Job({name: pattern for name, pattern in plan.items() if grids.of(name)}, [(method, cfg)],
               replace(options, dense_target=0.0), solve=functools.partial(solve, **own),
               prepare=functools.partial(scaling.scale, **own) if scales else None)


def together(job: Job, method: ModuleType, cfg: Any, grids: Grids) -> Job:
    """The job of pruning and rounding in one pass, by a quantiser that does both."""
    return replace(job, solve=functools.partial(solve, method=method, cfg=cfg, grids=grids, solver=job.chain[0][1]))


def solve(job: Job, weight: Weight, statistics: Statistics | None, *, method: ModuleType, cfg: Any, grids: Grids,
          solver: Any = None) -> Solved:
    """Compute one linear's rounded weight, as `linear.solve` does a pruned one; that does it where there is no grid.

    solver: the Config of the solver that chooses the mask, unless the mask is what is not zero.

    Raises ValueError naming the linear when its weight or statistics cannot be used, or fit no scales.
    """
    if (grid := grids.of(weight.name)) is None:
        return linear.solve(job, weight, statistics)
    W, pattern, began = weight.get(), job.plan.get(weight.name, Dense()), time.perf_counter()
    linear.require_usable(weight.name, W, statistics)
    notes, kept = [], W != 0
    if method.needs and (statistics is None or statistics.n == 0):
        method, cfg, notes = rtn, rtn.Config(), ["no calibration token reached it: rounded to nearest instead"]
        if solver:  # nothing says what to remove either
            kept, solver = pattern.keep(W.abs()), None
    try:
        if solver is None or isinstance(pattern, Dense):
            solution = method.quantise(W, Solution(W, kept), statistics, grid, cfg)
            solution.mask = pattern.keep(kept.to(W))  # more zeros than the pattern asks for are kept weights to it
        else:
            solution = method.prune(W, statistics, pattern, solver, grid)
            kept = solution.mask
    except NumericalError as error:
        raise ValueError(f"{weight.name}: {error}") from None
    lost = int((kept & (W != 0) & (solution.W_hat == 0)).sum())
    solution.info |= {"grid": str(grid), "rounded_to_zero": lost}
    notes = solution.info.pop("warnings", []) + notes
    error = statistics.relative_error(W, solution.W_hat) if statistics else None
    return Solved(weight, pattern, solution, error, time.perf_counter() - began, notes)
