"""Candidates: what each part of a model loses in each form, measured as KL to the dense model on calibration windows.

    drops     depth.by_kl: the order in which blocks go, measured anew after each; before that the blocks of least
              influence are picked
    heads     in every block fewer KV groups (one less, and half) or fewer query heads in each of them (one less)
    widths    as few neurons in every block as the round's aim needs, and half-way there; between these by straight
              lines. Both by walks of the solver
    sparse    each block alone in 2:4, solved on the model's own inputs, the others as they are
    grids     each block alone rounded to nearest; these shares of what all blocks lose, rounded together
    output    the output head alone rounded to nearest, and the embedding that it is tied to

Plans that are close to each other are walked as a whole before one is chosen. What gains nothing for any target is not
measured. Once a block is 2:4, widths and KV groups stay, as cutting columns
would break its groups of four.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ... import calibrate, models
from ...calibrate import Activations
from ...data import Tokens
from ...models import Weight, groups
from ...prune import loop, shared_inputs
from ...prune.patterns import NM
from ...quantise import grids, head, mixed, rtn
from ...runtime import products
from ...settings import RunConfig
from ...structured import Cut, budget, cut, depth, search, slices
from .. import forms, shrink
from ..plan import make_plan, pruning_job
from .plans import Candidates, Costs, Kept, Plan

WALK = 4096  # tokens on which a solver chooses the units of a candidate
MOST = 1 / 3  # of the blocks are tried in one round, unless more must go
LEAST = 4  # how many times narrower an MLP may get in one round
SHARES = 64  # widths are tried that leave so many shares of the blocks' parameters


class Looks:
    """Measures candidates against one dense model, on the same windows in every round.

    cut, sparse: the settings of runs that make a model smaller, and 2:4. tokens: calibration Tokens.
    """

    def __init__(self, cut: RunConfig, sparse: RunConfig, dense: nn.Module, tokens: Tokens) -> None:
        self.cut, self.sparse, self.tokens = cut, sparse, tokens
        ids, mask = shrink.first(tokens, shrink.ORDER)
        width = depth.KEPT // (len(ids) * models.config_of(dense).vocab_size)  # of the windows, for the teacher's sake
        self.ids, self.mask = ids[:, :width], None if mask is None else mask[:, :width]
        self.known = None
        self.known = self.run(dense, lambda activations: depth.teacher(dense, depth.through(dense, activations, 0, ())))

    def run(self, model: nn.Module, work: Callable[[Activations], object]) -> object:
        """What `work` makes of the activations at the model's first block."""
        with torch.no_grad(), models.experts_one_by_one(model), products.float32(self.cut.tf32):
            return work(loop.start(model, self.ids, self.mask, self.cut))

    def kl(self, model: nn.Module, activations: Activations) -> float:
        """KL(dense ‖ model), nats a token, of the model's activations after its last block."""
        return depth.divergence(model, activations, activations, known=self.known)

    def base(self, model: nn.Module, without: Sequence[int] = ()) -> float:
        """KL(dense ‖ model) of the model as it is, or without some blocks."""
        return self.run(model, lambda found: self.kl(model, depth.through(model, found, 0, without)))

    def at(self, model: nn.Module, costs: Costs, start: Plan, limits: Mapping[str, float],
           allow: frozenset[str]) -> Candidates:
        """The candidates of a model. start: what it is already. limits: as for `plans.best`. allow: see targets.py."""
        found, base = Candidates(), self.base(model)

        def above(kl: float) -> float:
            return max(0.0, kl - base)
        if "shrink" in allow:
            rows = self.drops(model, costs, limits, allow)
            found.drops += [(tuple(row["block"] for row in rows[:i + 1]), above(row["kl"]))
                            for i, row in enumerate(rows)]
            found.influence = self.run(model, lambda own: depth.influences(model, own, ()))[1]
            if not start.sparse:
                for heads in fewer_heads(model):
                    found.heads.append((heads, above(self.walked(model, Cut((), heads)))))
                found.widths += losses_of(narrower(model, costs, limits), lambda widths: above(
                    self.walked(model, Cut((), widths))))
        if forms.SPARSE in allow and gains(costs, start, limits, sparse=True):
            try:
                found.sparse = {b: above(kl) for b, kl in self.in_24(model, start).items()}
            except ValueError as error:  # a shape that no 2:4 has
                found.notes.append(f"2:4 is left out: {error}")
        for key, text in forms.GRIDS.items():
            if key in allow and gains(costs, start, limits, grid=key):
                grid = grids.parse(text)
                alone = {b: above(kl) for b, kl in self.in_grid(model, grid).items()}
                found.grids[key] = shared_out(above(self.rounded(model, grid)), alone)
            if key in allow and gains_at_head(costs, limits, key):
                found.output[key] = above(self.in_head(model, text))
        return found

    def drops(self, model: nn.Module, costs: Costs, limits: Mapping[str, float], allow: frozenset[str]) -> list[dict]:
        """The rows of `depth.by_kl`: as many as reach the limits alone, or MOST of all if all else helps enough."""
        strongest = Plan(sparse=tuple(range(costs.number)) if forms.SPARSE in allow else (),
                         grids=everywhere(costs, next((key for key in reversed(forms.GRIDS) if key in allow), None)))
        alone, helped = (next((d for d in range(1, costs.number) if within(costs, replace(
            own, drop=tuple(range(d))), limits)), costs.number - 1) for own in (Plan(), strongest))
        most = min(alone, max(helped, round(MOST * costs.number)))

        def allowed(blocks: list[int]) -> bool:
            return slices.possible(model, Cut(tuple(blocks)))
        return self.run(model, lambda found: depth.by_kl(model, found, most, (), allowed, self.cut.progress,
                                                         self.known)) if most else []

    def walked(self, model: nn.Module, found: Cut) -> float:
        """KL(dense ‖ cut) after the solver has chosen and refitted the units of a cut; the model is as before."""
        ids, mask = shrink.first(self.tokens, WALK)
        job = replace(shrink.job_of(self.cut, model, self.tokens), healers=(),
                      held_out=tuple(range(0, len(ids), 4)) if len(ids) > 1 else ())
        with search.put_back(model):
            loop.prune_model(model, ids, mask, search.job_for(job, model, found))
            return self.base(model, found.dropped)

    def whole(self, model: nn.Module, plan: Plan) -> float:
        """What the cut of a plan loses as a whole, nats above the model as it is."""
        return max(0.0, self.walked(model, plan.cut) - self.base(model))

    def in_24(self, model: nn.Module, start: Plan) -> dict[int, float]:
        """{number of a block: KL with that block alone in 2:4}, of those that are not yet."""
        plan = make_plan(replace(self.sparse, keep_dense=None), model)
        job = replace(pruning_job(replace(self.sparse, layer_errors=False), plan), healers=())
        [(_, new)] = shared_inputs.prune_shared(model, self.ids, self.mask, [job])
        return self.alone(model, lambda w: new[w.name], start.sparse)

    def in_grid(self, model: nn.Module, grid: grids.Grid) -> dict[int, float]:
        """{number of a block: KL with that block alone rounded to nearest}."""
        return self.alone(model, lambda w: rtn.round_to_nearest(w.get(), grid)[0])

    def in_head(self, model: nn.Module, grid: str) -> float:
        """KL(dense ‖ model) with the output head alone rounded to nearest; the model is as before."""
        name, linear = models.output_head(model)
        kept = linear.weight.data.clone()
        try:
            head.round_head(model, mixed.parse(f"none,{name}={grid}"))
            return self.base(model)
        finally:
            linear.weight.data.copy_(kept)

    def alone(self, model: nn.Module, new: Callable[[Weight], torch.Tensor],
              leave: Collection[int] = ()) -> dict[int, float]:
        """{number of a block: KL(dense ‖ model) with that block's linears alone as `new` says}, without some blocks."""
        def work(activations: Activations) -> dict[int, float]:
            found = {}
            for block in models.walk(model):
                if block.number not in leave:
                    kept = [(w, w.get().to(w.stored, copy=True)) for w in block.weights]
                    for w in block.weights:
                        w.set(new(w))
                    found[block.number] = self.kl(model, depth.through(model, activations.fork(), block.number, ()))
                    for w, W in kept:
                        w.set(W)
                for resident in models.walk(model, self.cut.device, start=block.number, end=block.number + 1):
                    calibrate.replay(resident.module, activations, block.number)
            return found
        return self.run(model, work)

    def rounded(self, model: nn.Module, grid: grids.Grid) -> float:
        """KL(dense ‖ rounded) with all linears rounded to nearest; the model is as before."""
        def work(activations: Activations) -> float:
            for number in range(len(models.blocks(model)[1])):
                [block] = models.walk(model, start=number, end=number + 1)
                kept = [(w, w.get().to(w.stored, copy=True)) for w in block.weights]
                for w, W in kept:
                    w.set(rtn.round_to_nearest(W.to(w.get()), grid)[0])
                for resident in models.walk(model, self.cut.device, start=number, end=number + 1):
                    calibrate.replay(resident.module, activations, number)
                for w, W in kept:
                    w.set(W)
            return self.kl(model, activations)
        return self.run(model, work)


