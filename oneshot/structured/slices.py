"""Slices: the smaller model that computes the same as one in which whole units are zero.

    unit        columns of a consumer that are zero, and the rows of its producers that compute their input
    producer    loses these rows, and its bias those entries
    consumer    loses these columns

The units that go are those whose columns in the consumer are all zero, wherever the cut leaves fewer than there are. A
kept unit may be zero as well (a ReLU neuron that never fires): then the first zero ones go, which makes no difference.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import models
from ..models import Block, groups, smaller, uneven
from ..models.groups import Width
from ..runtime.proof import prove
from . import ragged
from .cut import Cut, consumers, key_of, pool_key


@dataclass
class Report:
    """What was cut off.

    keep: numbers of the blocks that are left. units: {`cut.key_of` a consumer in the larger model: int64, the units
    that are left}, of those that lost any. notes: what a reader of the record should know.
    """

    keep: list[int]
    units: dict[str, torch.Tensor]
    notes: list[str]


def cut_model(model: nn.Module, cut: Cut) -> tuple[nn.Module, Report]:
    """(the smaller model, Report): a new model with the weights that are left, copied; `model` is unchanged.

    With `cut.own`, layers may differ in width; such a model loads after `import oneshot` only.

    Raises ValueError naming what the family's config cannot say, ProofError for a unit that is not zero.
    """
    n = len(models.blocks(model)[1])
    keep = [i for i in range(n) if i not in cut.dropped]
    if not keep:
        raise ValueError(f"--shrink: would drop all {n} blocks; give a larger share")
    return with_units(model, cut, keep, kept_units(model, cut))


def first_units(model: nn.Module, cut: Cut) -> nn.Module:
    """A model of the shape of a cut without `own`, with whatever units come first: to measure its time."""
    keep = [i for i in range(len(models.blocks(model)[1])) if i not in cut.dropped]
    units = {key_of(block, width): torch.arange(width.segments * width.count).view(width.segments, -1)[
        :, :cut.left(block, width)].flatten() for block, width in consumers(model, cut)
        if cut.left(block, width) < width.count}
    return with_units(model, cut, keep, units)[0]


def with_units(model: nn.Module, cut: Cut, keep: list[int],
               units: dict[str, torch.Tensor]) -> tuple[nn.Module, Report]:
    """See `cut_model`, for units that were chosen."""
    counts = uniform(model, cut, units)
    config, notes = smaller.smaller_config(model, keep, counts, biases_added(model))
    made = smaller.empty_model(model, config)
    smaller.check_blocks(model, made, keep)
    shapes, gone = ragged.differences(model, made, cut, keep, units, block_state) if cut.own else ({}, {})
    uneven.reshape(made, shapes, gone)
    smaller.fill(model, made, sliced_state(model, made, keep, units), keep)
    if shapes or gone:
        ragged.check(model, made, cut)
        uneven.mark(made, shapes, gone)
        notes = [*notes, f"{len(shapes) + len(gone)} linears and parts differ from layer to layer: it loads after "
                         "`import oneshot` only"]
    return made, Report(keep, units, notes)


def says(model: nn.Module, cut: Cut, biases: bool = False) -> bool:
    """Whether the family's config can say a cut. biases: whether every linear gets one."""
    keep = [i for i in range(len(models.blocks(model)[1])) if i not in cut.dropped]
    try:
        smaller.smaller_config(model, keep, dict(cut.kept), biases)
    except ValueError:
        return False
    return True


def can_differ(model: nn.Module, kind: str) -> bool:
    """Whether the family's own code computes the same when one layer has one unit of a kind less than another.

    Tried on the first two blocks that have such units.
    """
    having = {block.number: (block, width) for block, width in consumers(model) if width.kind == kind}
    if len(having) < 2:
        return False
    first, last = list(having)[:2]
    block, width = having[last]
    weight = next(w for w in block.weights if w.linear == width.consumer)
    kept, dropped = weight.get().clone(), tuple(b.number for b in models.walk(model)
                                                if b.number not in (first, last))
    changed = kept.clone()
    changed[:, -width.size:] = 0
    try:
        weight.set(changed, rounds=False)
        cut_model(model, Cut(dropped, (), ((weight.name, width.count - 1),)))
    except ValueError:
        return False
    finally:
        weight.set(kept, rounds=False)
    return True


def without_experts(model: nn.Module, chosen: dict[str, torch.Tensor]) -> nn.Module:
    """A new model with fewer experts. chosen: {`pool_key`: int64, which are left}, as many in every mixture.

    Raises ValueError naming what the family's config cannot say.
    """
    keep, counts = list(range(len(models.blocks(model)[1]))), {len(kept) for kept in chosen.values()}
    config, _ = smaller.smaller_config(model, keep, {groups.WHOLE: counts.pop()})
    made = smaller.empty_model(model, config)
    smaller.check_blocks(model, made, keep)
    return smaller.fill(model, made, sliced_state(model, made, keep, chosen), keep)


def possible(model: nn.Module, cut: Cut) -> bool:
    """Whether the family's own code can be built without the blocks that a cut drops, each behaving as before."""
    keep = [i for i in range(len(models.blocks(model)[1])) if i not in cut.dropped]
    try:
        config, _ = smaller.smaller_config(model, keep, {})
        smaller.check_blocks(model, smaller.empty_model(model, config), keep)
    except ValueError:
        return False
    return bool(keep)


