"""Cut: which blocks go, and how many units of each kind stay in those that are left."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from .. import models
from ..models import Block, groups
from ..models.groups import Width
from ..prune.patterns import Columns


@dataclass(frozen=True)
class Cut:
    """What is left of a model.

    dropped: numbers of the blocks that go. kept: ((kind, how many units stay), ...), the same in every block. own:
    ((full name of a consumer, how many units stay), ...), where it differs.
    """

    dropped: tuple[int, ...] = ()
    kept: tuple[tuple[str, int], ...] = ()
    own: tuple[tuple[str, int], ...] = field(default=())

    def plain(self) -> dict:
        """As JSON holds it."""
        return {"dropped": list(self.dropped), "kept": dict(self.kept), "own": dict(self.own)}

    @classmethod
    def of(cls, plain: dict) -> "Cut":
        """The Cut that `plain` gave."""
        return cls(tuple(plain["dropped"]), tuple(plain["kept"].items()), tuple(plain["own"].items()))

    def __str__(self) -> str:
        parts = [f"{len(self.dropped)} blocks ({', '.join(map(str, self.dropped))}) gone"] if self.dropped else []
        parts += [f"{count} {kind} left in each" for kind, count in self.kept]
        return "; ".join(parts) or "nothing gone"

    def left(self, block: Block, width: Width) -> int:
        """How many units of one consumer stay."""
        usual = dict(self.kept).get(width.kind, width.count)
        return usual if width.kind == groups.QUERIES else dict(self.own).get(f"{block.name}.{width.consumer}", usual)


def key_of(block: Block, width: Width) -> str:
    """The full name of a consumer; with a word behind it where its units are query heads, not KV groups."""
    return f"{block.name}.{width.consumer}" + (f" ({groups.QUERIES})" if width.kind == groups.QUERIES else "")


def pool_key(block: Block, pool: groups.Pool) -> str:
    """The full name of a mixture of experts, as `key_of` gives those of consumers."""
    return f"{block.name}.{pool.name} ({groups.WHOLE})"


def consumers(model: nn.Module, cut: Cut | None = None) -> Iterator[tuple[Block, Width]]:
    """Every consumer of a model, without the blocks that a cut drops."""
    for block in models.walk(model):
        if cut is None or block.number not in cut.dropped:
            for width in groups.widths(block.module):
                yield block, width


def patterns(model: nn.Module, cut: Cut) -> dict[str, Columns]:
    """{full name of a consumer: its pattern}, of those that lose anything. Only `own` may leave nothing of one.

    Raises ValueError naming what cannot be left.
    """
    found = {}
    for block, width in consumers(model, cut):
        left = cut.left(block, width)
        own = dict(cut.own).get(f"{block.name}.{width.consumer}") is not None
        if not (0 if own else 1) <= left <= width.count:
            raise ValueError(f"--shrink: leaves {left} of the {width.count} {width.kind} of {block.name}."
                             f"{width.consumer}; give a larger share")
        if left < width.count:
            if f"{block.name}.{width.consumer}" in found:
                raise ValueError(f"--shrink: {block.name}.{width.consumer} loses either {groups.HEADS} or "
                                 f"{groups.QUERIES}, not both at once")
            found[f"{block.name}.{width.consumer}"] = Columns(left, width.count, width.size)
    return found


def parts(model: nn.Module, wanted: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """((consumer, 0), ...) of attentions and MLPs that go alone. wanted: ("attn" or "mlp", number of the block).

    Raises ValueError naming `--drop` for a block without such a part.
    """
    found = []
    for part, number in wanted:
        kind = groups.HEADS if part == "attn" else groups.NEURONS
        own = [f"{b.name}.{w.consumer}" for b, w in consumers(model) if (b.number, w.kind) == (number, kind)]
        if len(own) != 1:
            raise ValueError(f"--drop {part}:{number}: block {number} has no {part} that could be taken out alone")
        found.append((own[0], 0))
    return tuple(found)


def kinds(model: nn.Module) -> dict[str, Width]:
    """{kind: a consumer of it}, as far as the family's config can say another number of units everywhere.

    A kind of which blocks have different numbers is missing.
    """
    found: dict[str, Width] = {}
    counts: dict[str, set[tuple[int, int]]] = {}
    for _, width in consumers(model):
        found.setdefault(width.kind, width)
        counts.setdefault(width.kind, set()).add((width.count, width.size))
    config = models.config_of(model)
    return {kind: width for kind, width in found.items() if len(counts[kind]) == 1
            and not groups.why_fixed(config.model_type, kind) and groups.config_field(config, kind)}


def parameters(model: nn.Module, cut: Cut) -> int:
    """How many parameters the blocks have after a cut."""
    total = 0
    for block in models.walk(model):
        if block.number in cut.dropped:
            continue
        total += sum(p.numel() for p in block.module.parameters())
        shapes = {w.linear: w for w in block.weights}
        for width in groups.widths(block.module):
            gone = width.segments * (width.count - cut.left(block, width))
            total -= gone * unit_size(width, shapes, block.module)
    return total


def unit_size(width: Width, weights: dict, block: nn.Module) -> int:
    """How many parameters go with one unit, biases included."""
    own = width.size * weights[width.consumer].shape[0] + sum(rows.shape[1] for rows in width.vectors.values())
    for name, rows in width.rows.items():
        biased = getattr(weights[name].owner, "bias", None) is not None or \
            hasattr(weights[name].owner, f"{weights[name].kind.rpartition('.')[2]}_bias")
        own += rows.shape[1] * (weights[name].shape[1] + biased)
    return own


def whole(model: nn.Module) -> int:
    """How many parameters the blocks have."""
    return sum(math.prod(p.shape) for p in models.blocks(model)[1].parameters())
