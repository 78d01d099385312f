"""Budget: the cuts that leave a given share of the blocks' parameters, from neurons alone to blocks alone.

    target      parameters of the blocks that may be left
    candidate   a number of blocks that go (the first of an order), a number of KV groups left in each of the others,
                and as many neurons in each as the target then allows

The counts are the same in every block, so that the family's ordinary config says them. Neurons are left in multiples
of `rounded`, for the sake of kernels and of N:M patterns.
"""

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
                    own[width.kind] = count, size + unit_size(width, weights, block.module)
            blocks.append(sum(p.numel() for p in block.module.parameters()))
            units.append(own)
        return cls(tuple(blocks), tuple(units))

    def left(self, cut: Cut) -> int:
        """How many parameters a uniform cut leaves."""
        kept = dict(cut.kept)
        return sum(size - sum((count - kept.get(kind, count)) * each for kind, (count, each) in own.items())
                   for b, (size, own) in enumerate(zip(self.blocks, self.units, strict=True)) if b not in cut.dropped)


def rounded(count: int) -> int:
    """The multiple in which the neurons of a layer of `count` are left."""
    return 8 if count >= 256 and not count % 8 else 4 if count >= 64 and not count % 4 else 1


def neurons_for(model: nn.Module, target: float, dropped: Sequence[int], heads: tuple[tuple[str, int], ...],
                cost: Cost, without: Sequence[str] = ()) -> Cut | None:
    """The cut of most neurons whose cost is at most `target`; None if there is none.

    heads: ((kind, left),) or (). without: kinds of neurons that must not lose any.
    """
    known = {kind: width for kind, width in kinds(model).items() if kind != groups.HEADS and kind not in without}
    steps = sorted({width.count // rounded(width.count) for width in known.values()} or {1})[-1]

    def at(k: int) -> Cut:
        left = []
        for kind, width in known.items():
            unit = rounded(width.count)
            count = max(unit, int(width.count // unit * k / steps) * unit)
            if count < width.count:
                left.append((kind, count))
        return Cut(tuple(sorted(dropped)), (*heads, *left))

    low, high = 0, steps + 1  # the largest k that is cheap enough; the cost grows with k
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(at(middle)) <= target else (low, middle)
    return at(low) if low else None


def candidates(model: nn.Module, target: float, order: Sequence[int], cost: Cost, tries: int,
               without: Sequence[str] = ()) -> list[Cut]:
    """At most `tries` cuts within the target, different in how much depth, heads and neurons give.

    order: blocks in the order in which they can go. without: kinds that must not lose any.

    Raises ValueError naming `--shrink` if none is small enough.
    """
    heads = kinds(model).get(groups.HEADS) if groups.HEADS not in without else None
    choices = [()]
    if heads is not None and heads.count > 1:
        least = heads.count // 2 if heads.count > 2 else 1
        choices += [((groups.HEADS, left),) for left in dict.fromkeys((heads.count - max(1, heads.count // 4), least))]
    most = next((d for d in range(len(order) + 1) if cost(Cut(tuple(sorted(order[:d])))) <= target), len(order))
    found: dict[Cut, None] = {}
    depths = spread(most, max(1, -(-tries // len(choices))))
    for choice in choices:
        for d in depths:
            cut = neurons_for(model, target, order[:d], choice, cost, without)
            if cut is not None:
                found.setdefault(cut)
    if not found:
        raise ValueError("--shrink: leaves less than one unit in every layer; give a larger share")
    return list(found)[:tries]


def spread(most: int, n: int) -> list[int]:
    """At most n numbers of blocks from 0 to `most`, both among them, evenly spread."""
    if n < 2 or not most:
        return [0] if n < 2 else list(range(most + 1))
    return sorted({round(i * most / (n - 1)) for i in range(n)})