def kept_units(model: nn.Module, cut: Cut) -> dict[str, torch.Tensor]:
    """{`key_of` a consumer: int64, the units that stay}, of those that lose any."""
    found = {}
    for block, width in consumers(model, cut):
        left = cut.left(block, width)
        if left < width.count:
            own = next(w for w in block.weights if w.linear == width.consumer)
            zero = ~(own.get() != 0).any(0).view(width.segments, width.count, width.size).any(2).cpu()
            goes = zero & (zero.cumsum(1) <= width.count - left)
            prove(bool((goes.sum(1) == width.count - left).all()), f"{own.name}: {int(goes.sum(1).min())} units are "
                  f"zero, {width.count - left} should be")
            found[key_of(block, width)] = (~goes).flatten().nonzero()[:, 0]
    return found


def uniform(model: nn.Module, cut: Cut, units: dict[str, torch.Tensor]) -> dict[str, int]:
    """{kind: how many units are left} of the kinds that lose any. Raises ValueError where blocks differ."""
    counts: dict[str, set[int]] = {}
    for block, width in consumers(model, cut):
        stays = units.get(key_of(block, width))
        counts.setdefault(width.kind, set()).add(width.count if stays is None else len(stays) // width.segments)
    lost = {width.kind for block, width in consumers(model, cut) if key_of(block, width) in units}
    differ = [kind for kind in lost if len(counts[kind]) > 1]
    if cut.own:
        lost -= set(differ)
    elif differ:
        raise ValueError(f"--shrink: {' and '.join(differ)} would differ from block to block "
                         f"({', '.join(map(str, sorted(counts[differ[0]])))}), which no ordinary config says")
    return {kind: counts[kind].pop() for kind in lost}


def can_add_biases(model: nn.Module) -> bool:
    """Whether the family's config can give linears biases that this model's do not have."""
    asked = [getattr(models.config_of(model), name, None) for name in smaller.MISTRAL_LACKS]
    return None not in asked and not all(asked)


def biases_added(model: nn.Module) -> bool:
    """Whether linears of the blocks have biases that the family's class would not give them by its config."""
    linears = [m for m in models.blocks(model)[1].modules() if isinstance(m, nn.Linear)]
    return can_add_biases(model) and any(m.bias is not None for m in linears)


def indices(block: Block, width: Width, stays: torch.Tensor, found: dict) -> None:
    """Add to `found`, {(parameter's name, expert or None): [(dimension, indices)]}, what stays of one consumer.

    Dimensions count within one weight as it is stored.
    """
    weights = {w.linear: w for w in block.weights}
    own = weights[width.consumer]
    columns = torch.arange(own.shape[1]).view(-1, width.size)[stays].flatten()
    put(found, own, 0 if own.transposed else 1, columns)
    for name, rows in width.rows.items():
        weight = weights[name]
        kept = rows[stays].flatten().sort().values
        put(found, weight, 1 if weight.transposed else 0, kept)
        stem = weight.kind if weight.expert is not None else weight.linear
        bias = f"{stem}_bias" if weight.expert is not None else f"{stem}.bias"
        found.setdefault((bias, weight.expert), []).append((0, kept))
    for name, rows in width.vectors.items():
        found.setdefault((name, None), []).append((0, rows[stays].flatten().sort().values))


def put(found: dict, weight: models.Weight, dim: int, kept: torch.Tensor) -> None:
    """Note which indices of a weight stay along one dimension."""
    name = weight.kind if weight.expert is not None else f"{weight.linear}.weight"
    found.setdefault((name, weight.expert), []).append((dim, kept))


def sliced(t: torch.Tensor, cuts: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """t without what does not stay along each dimension; a copy."""
    for dim, kept in cuts:
        t = t.index_select(dim, kept.to(t.device))
    return t.clone(memory_format=torch.contiguous_format)


def block_state(block: Block, units: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The block's state dict without the units that go."""
    found: dict = {}
    for width in groups.widths(block.module):
        if (stays := units.get(key_of(block, width))) is not None:
            indices(block, width, stays, found)
    left = {name: kept for pool in groups.pools(block.module) for name in pool.tensors
            if (kept := units.get(pool_key(block, pool))) is not None}
    state = {}
    for name, t in block.module.state_dict().items():
        experts = {e: cuts for (key, e), cuts in found.items() if key == name and e is not None}
        if experts:
            kept = left[name].tolist() if name in left else range(len(t))
            state[name] = torch.stack([sliced(t[e], experts[e]) for e in kept])
        elif name in left:
            state[name] = sliced(t, [(0, left[name])])
        else:
            state[name] = sliced(t, found.get((name, None), []))
    return state


def sliced_state(model: nn.Module, made: nn.Module, keep: list[int],
                 units: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The smaller model's state dict. A bias that only it has is zero."""
    path, _ = models.blocks(model)
    state = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith(f"{path}.")}
    for block in models.walk(model):
        if block.number in keep:
            place = keep.index(block.number)
            state |= {f"{path}.{place}.{name}": t for name, t in block_state(block, units).items()}
    wanted = made.state_dict()
    empty = {name.rpartition(".")[0].rpartition(".")[0] for name, t in wanted.items() if not t.numel()}
    state = {name: t for name, t in state.items() if name in wanted or not any(name.startswith(f"{m}.") for m in empty)}
    for name, t in wanted.items():
        if name not in state and name.endswith(".bias"):
            state[name] = torch.zeros(t.shape, dtype=t.dtype)
    return state


def become(model: nn.Module, other: nn.Module) -> None:
    """Make the object `model` the other model, so that whoever holds it holds the smaller one."""
    model.__class__ = type(other)
    model.__dict__ = other.__dict__