def within(costs: Costs, plan: Plan, limits: Mapping[str, float]) -> bool:
    """Whether a plan costs no more than the limits."""
    found = costs.of(plan)
    return all(found[kind] <= limit for kind, limit in limits.items())


def gains(costs: Costs, start: Plan, limits: Mapping[str, float], sparse: bool = False,
          grid: str | None = None) -> bool:
    """Whether a form, in all blocks, costs less of anything that has a limit than the model as it is."""
    before = costs.of(Plan(sparse=start.sparse))
    after = costs.of(Plan(sparse=tuple(range(costs.number)) if sparse else start.sparse, grids=everywhere(costs, grid)))
    return any(after[kind] < before[kind] for kind in limits)


def gains_at_head(costs: Costs, limits: Mapping[str, float], key: str) -> bool:
    """Whether an output head in a form costs less of anything that has a limit than a dense one."""
    before, after = costs.rest(Plan()), costs.rest(Plan(output=key))
    return any(after.get(kind, 0.0) < before.get(kind, 0.0) for kind in limits)


def everywhere(costs: Costs, key: str | None) -> tuple[tuple[int, str], ...]:
    """`Plan.grids` with one grid for all blocks."""
    return tuple((b, key) for b in range(costs.number)) if key else ()


def shared_out(whole: float, alone: Mapping[int, float]) -> dict[int, float]:
    """{block: its share of `whole`}, in the ratio of what each loses alone; in equal shares where none does."""
    total = sum(alone.values())
    return {b: whole * (x / total if total else 1 / len(alone)) for b, x in alone.items()}


