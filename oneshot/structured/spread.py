"""Spread: widths that differ by layer, so that the next units to go cost the model the same in every layer.

    Δ_l(k)   exact increase of layer l's error when its k cheapest units are gone (solvers/obs.py), on the dense model's
             inputs, tokens weighted by 1 / the squared norm of the dense block's output
    π_l      price: KL(dense ‖ cut), nats per token, when half of the units that may go are gone in this layer alone,
             measured through all blocks behind it, over the layer's Δ there

A layer is an MLP with its neurons or an attention with its KV groups. Of all layers' next chunks of units, the one with
the least π_l · increase per parameter goes, until the cut fits. Every layer keeps at least a quarter of its units.
Without prices SmolLM2's last blocks lose most, though the same error costs the model several times as much there as in
the middle (results/LOG.md).

FLAP has widths of its own (arXiv 2312.11983): its score of each unit, standardised over the layer's columns, in the
place of π_l · increase. Here too no layer loses all of its units.
"""

import heapq
from collections.abc import Collection, Mapping

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations, Statistics
from ..models import Block, Weight, groups
from ..models.groups import Width
from ..prune import loop
from ..prune.linalg import upper_factor
from ..prune.options import Options
from ..prune.patterns import Columns
from ..prune.shared_inputs import dense_pass
from ..prune.solvers import flap, obs
from ..runtime import products
from . import depth
from .budget import Budget
from .cut import Cut, parameters, unit_size
from .cut import kinds as every_kind

LEAST = 4  # a layer keeps one in so many of its units
TOKENS = 4096  # on which prices are measured, and one window at least
SMALLEST = 0.01  # of the mean price: a measured one can be zero, or by rounding below it


