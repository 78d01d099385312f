"""Allocation: how the zeros are distributed over the linears. One file, one method, named as for `--allocate`.

A method is a module with

    needs       which Statistics it measures on, a frozenset (calibrate/statistics.py); empty: it needs no data
    Config      a frozen dataclass: its flags, each made by `runtime.flag.flag`
    measure(linears, pattern, cfg) -> {name: plain values}        only if `needs` is not empty
    plan(measured, blocks, pattern, cfg) -> {name: Pattern}
    check(blocks, pattern, cfg)     only of a method that can give a linear another pattern if its shape does not allow
                                    `pattern`: raises ValueError, before anything is computed, when there is no plan

    linears     {name: (weight, statistics)} of all linears of one block of the DENSE model that saw tokens; weight()
                gives W (R, C) and is called only when needed, so that one float32 copy is held at a time
    measured    {name: plain values} of all blocks; a linear that saw no token is missing, but the plan covers it too
    blocks      [{name: Linear}], one dict per block, in the model's order
    pattern     what `--pattern` asks for, with its comparison group set

Law of every method but `mix` (whose law is its budget), whatever was measured: the plan has as many zeros as the
pattern applied everywhere, to within one weight per row of the model's linears, and exactly with the group "matrix". If
equal measurements mean equal needs (owl; error with `early` 1; not sensitivity, which ranks), they give the pattern
everywhere. Nothing is random, and there is no global state.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ...calibrate.statistics import Statistics
from ..patterns import Pattern, Unstructured, count


class Linear(NamedTuple):
    """One linear: its outputs, its inputs, the bytes of one stored weight."""

    R: int
    C: int
    itemsize: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return self.R, self.C


Linears = Mapping[str, tuple[Callable[[], torch.Tensor], Statistics]]
Measured = dict[str, dict[str, Any]]
Blocks = Sequence[Mapping[str, Linear]]
Plan = dict[str, Pattern]


def names() -> list[str]:
    """All `--allocate` names, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The module of one method. Raises ValueError naming `--allocate` when there is none."""
    if name not in names():
        raise ValueError(f"--allocate {name}: there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def sizes(blocks: Blocks) -> dict[str, int]:
    """{name: number of weights}."""
    return {name: linear.R * linear.C for block in blocks for name, linear in block.items()}


def meet(wanted: Mapping[str, float], blocks: Blocks, pattern: Pattern, lowest: float = 0.0,
         highest: float = 1.0) -> Plan:
    """The plan closest to the `wanted` sparsities that has as many zeros as `pattern` applied everywhere.

    wanted: {name: sparsity}, of which only the differences matter: all are shifted by the same amount until their mean,
    weighted by parameters, is the pattern's sparsity, within [lowest, highest] up to rounding. Then they are rounded to
    whole weights of their comparison groups. The number of zeros is exact with the group "matrix", and within the
    smallest row count of any linear with "row". With a number of columns, all column blocks of a linear have the same
    count, so its zeros change in steps of its number of blocks. If that leaves more than one weight per row between the
    plan and the pattern everywhere (there are more column blocks in a linear than rows in all linears), the differences
    are reduced by tenths until it does not.

    Raises ValueError naming `--allocate` when the pattern is not unstructured: an N:M leaves nothing to distribute.
    """
    if not isinstance(pattern, Unstructured):
        raise ValueError(f"--allocate: a pattern of {pattern} is the same everywhere; give a sparsity such as "
                         "--pattern 0.5, or --allocate mix to mix patterns")
    size, mean = sizes(blocks), pattern.sparsity
    shapes = {name: linear.shape for block in blocks for name, linear in block.items()}
    exact = shifted(np.array([wanted[name] for name in size], dtype=float), np.array(list(size.values()), dtype=float),
                    mean, lowest, highest)
    for lost in range(11):  # with ten tenths gone the plan is the pattern everywhere
        near = dict(zip(size, exact + lost / 10 * (mean - exact), strict=True))
        plan, missing = in_whole_weights(near, shapes, pattern, lowest, highest)
        if abs(missing) <= sum(R for R, _ in shapes.values()):
            break
    return plan


def in_whole_weights(exact: Mapping[str, float], shapes: Mapping[str, tuple[int, int]], pattern: Unstructured,
                     lowest: float, highest: float) -> tuple[Plan, int]:
    """(plan, how many zeros it lacks): the sparsities `exact` rounded to whole weights per comparison group.

    The linears closest to the next count are changed by one, until no such step brings the number of zeros closer to
    the pattern's without passing it.
    """
    group = {name: group_size(pattern, *shape) for name, shape in shapes.items()}
    places = {name: s * group[name] for name, s in exact.items()}  # zeros per group, before rounding
    bounds = {name: (whole(lowest * n), min(whole(highest * n), n - 1)) for name, n in group.items()}
    removed = {name: min(max(whole(k), bounds[name][0]), bounds[name][1]) for name, k in places.items()}

    def zeros(name: str, k: int) -> int:
        return rounded(pattern, k, group[name]).zeros(*shapes[name])

    missing = sum(pattern.zeros(*shape) for shape in shapes.values()) - sum(map(zeros, removed, removed.values()))
    step = 1 if missing > 0 else -1
    order = sorted(removed, key=lambda name: step * (removed[name] - places[name]))
    moved = True
    while missing and moved:
        moved = False
        for name in order:
            k = removed[name] + step
            change = zeros(name, k) - zeros(name, removed[name]) if bounds[name][0] <= k <= bounds[name][1] else 0
            if change and abs(change) <= abs(missing):
                removed[name], missing, moved = k, missing - change, True
                if not missing:
                    break
    return {name: rounded(pattern, k, group[name]) for name, k in removed.items()}, missing


def shifted(wanted: np.ndarray, size: np.ndarray, mean: float, lowest: float, highest: float) -> np.ndarray:
    """wanted + t clipped to [lowest, highest], with t such that the mean weighted by `size` is `mean`; arrays (n,)."""
    below, above = lowest - wanted.max(), highest - wanted.min()
    for _ in range(100):
        t = (below + above) / 2
        too_much = np.average(np.clip(wanted + t, lowest, highest), weights=size) > mean
        below, above = (below, t) if too_much else (t, above)
    return np.clip(wanted + t, lowest, highest)


def group_size(pattern: Unstructured, R: int, C: int) -> int:
    """The number of weights in a comparison group (an incomplete last column block has fewer)."""
    return C if pattern.group == "row" else R * (min(pattern.group, C) if isinstance(pattern.group, int) else C)


def whole(k: float) -> int:
    """floor(k), tolerant of rounding errors in k."""
    return int(k + 1e-6)


def rounded(pattern: Unstructured, k: int, n: int) -> Unstructured:
    """The pattern that removes k of a group of n, its sparsity written with as few decimals as possible."""
    if count(pattern.sparsity, n) == k:
        return pattern
    digits = 1
    while True:
        scale = 10**digits
        q = -(-k * scale // n)  # the least multiple of 1 / scale that is not below k / n
        if q * n < (k + 1) * scale:
            return replace(pattern, sparsity=q / scale)
        digits += 1
