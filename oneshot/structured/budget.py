"""Budget: the cuts that leave a given share of the blocks' parameters, from neurons alone to blocks alone.

    target      parameters of the blocks that may be left
    mixture     a number of blocks that go (the first of an order), a number of KV groups left in each of the others,
                and as many neurons in each as the target then allows

The counts are the same in every block, so that the family's ordinary config says them. Neurons are left in multiples
of 8 where a layer has many, for the sake of kernels and of N:M patterns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from .. import models
from ..models import groups
from .cut import Cut, kinds, unit_size

BYS = ("parameters", "bytes", "latency")
Cost = Callable[[Cut], float]


@dataclass(frozen=True)
class Sizes:
    """How many parameters the blocks have. blocks: of each. units: {kind: (count, parameters of one)} per block."""

    blocks: tuple[int, ...]
    units: tuple[dict[str, tuple[int, int]], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """Those of a model."""
        known, blocks, units = kinds(model), [], []
        for block in models.walk(model):
            weights, own = {w.linear: w for w in block.weights}, {}
            for width in groups.widths(block.module):
                if width.kind in known:
                    count, size = own.get(width.kind, (width.count, 0))
                    own[width.kind] = count, size + width.segments * unit_size(width, weights, block.module)
            blocks.append(sum(p.numel() for p in block.module.parameters()))
            units.append(own)
        return cls(tuple(blocks), tuple(units))

    def left(self, cut: Cut) -> int:
        """How many parameters a uniform cut leaves."""
        kept = dict(cut.kept)
        return sum(size - sum((count - kept.get(kind, count)) * each for kind, (count, each) in own.items())
                   for b, (size, own) in enumerate(zip(self.blocks, self.units, strict=True)) if b not in cut.dropped)


@dataclass(frozen=True)
class Budget:
    """What a cut may leave.

    target: the most that a cut may cost. cost: the function that says so. without: kinds that must not lose any unit.
    multiple: the number of neurons left in a layer is a multiple of it, such as the M of an N:M pattern. own: units of
    single consumers that are given, as in a Cut. allowed: whether a config can say a cut.
    """

    target: float
    cost: Cost
    without: frozenset[str] = frozenset()
    multiple: int = 1
    own: tuple[tuple[str, int], ...] = ()
    allowed: Callable[[Cut], bool] = lambda cut: True

    def fits(self, cut: Cut) -> bool:
        """Whether a cut is small enough."""
        return self.cost(cut) <= self.target

    def step(self, count: int, kind: str = groups.NEURONS) -> int:
        """The multiple in which the neurons of a layer of `count` are left.

        transformers' grouped products of experts need rows of a multiple of 16 bytes.
        """
        usual = 8 if kind == groups.EXPERTS or (count >= 256 and not count % 8) else \
            4 if count >= 64 and not count % 4 else 1
        return math.lcm(usual, self.multiple)


def neurons_for(model: nn.Module, budget: Budget, dropped: Sequence[int],
                heads: tuple[tuple[str, int], ...] = ()) -> Cut | None:
    """The cut of most neurons that fits, without the blocks `dropped`; None if there is none.

    heads: ((kind, left),) or ().
    """
    known = {kind: width for kind, width in kinds(model).items()
             if kind not in {groups.HEADS, groups.QUERIES, *budget.without}
             and width.count >= budget.step(width.count, kind)}
    steps = max((width.count // budget.step(width.count, kind) for kind, width in known.items()), default=1)

    def at(k: int) -> Cut:
        left = []
        for kind, width in known.items():
            unit = budget.step(width.count, kind)
            count = width.count if k == steps else max(unit, int(width.count // unit * k / steps) * unit)
            if count < width.count:
                left.append((kind, count))
        return Cut(tuple(sorted(dropped)), (*heads, *left), budget.own)

    if budget.fits(at(steps)):
        return at(steps)
    low, high = 0, steps  # the largest k that fits; the cost grows with k
    while known and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if budget.fits(at(middle)) else (low, middle)
    return at(low) if low else None


class Mixtures:
    """The cuts within a budget, by how many blocks go and how many KV groups are left in each of the others.

    order: blocks in the order in which they can go. most: how many, until blocks alone are enough. heads: the choices
    of ((kind, left),), the first of which leaves all; KV groups before query heads.
    """

    def __init__(self, model: nn.Module, budget: Budget, order: Sequence[int]) -> None:
        self.model, self.budget, self.order = model, budget, list(order)
        self.heads: list[tuple[tuple[str, int], ...]] = [()]
        for kind in (groups.HEADS, groups.QUERIES):
            known = kinds(model).get(kind) if kind not in budget.without else None
            if known is not None and known.count > 1:
                fewer = (known.count - max(1, known.count // 4), known.count // 2)
                fewer = fewer[:1] if kind == groups.QUERIES else fewer
                self.heads += [((kind, left),) for left in dict.fromkeys(fewer) if 0 < left < known.count]
        enough = (d for d in range(len(order) + 1) if budget.fits(Cut(tuple(sorted(order[:d])))))
        self.most = next(enough, len(order))

    def at(self, depth: int, heads: int) -> Cut | None:
        """The cut with so many blocks gone and the choice number `heads`; None where nothing fits."""
        if not (0 <= depth <= self.most and 0 <= heads < len(self.heads)):
            return None
        cut = neurons_for(self.model, self.budget, self.order[:depth], self.heads[heads])
        return cut if cut is not None and self.budget.allowed(cut) else None


def spread(most: int, n: int) -> list[int]:
    """At most n numbers of blocks from 0 to `most`, both among them, evenly spread."""
    if n < 2 or not most:
        return [0] if n < 2 else list(range(most + 1))
    return sorted({round(i * most / (n - 1)) for i in range(n)})