@torch.no_grad()
def curves(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: Options, cut: Cut,
           budget: Budget) -> tuple[dict[str, list[float]], dict[str, float]]:
    """({consumer of neurons or KV groups: the increase of its error with each chunk that goes}, {consumer: its price}).

    Of the blocks that a cut leaves. ids, mask: the calibration windows (n, T).
    """
    increases: dict[str, list[float]] = {}
    prices: dict[str, float] = {}
    windows, there = max(1, TOKENS // ids.shape[1]), layers(model, budget).keys() - dict(budget.own).keys()
    with models.experts_one_by_one(model), products.float32(options.tf32), \
            tqdm(total=len(models.blocks(model)[1]), desc="widths", unit="block", disable=not options.progress,
                 leave=False) as bar:
        activations = loop.start(model, ids, mask, options)
        few = loop.start(model, ids[:windows], None if mask is None else mask[:windows], options)
        dense = depth.through(model, few.fork(), 0, ())
        known = depth.teacher(model, dense)
        for block in models.walk(model, options.device, bar=bar):
            after = activations.fork()
            calibrate.replay(block.module, after, block.number)
            own = {w.linear: w for w in block.weights}
            both = [(own[w.consumer], w) for w in groups.widths(block.module)
                    if own[w.consumer].name in there and w.kind != groups.QUERIES]
            if both and block.number not in cut.dropped:
                activations.scales = [1 / h.float().norm(dim=-1).flatten().clamp_min(1e-30) for h in after.hidden]
                statistics, _, _ = calibrate.collect(block.module, activations, block.number, [w for w, _ in both],
                                                     {"outer"})
                for weight, width in both:
                    if weight.name in statistics:
                        trace, half = curve(weight.get(), statistics[weight.name], width, budget)
                        lost = depth.divergence(model, dense, without(model, block, few, weight, half), known=known)
                        whole = sum(trace[:half_of(len(trace))])
                        increases[weight.name], prices[weight.name] = trace, lost / whole if whole else 0.0
            activations.hidden, activations.calls, activations.scales = after.hidden, after.calls, []
            calibrate.replay(block.module, few, block.number)
    floor = SMALLEST * sum(prices.values()) / max(len(prices), 1)
    return increases, {name: max(price, floor) for name, price in prices.items()}


@torch.no_grad()
def standardised(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: Options,
                 budget: Budget) -> dict[str, list[float]]:
    """FLAP's costs, as `spread` takes them: {consumer: the mean score of each chunk of its units, ascending}.

    Scores (solvers/flap.py) on the dense model's inputs, over each layer's columns brought to mean 0 and standard
    deviation 1; a KV group's is the mean over its columns.
    """
    found = {}
    there = layers(model, budget)
    for _, weights, statistics in dense_pass(model, ids, mask, flap.needs, options):
        for weight in weights:
            if weight.name in there and weight.name in statistics:
                width, _ = there[weight.name]
                score = flap.scores(weight.get(), statistics[weight.name], width.size).sum(0)
                each = ((score - score.mean()) / score.std()).view(-1, width.size).mean(1).sort().values
                chunk = step(width, budget)
                most = (width.count - 1) // chunk
                found[weight.name] = each[:most * chunk].view(most, chunk).mean(1).tolist()
    return found


def kinds(model: nn.Module, budget: Budget) -> set[str]:
    """The kinds of units of which a cut may leave other numbers in each layer."""
    return {groups.NEURONS, groups.HEADS} & set(every_kind(model)) - budget.without


def without(model: nn.Module, block: Block, before: Activations, weight: Weight, changed: torch.Tensor) -> Activations:
    """Activations at a resident block, run through it with one weight changed and through all later ones."""
    after, kept = before.fork(), weight.get().clone()
    try:
        weight.set(changed, rounds=False)
        calibrate.replay(block.module, after, block.number)
    finally:
        weight.set(kept, rounds=False)
    return depth.through(model, after, block.number + 1, ())


def curve(W: torch.Tensor, statistics: Statistics, width: Width, budget: Budget) -> tuple[list[float], torch.Tensor]:
    """(the increase of one layer's error with each chunk of its units that goes, its weight (R, C) without half of
    these chunks, the rest at its least-squares values)."""
    V, dead, _ = upper_factor(statistics, 0.01, W.dtype)
    P, chunk = obs.inverse(V), step(width, budget)
    most, trace = (width.count - max(1, width.count // LEAST)) // chunk, []
    for gone, increases in ((most, trace), (half_of(most), None)):
        left = W.masked_fill(dead, 0)
        if gone:
            obs.remove(left, P.clone(), Columns(width.count - gone * chunk, width.count, width.size), chunk, increases)
    return trace, left


def half_of(chunks: int) -> int:
    """How many of the chunks that may go are gone where the price is measured: half, but one at least."""
    return (chunks + 1) // 2


def step(width: Width, budget: Budget) -> int:
    """How many units of a layer go at once."""
    return budget.step(width.count) if width.kind == groups.NEURONS else 1


def by_price(model: nn.Module, budget: Budget, increases: Mapping[str, list[float]],
             prices: Mapping[str, float]) -> dict[str, list[float]]:
    """{consumer: what each chunk of its units that goes costs the model, nats per parameter}, as `spread` takes it.

    increases, prices: what `curves` gave.
    """
    return {name: [prices[name] * increase / size for increase in increases[name]]
            for name, (_, size) in layers(model, budget).items() if name in increases}


def layers(model: nn.Module, budget: Budget) -> dict[str, tuple[Width, int]]:
    """{consumer: (its units, how many parameters go with a chunk of them)}, of the kinds that may differ by layer."""
    allowed = kinds(model, budget)
    return {f"{b.name}.{w.consumer}": (w, step(w, budget) * unit_size(w, {v.linear: v for v in b.weights}, b.module))
            for b in models.walk(model) for w in groups.widths(b.module) if w.kind in allowed}


def spread(model: nn.Module, budget: Budget, cut: Cut, costs: Mapping[str, list[float]],
           free: Collection[str]) -> Cut | None:
    """The cut with its blocks, its units of other kinds, and those of the kinds `free` by layer, which leaves at most
    as many parameters as the budget's target says; None where none does.

    costs: {consumer: the cost of each chunk of its units that goes, in order}, comparable between layers. The cheapest
    chunk of all layers goes first; none counts as cheaper than the one before it, without which it cannot go. Where a
    cut has fewer query heads, its attentions keep all KV groups.
    """
    free = set(free) - ({groups.HEADS} if groups.QUERIES in dict(cut.kept) else set())
    gone = {b.name for b in models.walk(model) if b.number in cut.dropped}
    there = {name: own for name, own in layers(model, budget).items()
             if own[0].kind in free and name in costs.keys() - dict(budget.own).keys()
             and not any(name.startswith(f"{block}.") for block in gone)}
    left = {name: width.count for name, (width, _) in there.items()}
    kept = tuple((kind, n) for kind, n in cut.kept if kind not in free)
    queue = [(costs[name][0], name, 0) for name in there if costs[name]]
    heapq.heapify(queue)

    def now() -> Cut:
        return Cut(cut.dropped, kept, tuple(sorted((left | dict(budget.own)).items())))
    many = parameters(model, now())
    while many > budget.target:
        if not queue:
            return None
        cost, name, place = heapq.heappop(queue)
        width, size = there[name]
        left[name], many = left[name] - step(width, budget), many - size
        if place + 1 < len(costs[name]):
            heapq.heappush(queue, (max(cost, costs[name][place + 1]), name, place + 1))
    return now()
