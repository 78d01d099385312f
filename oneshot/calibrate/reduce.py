"""Reduce: put together what several processes have: each linear's statistics in the process that solves it, its owner;
all activations in rank 0.

Linears with the same input go together, because solvers derive factorisations from it that all of them use. Owners are
chosen so that all are busy about equally long: one linear (R, C) takes R·C² for its new values, its Gram matrix C³.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..models import Weight
from ..runtime import distributed
from .activations import Activations
from .statistics import SAMPLE, Statistics


class Told(NamedTuple):
    """What a process says of the statistics it has of one input: for which linears, of how many tokens, which sums."""

    names: tuple[str, ...]
    C: int
    needs: frozenset[str]
    n: int
    n_held: int
    crosses: bool
    sampled: int


def reduce(statistics: dict[str, Statistics], deferred: Sequence[Weight], weights: Sequence[Weight],
           device: str | torch.device, only_first: bool = False
           ) -> tuple[dict[str, Statistics | None], list[Weight], dict[str, int]]:
    """(statistics of all processes' windows, deferred weights, {weight's name: its owner}), from one process's own.

    The statistics are None where another process owns them; a name that is missing saw no token anywhere. A sample is
    gathered, in the order of the windows. only_first: rank 0 owns all. In a single process nothing changes.

    Raises ValueError naming `--gram-budget` or `--model` where the processes disagree on what is fed what.
    """
    if distributed.ranks() == 1:
        return statistics, list(deferred), dict.fromkeys((w.name for w in weights), distributed.rank())
    groups, put_off = agreed(statistics, deferred, weights)
    by_name = {w.name: w for w in weights}
    seen = {name for told in groups.values() for part in told if part for name in part.names}
    alone = [w.name for w in weights if w.name not in seen | put_off]  # solved without data
    costs = [cost([by_name[name] for name in next(filter(None, told)).names]) for told in groups.values()]
    owner = distributed.owners(costs + [float(by_name[name].size) for name in alone])
    owner = [0] * len(owner) if only_first else owner
    owns, found = dict(zip([*groups, *alone], owner, strict=True)), {}
    for leader, told in groups.items():
        known = next(filter(None, told))
        own = statistics.get(leader) or Statistics(known.C, known.needs, device)
        for name in known.names:
            statistics.pop(name, None)
        combine(own, told, owns[leader])
        for name in known.names:
            owns[name], found[name] = owns[leader], own if owns[leader] == distributed.rank() else None
    return found, [w for w in weights if w.name in put_off], owns


def agreed(statistics: dict[str, Statistics], deferred: Sequence[Weight], weights: Sequence[Weight]
           ) -> tuple[dict[str, list[Told | None]], set[str]]:
    """({first of the linears with one input: what each process says of it}, names of weights that any has deferred).

    The same in all processes. Raises ValueError as `reduce` does.
    """
    own: dict[int, list[str]] = {}
    for w in weights:
        if w.name in statistics:
            own.setdefault(id(statistics[w.name]), []).append(w.name)
    told = {names[0]: of(statistics[names[0]], names) for names in own.values()}
    every = distributed.gathered((told, [w.name for w in deferred]))
    put_off = {name for _, names in every for name in names}
    groups = {w.name: [part.get(w.name) for part, _ in every] for w in weights
              if any(w.name in part for part, _ in every)}
    if put_off and not groups:
        raise ValueError("--gram-budget: too small to divide this model's linears into passes that are the same in all "
                         "processes; give more")
    members = [name for said in groups.values() for name in {said.names for said in said if said}.pop()]
    same = all(len({part.names for part in said if part}) == 1 for said in groups.values())
    if not same or len(set(members)) < len(members) or put_off & set(members):
        raise ValueError("--model: its linears share their inputs in some windows and not in others, so windows cannot "
                         "be divided among processes; start it without torchrun")
    return groups, put_off


def of(statistics: Statistics, names: Sequence[str]) -> Told:
    """What to say of the statistics that these linears share."""
    sampled = 0 if statistics.sample is None else len(statistics.sample)
    return Told(tuple(names), statistics.C, statistics.needs, statistics.n, statistics.n_held,
                statistics.cross is not None, sampled)


def cost(weights: Sequence[Weight]) -> float:
    """Operations, about, that solving linears with one input takes."""
    C = weights[0].shape[1]
    return float(C**3 + sum(w.size * C for w in weights))


def combine(own: Statistics, told: Sequence[Told | None], owner: int) -> None:
    """Add the statistics of all processes, in place in those of `owner`; the others' are spoilt."""
    known = [part for part in told if part]
    if not all(part.crosses for part in known):
        own.cross = None
    for t in (own.sum, own.sum_sq, own.outer, own.cross, own.held):
        if t is not None:
            distributed.reduce(t, owner)
    own.n, own.n_held = sum(part.n for part in known), sum(part.n_held for part in known)
    if own.sample is not None:
        before = [0]
        for part in told:
            before.append(before[-1] + (part.sampled if part else 0))
        whole = own.sample.new_zeros(min(before[-1], SAMPLE), own.C)
        at = before[distributed.rank()]
        whole[at:at + len(own.sample)] = own.sample[:max(len(whole) - at, 0)]
        distributed.reduce(whole, owner)
        own.sample = whole


def whole(activations: Activations) -> Activations:
    """The activations of all processes, in rank 0, in the order that a single process would have; none in the others.

    Without `calls`: no block can be run on them. In a single process they are what they were.
    """
    if distributed.ranks() == 1:
        return activations
    hidden, at = distributed.brought(activations.hidden), activations.device
    own = [({name: t.cpu() for name, t in inputs.items()}, None if rows is None else rows.cpu(), held) for
           inputs, rows, held in zip(activations.inputs, activations.rows, activations.held, strict=True)]
    told = [batch for part in distributed.gathered(own) for batch in part]
    order = sorted(range(len(hidden)), key=lambda i: told[i][2])  # held-out batches last, otherwise as they are
    return replace(activations, calls=[], hidden=[hidden[i] for i in order], held=[told[i][2] for i in order],
                   inputs=[{name: t.to(at) for name, t in told[i][0].items()} for i in order],
                   rows=[None if told[i][1] is None else told[i][1].to(at) for i in order])
