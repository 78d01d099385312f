"""One linear: compute its new weight, write it into the model, prove the pattern on what is stored, tell the others."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..calibrate import Statistics
from ..models import Weight
from ..runtime import distributed
from ..runtime.proof import prove
from . import solvers
from .job import Job, Rows
from .linalg import NumericalError, towards_dense
from .patterns import Dense, Pattern
from .solvers import Solution, magnitude


@dataclass
class Solved:
    """One linear's new weight before it is written.

    error: relative output error on the sample of tokens, or None. seconds: time spent on it. warnings: one for every
    fallback taken.
    """

    weight: Weight
    pattern: Pattern
    solution: Solution
    error: float | None
    seconds: float
    warnings: list[str]


def solve(job: Job, weight: Weight, statistics: Statistics | None) -> Solved:
    """Compute one linear's new weight. statistics: of its inputs, or None if there are none.

    Drop the statistics with the last linear that uses them: everything derived from them is cached there.

    Raises ValueError naming the linear when its weight or statistics are not finite or cannot be used.
    """
    W, pattern, began = weight.get(), job.plan.get(weight.name, Dense()), time.perf_counter()
    require_usable(weight.name, W, statistics)
    if statistics is not None and "gradient" in job.needs:
        if weight.name not in job.gradients:
            raise ValueError(f"{weight.name}: no gradient was computed for it; --method {job.label} goes neither with "
                             "--shared-inputs nor with --sensitivity")
        statistics = statistics.with_gradient(job.gradients[weight.name])
    chain, note = job.chain, None
    if any(module.needs for module, _ in chain) and (statistics is None or statistics.n == 0):
        chain, note = [(magnitude, magnitude.Config())], "no calibration token reached it: pruned by magnitude instead"
    if isinstance(pattern, Dense):
        chain, note = [(magnitude, magnitude.Config())], None
    try:
        share = job.options.dense_target if chain is job.chain and statistics is not None else 0.0
        aimed = share and statistics.cross is not None
        target, warnings = towards_dense(W, statistics, share) if aimed else (W, [])
        solution = solvers.solve(target, statistics, pattern, chain)
    except NumericalError as error:
        raise ValueError(f"{weight.name}: {error}") from None
    solution.info |= {"dense_target": 0.0} if share and not aimed else {}
    warnings = warnings + solution.info.pop("warnings", []) + ([note] if note else [])
    error = statistics.relative_error(W, solution.W_hat) if statistics else None
    return Solved(weight, pattern, solution, error, time.perf_counter() - began, warnings)


def require_usable(name: str, W: torch.Tensor, statistics: Statistics | None) -> None:
    """Raise ValueError naming the linear when its weight W (R, C) or its statistics are not finite."""
    if not torch.isfinite(W.sum()):  # a sum is finite only if all its terms are, and needs no second matrix
        raise ValueError(f"{name}: its weights are not finite; the checkpoint is damaged")
    if statistics is not None and not statistics.finite():
        raise ValueError(f"{name}: its inputs are not finite")


def add_bias(weight: Weight, bias: torch.Tensor) -> None:
    """Add `bias` (R,) to the bias of a weight's linear, which gets one if it has none.

    Raises ValueError naming an expert, which has no bias of its own.
    """
    if weight.expert is not None:
        raise ValueError(f"{weight.name}: an expert has no bias of its own to hold what was removed; use --flap.bias")
    stored, own = bias.to(weight.stored), weight.owner.bias
    if own is None:
        weight.owner.bias = nn.Parameter(stored.to(weight.parameter), requires_grad=False)
    else:
        own.data.copy_((own.data.to(bias) + bias).to(weight.stored))


def write(solved: Solved, block: int) -> Rows:
    """Write a linear's new weight into the model; returns its row, warnings and scales. block: its number.

    Raises ValueError when the stored dtype cannot hold the weight, ProofError when what is stored lacks the pattern.
    """
    weight, pattern, name = solved.weight, solved.pattern, solved.weight.name
    weight.set(solved.solution.W_hat)
    if solved.solution.bias is not None:
        add_bias(weight, solved.solution.bias)
    stored = weight.get()
    if not torch.isfinite(stored.sum()):
        raise ValueError(f"{name}: its new weights do not fit {weight.stored}; use --dtype bfloat16 or float32")
    R, C = weight.shape
    zeros, target = R * C - int(stored.count_nonzero()), pattern.zeros(R, C)
    removed = R * C - int(solved.solution.mask.count_nonzero())
    prove(removed == target and pattern.holds(stored), f"{name}: pattern {pattern} broken")
    rows = Rows([{
        "name": name, "block": block, "linear": weight.linear, "shape": [R, C], "pattern": str(pattern),
        "group": pattern.group, "target_zeros": target, "zeros": zeros, "surplus": zeros - target,
        "relative_error": solved.error, "seconds": solved.seconds, "info": solved.solution.info}],
        warnings=[f"{name}: {w}" for w in solved.warnings])
    if solved.solution.scales is not None:
        rows.scales[name] = solved.solution.scales.to("cpu", torch.float16).contiguous()
    return rows


def settle(written: Sequence[Rows], weights: Sequence[Weight], rows: Rows) -> None:
    """Give all processes the weights and biases that each has `written`; their Rows, one a linear, are added to `rows`.

    weights: those that any of them may have written, in order.
    """
    by_name = {w.name: w for w in weights}
    own = [(one, bias_of(by_name[one.layers[0]["name"]])) for one in written]
    told = {one.layers[0]["name"]: (one, bias, source) for source, part in enumerate(distributed.gathered(own))
            for one, bias in part}
    for weight in (w for w in weights if w.name in told):
        one, bias, source = told[weight.name]
        rows.add(one)
        if distributed.ranks() > 1:
            receive(weight, bias, source)


def bias_of(weight: Weight) -> torch.Tensor | None:
    """The bias (R,) of a weight's linear, on the CPU; None if it has none of its own."""
    bias = weight.owner.bias if weight.expert is None else None
    return None if bias is None else bias.data.cpu()


def receive(weight: Weight, bias: torch.Tensor | None, source: int) -> None:
    """Take over a linear's weight and bias from the process that has written them."""
    W = weight.get().to(weight.stored).contiguous()
    distributed.give(W, source)
    weight.set(W)
    if bias is not None and weight.owner.bias is None:
        weight.owner.bias = nn.Parameter(bias.to(weight.parameter), requires_grad=False)
    elif bias is not None:
        weight.owner.bias.data.copy_(bias)
