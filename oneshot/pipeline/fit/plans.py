"""Plans: what a round does to the model, what that costs on the device, and which plan is the best within the aims.

    gain   by the device table (pipeline/device_table.py), by stored bytes (pipeline/forms.py), by counts of parameters
    loss   what candidates.py has measured of each part alone, nats; those of a plan are added

Blocks go in the order that was measured, so their losses are those of whole sets. For each number of them, each width
and each grid, `choice.choose` says which blocks become 2:4.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import nn

from ... import models
from ...structured import Cut, budget, cut
from .. import device_table, forms
from .choice import Option, choose

KIND = "decode1"  # of the device table: what the target `latency` counts
CLOSE = 2.0  # times the least foretold loss
PARTS = ("drop", "heads", "widths", "sparse", "grid")
Kept = tuple[tuple[str, int], ...]  # as Cut.kept


@dataclass(frozen=True)
class Plan:
    """What a round does. drop: numbers of the blocks that go. heads, widths: ((kind, how many are left in each),).

    sparse: numbers of the blocks that are 2:4 afterwards, of the model without those that go. grid: a key of
    forms.GRIDS to which all linears are rounded, or None.
    """

    drop: tuple[int, ...] = ()
    heads: Kept = ()
    widths: Kept = ()
    sparse: tuple[int, ...] = ()
    grid: str | None = None

    @property
    def cut(self) -> Cut:
        """What of it makes the model smaller."""
        return Cut(tuple(sorted(self.drop)), (*self.heads, *self.widths))

    def plain(self) -> dict:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict) -> "Plan":
        """The Plan that `plain` gave."""
        return cls(*(tuple(map(tuple, plain[k])) if k in ("heads", "widths") else tuple(plain[k])
                     for k in PARTS[:-1]), plain["grid"])

    def __str__(self) -> str:
        gone = ", ".join(map(str, sorted(self.drop)))
        parts = [f"without block{'s' * (len(self.drop) > 1)} {gone}"] * bool(gone)
        parts += [f"{left} {kind} in each" for kind, left in (*self.heads, *self.widths)]
        parts += [f"{len(self.sparse)} blocks 2:4"] * bool(self.sparse) + [self.grid] * bool(self.grid)
        return ", ".join(parts) or "as it is"


@dataclass
class Candidates:
    """What can be done to a model, and what it loses, nats of KL to the dense model above that of the model as it is.

    drops: [(blocks that go, loss)], of rising numbers of blocks, none first. heads, widths: [(Kept, loss)], () first.
    sparse: {number of a block: loss in 2:4}. grids: {key of forms.GRIDS or None: loss}. notes: what a reader should
    know. influence: {number of a block: how much it changes the hidden state}.
    """

    drops: list[tuple[tuple[int, ...], float]] = field(default_factory=lambda: [((), 0.0)])
    heads: list[tuple[Kept, float]] = field(default_factory=lambda: [((), 0.0)])
    widths: list[tuple[Kept, float]] = field(default_factory=lambda: [((), 0.0)])
    sparse: dict[int, float] = field(default_factory=dict)
    grids: dict[str | None, float] = field(default_factory=lambda: {None: 0.0})
    notes: list[str] = field(default_factory=list)
    influence: dict[int, float] = field(default_factory=dict)

    def plain(self) -> dict:
        """As JSON holds it."""
        return {"drops": [[list(a), x] for a, x in self.drops], "heads": [[dict(a), x] for a, x in self.heads],
                "widths": [[dict(a), x] for a, x in self.widths], "grids": [[a, x] for a, x in self.grids.items()],
                **{name: [[b, x] for b, x in sorted(own.items())]
                   for name, own in (("sparse", self.sparse), ("influence", self.influence))}}


class Costs:
    """What a model costs after a plan, for each kind of target, as foretold.

    model: before the plan. table: of the device, or None where no target asks for it.
    """

    def __init__(self, model: nn.Module, table: dict | None = None) -> None:
        self.model, self.table = model, table
        self.sizes, self.linears = budget.Sizes.of(model), forms.linears(model)
        self.counts = {kind: width.count for kind, width in cut.kinds(model).items()}
        self.number = len(models.blocks(model)[1])

    def blocks(self, plan: Plan) -> Iterator[tuple[int, float]]:
        """(number, share of its parameters that is left) of every block that stays."""
        kept = dict(plan.cut.kept)
        for b, (size, units) in enumerate(zip(self.sizes.blocks, self.sizes.units, strict=True)):
            if b not in plan.drop:
                gone = sum((count - kept.get(kind, count)) * each for kind, (count, each) in units.items())
                yield b, 1 - gone / size

    def rest(self, plan: Plan) -> dict[str, float]:
        """{kind of target: what is not in the blocks}."""
        if self.table is None:
            return {}
        return {"latency": device_table.foretell(self.table, KIND, 0, {})}

    def block(self, plan: Plan, b: int, share: float, form: str) -> dict[str, float]:
        """{kind of target: what one block costs} in a form, with a share of its parameters left."""
        found = {"parameters": share * self.sizes.blocks[b],
                 "bytes": share * sum(forms.nbytes(form, *shape) for shape in self.linears[b])}
        if self.table is not None:
            left = self.counts | dict(plan.cut.kept)
            units = {kind: left[kind] for kind in self.table["units"] if kind in left}
            one = device_table.foretell(self.table, KIND, 1, units, [form])
            found["latency"] = one - device_table.foretell(self.table, KIND, 0, {})
        return found

    def of(self, plan: Plan) -> dict[str, float]:
        """{kind of target: what the model costs after a plan}."""
        found = dict(self.rest(plan))
        for place, (b, share) in enumerate(self.blocks(plan)):
            form = forms.named(place in plan.sparse, plan.grid)
            for kind, cost in self.block(plan, b, share, form).items():
                found[kind] = found.get(kind, 0.0) + cost
        return found


def best(costs: Costs, candidates: Candidates, start: Plan, limits: Mapping[str, float],
         without: frozenset[str] = frozenset()) -> tuple[Plan, float] | None:
    """(the plan of least loss whose costs are within all limits, that loss); None where there is none.

    start: what the model is already (its sparse blocks and grid). limits: {kind of target: the most it may cost}.
    without: PARTS that must stay as they are, because a round that changed them broke a floor.
    """
    def free(part: str, options: list) -> list:
        return options[:1] if part in without else options

    grids = [(g, x) for g, x in candidates.grids.items() if "grid" not in without or g == start.grid]
    found = None
    for drop, heads, widths, grid in itertools.product(
            free("drop", candidates.drops), free("heads", candidates.heads), free("widths", candidates.widths),
            grids or [(start.grid, 0.0)]):
        fixed = drop[1] + heads[1] + widths[1] + grid[1]
        if found and fixed >= found[1]:
            continue
        plan = Plan(drop[0], heads[0], widths[0], (), grid[0])
        sparse = {} if "sparse" in without else candidates.sparse
        if made := with_sparse(costs, plan, start, sparse, limits):
            total = fixed + made[1]
            if found is None or total < found[1]:
                found = made[0], total
    return found


def alternatives(costs: Costs, candidates: Candidates, start: Plan, limits: Mapping[str, float],
                 without: frozenset[str] = frozenset()) -> list[tuple[Plan, float]]:
    """[(plan, loss)]: the best, and those without each of its ways to cut that are foretold to lose at most CLOSE
    times as much. Losses of cuts add only roughly, so these are worth measuring as a whole.
    """
    found = [best(costs, candidates, start, limits, without | extra)
             for extra in (frozenset(), *(frozenset({part}) for part in PARTS[:3]))]
    if found[0] is None:
        return []
    close = {plan: loss for plan, loss in filter(None, found) if loss <= CLOSE * found[0][1]}
    return list(({found[0][0]: found[0][1]} | close).items())


def way_of(plan: Plan) -> dict:
    """What a plan for the whole way leaves, plain values: of heads and widths, and how many blocks go."""
    return {"heads": dict(plan.heads), "widths": dict(plan.widths), "drop": len(plan.drop), "grid": plan.grid}


def towards(candidates: Candidates, way: dict, gone: int, start: Plan) -> Candidates:
    """The candidates that lie on a way (`way_of`): nothing is taken that it leaves. gone: blocks that went already.

    A step alone would take many small units where the whole way is better off with a large one.
    """
    def on(options: list[tuple[Kept, float]], left: dict[str, int]) -> list[tuple[Kept, float]]:
        return [(kept, x) for kept, x in options if all(n >= left.get(kind, math.inf) for kind, n in kept)]
    grids = {grid: x for grid, x in candidates.grids.items() if grid in (None, start.grid, way["grid"])}
    return replace(candidates, drops=[(d, x) for d, x in candidates.drops if len(d) <= max(0, way["drop"] - gone)],
                   heads=on(candidates.heads, way["heads"]), widths=on(candidates.widths, way["widths"]), grids=grids)


def with_sparse(costs: Costs, plan: Plan, start: Plan, losses: Mapping[int, float],
                limits: Mapping[str, float]) -> tuple[Plan, float] | None:
    """(the plan with the best blocks for 2:4, what they lose); None where the limits cannot be kept."""
    rest, units, places = costs.rest(plan), [], []
    for place, (b, share) in enumerate(costs.blocks(plan)):
        own = [(True, 0.0)] if b in start.sparse else [(False, 0.0), *([(True, losses[b])] if b in losses else [])]
        units.append([Option(loss, tuple(costs.block(plan, b, share, forms.named(is24, plan.grid))[kind]
                                         for kind in limits)) for is24, loss in own])
        places.append((place, [is24 for is24, _ in own]))
    picked = choose(units, [limit - rest.get(kind, 0.0) for kind, limit in limits.items()])
    if picked is None:
        return None
    sparse = tuple(place for (place, own), i in zip(places, picked, strict=True) if own[i])
    loss = sum(unit[i].loss for unit, i in zip(units, picked, strict=True))
    return Plan(plan.drop, plan.heads, plan.widths, sparse, plan.grid), loss


def uncut(plan: Plan, candidates: Candidates, loss: float) -> float:
    """What of a plan's foretold loss is not that of its cut: 2:4 and rounding."""
    return loss - sum(dict(own)[part] for own, part in ((candidates.drops, plan.drop), (candidates.heads, plan.heads),
                                                        (candidates.widths, plan.widths)))


def changed(plan: Plan, start: Plan, candidates: Candidates) -> str:
    """The one of PARTS that a plan is foretold to lose most by; what another way leaves alone."""
    losses = {"drop": dict(candidates.drops).get(plan.drop, 0.0), "heads": dict(candidates.heads).get(plan.heads, 0.0),
              "widths": dict(candidates.widths).get(plan.widths, 0.0),
              "grid": candidates.grids.get(plan.grid, 0.0) if plan.grid != start.grid else 0.0}
    stay = [b for b in range(len(candidates.sparse) + len(plan.drop) + len(start.sparse)) if b not in plan.drop]
    losses["sparse"] = sum(candidates.sparse.get(stay[i], 0.0) for i in plan.sparse if i < len(stay)
                           and stay[i] not in start.sparse)
    return max(PARTS, key=lambda part: losses[part])
