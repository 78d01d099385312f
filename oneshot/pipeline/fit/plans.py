"""Plans: what a round does to the model, what that costs on the device, and which plan is the best within the aims.

    gain   by the device table (pipeline/device_table.py), by stored bytes (pipeline/forms.py), by counts of parameters
    loss   what candidates.py has measured of each part alone, nats; those of a plan are added

Blocks go in the order that was measured, so their losses are those of whole sets. For each number of them and each
width, `choice.choose` says in which form each block is that stays: dense, 2:4, int8, int4, 2:4 and integers.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from torch import nn

from ... import models
from ...structured import Cut, budget, cut
from .. import device_table, forms
from .choice import Option, choose

KIND = "decode1"  # of the device table: what the target `latency` counts
CLOSE = 2.0  # times the least foretold loss
PARTS = ("drop", "heads", "widths", "sparse", "grids", "output")
Kept = tuple[tuple[str, int], ...]  # as Cut.kept


@dataclass(frozen=True)
class Plan:
    """What a round does. drop: numbers of the blocks that go. heads, widths: ((kind, how many are left in each),).

    sparse: numbers of the blocks that are 2:4 afterwards, of the model without those that go. grids: ((number of such a
    block, key of forms.GRIDS to which its linears are rounded),). output: the same of the output head, or None.
    """

    drop: tuple[int, ...] = ()
    heads: Kept = ()
    widths: Kept = ()
    sparse: tuple[int, ...] = ()
    grids: tuple[tuple[int, str], ...] = ()
    output: str | None = None

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
        return cls(*(tuple(map(tuple, plain[k])) if k in ("heads", "widths", "grids") else tuple(plain[k])
                     for k in PARTS[:-1]), plain["output"])

    def form(self, place: int) -> str:
        """The form of a block, by its number in the model without those that go."""
        return forms.named(place in self.sparse, dict(self.grids).get(place))

    def __str__(self) -> str:
        gone = ", ".join(map(str, sorted(self.drop)))
        parts = [f"without block{'s' * (len(self.drop) > 1)} {gone}"] * bool(gone)
        parts += [f"{left} {kind} in each" for kind, left in (*self.heads, *self.widths)]
        own = {forms.SPARSE: len(self.sparse)} | {key: sum(k == key for _, k in self.grids) for key in forms.GRIDS}
        parts += [f"{form} in {count} block{'s' * (count > 1)}" for form, count in own.items() if count]
        parts += [f"{forms.HEAD} in {self.output}"] if self.output else []
        return ", ".join(parts) or "as it is"


@dataclass
class Candidates:
    """What can be done to a model, and what it loses, nats of KL to the dense model above that of the model as it is.

    drops: [(blocks that go, loss)], of rising numbers of blocks, none first. heads, widths: [(Kept, loss)], () first.
    sparse: {number of a block: loss in 2:4}. grids: {key of forms.GRIDS: {number of a block: loss}}. output: {key of
    forms.GRIDS: loss of the output head}. notes: what a reader should know.
    influence: {number of a block: how much it changes the hidden state}.
    """

    drops: list[tuple[tuple[int, ...], float]] = field(default_factory=lambda: [((), 0.0)])
    heads: list[tuple[Kept, float]] = field(default_factory=lambda: [((), 0.0)])
    widths: list[tuple[Kept, float]] = field(default_factory=lambda: [((), 0.0)])
    sparse: dict[int, float] = field(default_factory=dict)
    grids: dict[str, dict[int, float]] = field(default_factory=dict)
    output: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    influence: dict[int, float] = field(default_factory=dict)

    def plain(self) -> dict:
        """As JSON holds it."""
        return {"drops": [[list(a), x] for a, x in self.drops], "heads": [[dict(a), x] for a, x in self.heads],
                "widths": [[dict(a), x] for a, x in self.widths],
                "grids": {key: [[b, x] for b, x in sorted(own.items())] for key, own in self.grids.items()},
                "output": self.output,
                **{name: [[b, x] for b, x in sorted(own.items())]
                   for name, own in (("sparse", self.sparse), ("influence", self.influence))}}

    @classmethod
    def of(cls, plain: dict) -> "Candidates":
        """The Candidates that `plain` gave, without notes."""
        kept = {name: [(tuple(a.items()), x) for a, x in plain[name]] for name in ("heads", "widths")}
        return cls([(tuple(a), x) for a, x in plain["drops"]], **kept, output=plain["output"],
                   sparse=dict(plain["sparse"]), influence=dict(plain["influence"]),
                   grids={key: dict(own) for key, own in plain["grids"].items()})


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
        return {"latency": device_table.foretell(self.table, KIND, 0, {}, head=plan.output)}

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
            for kind, cost in self.block(plan, b, share, plan.form(place)).items():
                found[kind] = found.get(kind, 0.0) + cost
        return found


def best(costs: Costs, candidates: Candidates, start: Plan, limits: Mapping[str, float],
         without: frozenset[str] = frozenset()) -> tuple[Plan, float] | None:
    """(the plan of least loss whose costs are within all limits, that loss); None where there is none.

    start: what the model is already (its sparse blocks and grids). limits: {kind of target: the most it may cost}.
    without: PARTS that must stay as they are, because a round that changed them broke a floor.
    """
    def free(part: str, options: list) -> list:
        return options[:1] if part in without else options

    cuts = itertools.product(free("drop", candidates.drops), free("heads", candidates.heads),
                             free("widths", candidates.widths))
    found = None
    for fixed, drop, heads, widths in sorted(((a + b + c, drop, heads, widths) for (drop, a), (heads, b), (widths, c)
                                              in cuts), key=lambda own: own[0]):
        if found and fixed >= found[1]:
            break
        if made := with_forms(costs, Plan(drop, heads, widths), losses_of(candidates, start, without),
                              outputs_of(candidates, start, without), limits):
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
    """What a plan for the whole way leaves, plain values: of heads and widths, how many blocks go, and its forms."""
    return {"heads": dict(plan.heads), "widths": dict(plan.widths), "drop": len(plan.drop),
            "grids": sorted({key for _, key in plan.grids}), "output": plan.output,
            "sparse": bool(plan.sparse)}


def towards(candidates: Candidates, way: dict, gone: int, start: Plan) -> Candidates:
    """The candidates that lie on a way (`way_of`): nothing is taken that it leaves. gone: blocks that went already.

    A step alone would take many small units where the whole way is better off with a large one.
    """
    def on(options: list[tuple[Kept, float]], left: dict[str, int]) -> list[tuple[Kept, float]]:
        return [(kept, x) for kept, x in options if all(n >= left.get(kind, math.inf) for kind, n in kept)]
    taken = {*way["grids"], *(key for _, key in start.grids)}
    grids = {key: own for key, own in candidates.grids.items() if key in taken}
    output = {key: x for key, x in candidates.output.items() if key in (way["output"], start.output)}
    return replace(candidates, drops=[(d, x) for d, x in candidates.drops if len(d) <= max(0, way["drop"] - gone)],
                   heads=on(candidates.heads, way["heads"]), widths=on(candidates.widths, way["widths"]), grids=grids,
                   output=output, sparse=candidates.sparse if way["sparse"] or start.sparse else {})


Losses = Callable[[int], dict[tuple[bool, str | None], float]]  # of a block: {(2:4?, key of its grid): loss}


def losses_of(candidates: Candidates, start: Plan, without: frozenset[str] = frozenset()) -> Losses:
    """What each form that a block may get loses, the one that costs nothing first. without: as for `best`.

    A block that is 2:4 stays so, while rounding begins anew from what was there before it. Losses of both are added.
    """
    before = dict(start.grids)

    def of(b: int) -> dict[tuple[bool, str | None], float]:
        sparse = {b in start.sparse: 0.0}
        if "sparse" not in without and b in candidates.sparse and b not in start.sparse:
            sparse[True] = candidates.sparse[b]
        grids = {None: 0.0} | {key: own[b] for key, own in candidates.grids.items() if b in own}
        if "grids" in without:
            grids = {before.get(b): grids.get(before.get(b), 0.0)}
        return {(is24, key): x + y for is24, x in sparse.items() for key, y in grids.items()}
    return of


def outputs_of(candidates: Candidates, start: Plan, without: frozenset[str] = frozenset()) -> dict[str | None, float]:
    """What each form loses that the output head may get. without: as for `best`."""
    found = {None: 0.0} | candidates.output
    return {start.output: found.get(start.output, 0.0)} if "output" in without else found


def with_forms(costs: Costs, plan: Plan, losses: Losses, outputs: Mapping[str | None, float],
               limits: Mapping[str, float]) -> tuple[Plan, float] | None:
    """(the plan with the best form for each block and the output head, what they lose); None where the limits cannot
    be kept.

    It never loses more than the best plan that has one grid for all blocks, also where `choose` is not exact.
    """
    head = [(key, Option(loss, tuple(costs.rest(replace(plan, output=key)).get(kind, 0.0) for kind in limits)))
            for key, loss in outputs.items()]
    units = [(place, {form: Option(loss, tuple(costs.block(plan, b, share, forms.named(*form))[kind]
                                               for kind in limits)) for form, loss in losses(b).items()})
             for place, (b, share) in enumerate(costs.blocks(plan))]
    found = None
    for only in (forms.GRIDS.keys() | {None}, {None}, *({key} for key in forms.GRIDS)):
        own = [*([(form, option) for form, option in options.items() if form[1] in only] for _, options in units), head]
        picked = choose([[option for _, option in unit] for unit in own], [*limits.values()]) if all(own) else None
        if picked is not None:
            chosen = [unit[i] for unit, i in zip(own, picked, strict=True)]
            loss = sum(option.loss for _, option in chosen)
            if found is None or loss < found[1]:
                found = [form for form, _ in chosen], loss
    if found is None:
        return None
    places, (*in_blocks, output) = [place for place, _ in units], found[0]
    return replace(plan, sparse=tuple(place for place, (is24, _) in zip(places, in_blocks, strict=True) if is24),
                   grids=tuple((place, key) for place, (_, key) in zip(places, in_blocks, strict=True) if key),
                   output=output), found[1]


def uncut(plan: Plan, candidates: Candidates, loss: float) -> float:
    """What of a plan's foretold loss is not that of its cut: 2:4 and rounding."""
    return loss - sum(dict(own)[part] for own, part in ((candidates.drops, plan.drop), (candidates.heads, plan.heads),
                                                        (candidates.widths, plan.widths)))


def changed(plan: Plan, start: Plan, candidates: Candidates) -> str:
    """The one of PARTS that a plan is foretold to lose most by; what another way leaves alone."""
    losses = {"drop": dict(candidates.drops).get(plan.drop, 0.0), "heads": dict(candidates.heads).get(plan.heads, 0.0),
              "widths": dict(candidates.widths).get(plan.widths, 0.0)}
    most = max((*plan.sparse, *(place for place, _ in plan.grids)), default=0) + len(plan.drop) + 1
    stay = [b for b in range(most) if b not in plan.drop]  # {number afterwards: number before}
    losses["sparse"] = sum(candidates.sparse.get(stay[i], 0.0) for i in plan.sparse if stay[i] not in start.sparse)
    losses["grids"] = sum(candidates.grids.get(key, {}).get(stay[i], 0.0) for i, key in plan.grids
                          if (stay[i], key) not in start.grids)
    losses["output"] = candidates.output.get(plan.output, 0.0) if plan.output != start.output else 0.0
    return max(PARTS, key=lambda part: losses[part])
