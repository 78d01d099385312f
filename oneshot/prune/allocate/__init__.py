"""Allocation: how much of each linear goes. One file, one way; the file name is its `--allocate` name.

A way is a module with

    needs       which Statistics it surveys, a frozenset (see statistics.py); empty: it looks at no data
    Config      a frozen dataclass: its flags, with `metadata={"help": ...}` each
    measure(linears, pattern, cfg) -> {name: plain values}        only where `needs` is not empty
    plan(measured, blocks, pattern, cfg) -> {name: Pattern}
    check(blocks, pattern, cfg)     only of a way that gives a linear which cannot have the pattern another one: raises
                                    ValueError, before anything is computed, when there is no plan

    linears     {name: (weight, statistics)} of one block of the DENSE model, of all its linears that saw tokens;
                weight() gives W (R, C): asked for when it is used, so that one float32 copy is held at a time
    measured    the values of all blocks; a linear that saw no token is missing and gets what its neighbours get
    blocks      [{name: Linear}], the model's linears in its order
    pattern     what `--pattern` asks for, its comparison group named

Law of all but `mix` (whose own is its budget), for any measurements: as many zeros as with the pattern everywhere,
within one weight for each row of the model's linears; exactly with the group "matrix". Where equal measurements mean
equal needs (owl; error with `early` 1; not sensitivity, which ranks), they give the pattern everywhere. Nothing random,
no globals.
"""

import importlib
import pkgutil
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..patterns import Unstructured, count


class Linear(NamedTuple):
    """Of one linear: outputs, inputs, bytes of a stored weight."""

    R: int
    C: int
    itemsize: int

    @property
    def shape(self):
        return self.R, self.C


def names():
    """All `--allocate` names, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def module(name):
    """The module of one way. Raises ValueError naming `--allocate` when there is none."""
    if name not in names():
        raise ValueError(f"--allocate {name}: there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def sizes(blocks):
    """{name: number of weights}."""
    return {name: linear.R * linear.C for block in blocks for name, linear in block.items()}


def meet(wanted, blocks, pattern, lowest=0.0, highest=1.0):
    """The plan {name: Pattern} nearest to what is wanted that has the zeros of the pattern everywhere.

    wanted: {name: sparsity}, of which only the differences count: all are shifted alike until their mean, weighted by
    parameters, is the pattern's, none leaving [lowest, highest] by more than rounding. Then they are rounded to whole
    weights of their comparison groups. The zeros are met exactly with the group "matrix", within the smallest row count
    of a linear with "row". With a number of columns all blocks of a linear have one count, so its zeros change by as
    many as it has blocks: where that leaves more than one weight a row between the plan and the pattern everywhere,
    which takes linears of more blocks than all have rows, the differences shrink by tenths until it does not.

    Raises ValueError when the pattern is not unstructured: an N:M leaves nothing to allocate.
    """
    if not isinstance(pattern, Unstructured):
        raise ValueError(f"--allocate: a pattern of {pattern} is the same everywhere; give a sparsity such as "
                         "--pattern 0.5, or --allocate mix to mix patterns")
    size, mean = sizes(blocks), pattern.sparsity
    shapes = {name: linear.shape for block in blocks for name, linear in block.items()}
    exact = shifted(np.array([wanted[name] for name in size], dtype=float), np.array(list(size.values()), dtype=float),
                    mean, lowest, highest)
    for lost in range(11):  # at ten tenths the plan is the pattern everywhere
        near = dict(zip(size, exact + lost / 10 * (mean - exact), strict=True))
        plan, missing = in_whole_weights(near, shapes, pattern, lowest, highest)
        if abs(missing) <= sum(R for R, _ in shapes.values()):
            break
    return plan


def in_whole_weights(exact, shapes, pattern, lowest, highest):
    """(plan, zeros that it lacks): exact {name: sparsity} rounded to whole weights of a group.

    Those nearest to the next count give way until no step brings the zeros nearer to the pattern's, not beyond them.
    """
    group = {name: group_size(pattern, *shape) for name, shape in shapes.items()}
    places = {name: s * group[name] for name, s in exact.items()}  # zeros of a group, not yet whole
    bounds = {name: (whole(lowest * n), min(whole(highest * n), n - 1)) for name, n in group.items()}
    removed = {name: min(max(whole(k), bounds[name][0]), bounds[name][1]) for name, k in places.items()}

    def zeros(name, k):
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


def shifted(wanted, size, mean, lowest, highest):
    """wanted + t within [lowest, highest], t such that the mean weighted by `size` is `mean`; arrays (n,)."""
    below, above = lowest - wanted.max(), highest - wanted.min()
    for _ in range(100):
        t = (below + above) / 2
        too_much = np.average(np.clip(wanted + t, lowest, highest), weights=size) > mean
        below, above = (below, t) if too_much else (t, above)
    return np.clip(wanted + t, lowest, highest)


def group_size(pattern, R, C):
    """How many weights a comparison group has (a ragged last block of columns has fewer)."""
    return C if pattern.group == "row" else R * (min(pattern.group, C) if isinstance(pattern.group, int) else C)


def whole(k):
    """floor(k), rounding errors of k forgiven."""
    return int(k + 1e-6)


def rounded(pattern, k, n):
    """The pattern that removes k of a group of n, its sparsity with as few decimals as say so."""
    if count(pattern.sparsity, n) == k:
        return pattern
    digits = 1
    while True:
        scale = 10**digits
        q = -(-k * scale // n)  # the least multiple of 1 / scale that is not below k / n
        if q * n < (k + 1) * scale:
            return replace(pattern, sparsity=q / scale)
        digits += 1