def fewer_heads(model: nn.Module) -> list[Kept]:
    """The Kept of `heads`, as far as the family's config can say them."""
    known = cut.kinds(model)
    ways = {groups.HEADS: lambda n: (n - 1, n // 2), groups.QUERIES: lambda n: (n - 1,)}
    found = [((kind, left),) for kind, fewer in ways.items() if kind in known
             for left in dict.fromkeys(fewer(known[kind].count)) if left > 0]
    return [heads for heads in found if slices.says(model, Cut((), heads))]


def narrower(model: nn.Module, costs: Costs, limits: Mapping[str, float]) -> list[Kept]:
    """Narrower MLPs, widest first: down to those that reach the limits alone, or the narrowest a round may make."""
    whole, known = costs.sizes.left(Cut()), cut.kinds(model)
    found: dict[Kept, None] = {}
    for i in range(SHARES - 1, 0, -1):
        share = budget.Budget(i / SHARES * whole, costs.sizes.left, multiple=NM(2, 4).m)
        made = budget.neurons_for(model, share, ())
        if made is None or any(LEAST * left < known[kind].count for kind, left in made.kept):
            break
        found[made.kept] = None
        if within(costs, Plan(widths=made.kept), limits):
            break
    return list(found)


def losses_of(widths: list[Kept], measured: Callable[[Kept], float]) -> list[tuple[Kept, float]]:
    """[(widths, loss)], measured at the narrowest and in the middle, between them and 0 by straight lines."""
    if not widths:
        return []
    last, middle = len(widths), (len(widths) + 1) // 2
    points = {0: 0.0} | {place: measured(widths[place - 1]) for place in sorted({middle, last})}
    return [(kept, float(np.interp(place, list(points), list(points.values()))))
            for place, kept in enumerate(widths, 1)]
