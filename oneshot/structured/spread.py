"""Spread: widths that differ by layer, so that the next neurons to go cost the model the same in every layer.

    Δ_l(k)   exact increase of layer l's error when its k cheapest neurons are gone (solvers/obs.py), on the dense
             model's inputs, tokens weighted by 1 / the squared norm of the dense block's output
    π_l      price: KL(dense ‖ cut), nats per token, when half of the neurons that may go are gone in this block alone,
             measured through all blocks behind it, over the block's Δ there

Of all layers' next chunks of neurons, the one with the least π_l · increase goes, until the cut fits. Every layer keeps
at least a quarter of its neurons. Without prices SmolLM2's last blocks lose most, though the same error costs the model
several times as much there as in the middle (results/LOG.md).
"""

import heapq
from collections.abc import Mapping

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations, Statistics
from ..models import Block, Weight, groups
from ..prune import loop
from ..prune.linalg import upper_factor
from ..prune.options import Options
from ..prune.patterns import Columns
from ..prune.solvers import obs
from ..runtime import products
from . import depth
from .budget import Budget
from .cut import Cut

LEAST = 4  # a layer keeps one in so many of its neurons
TOKENS = 4096  # on which prices are measured, and one window at least
SMALLEST = 0.01  # of the mean price: a measured one can be zero, or by rounding below it


@torch.no_grad()
def curves(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: Options, cut: Cut,
           budget: Budget) -> tuple[dict[str, list[float]], dict[str, float]]:
    """({consumer of neurons: the increase of its error with each chunk that goes}, {consumer: its price}).

    Of the blocks that a cut leaves. ids, mask: the calibration windows (n, T).
    """
    increases: dict[str, list[float]] = {}
    prices: dict[str, float] = {}
    windows = max(1, TOKENS // ids.shape[1])
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
            names = {w.consumer for w in groups.widths(block.module) if w.kind == groups.NEURONS}
            weights = [w for w in block.weights if w.linear in names]
            if block.number not in cut.dropped and weights:
                activations.scales = [1 / h.float().norm(dim=-1).flatten().clamp_min(1e-30) for h in after.hidden]
                statistics, _, _ = calibrate.collect(block.module, activations, block.number, weights, {"outer"})
                found = [(w, *curve(w.get(), statistics[w.name], budget)) for w in weights if w.name in statistics]
                half = [(weight, W) for weight, _, W in found]
                lost = depth.divergence(model, dense, without(model, block, few, half), known=known)
                whole = sum(sum(own[:len(own) // 2]) for _, own, _ in found)
                increases |= {weight.name: own for weight, own, _ in found}
                prices |= {weight.name: lost / whole if whole else 0.0 for weight, _, _ in found}
            activations.hidden, activations.calls, activations.scales = after.hidden, after.calls, []
            calibrate.replay(block.module, few, block.number)
    floor = SMALLEST * sum(prices.values()) / max(len(prices), 1)
    return increases, {name: max(price, floor) for name, price in prices.items()}


def without(model: nn.Module, block: Block, before: Activations,
            changed: list[tuple[Weight, torch.Tensor]]) -> Activations:
    """Activations at a resident block, run through it with changed weights and through all later ones as they are."""
    after, kept = before.fork(), [(weight, weight.get().clone()) for weight, _ in changed]
    try:
        for weight, W in changed:
            weight.set(W, rounds=False)
        calibrate.replay(block.module, after, block.number)
    finally:
        for weight, W in kept:
            weight.set(W, rounds=False)
    return depth.through(model, after, block.number + 1, ())


def curve(W: torch.Tensor, statistics: Statistics, budget: Budget) -> tuple[list[float], torch.Tensor]:
    """(the increase of one layer's error with each chunk of its neurons that goes, its weight (R, C) without half of
    these chunks, the rest at its least-squares values)."""
    V, dead, _ = upper_factor(statistics, 0.01, W.dtype)
    P, count, chunk = obs.inverse(V), W.shape[1], budget.step(W.shape[1])
    most, trace = (count - count // LEAST) // chunk, []
    for gone, increases in ((most, trace), (most // 2, None)):
        left = W.masked_fill(dead, 0)
        if gone:
            obs.remove(left, P.clone(), Columns(count - gone * chunk, count), chunk, increases)
    return trace, left


def spread(model: nn.Module, budget: Budget, cut: Cut, increases: Mapping[str, list[float]],
           prices: Mapping[str, float]) -> Cut | None:
    """The cut with its blocks and KV groups, and neurons by layer, that fits; None if there is none.

    increases, prices: what `curves` gave.
    """
    widths = {f"{b.name}.{w.consumer}": w for b in models.walk(model) for w in groups.widths(b.module)}
    heads = tuple((kind, left) for kind, left in cut.kept if kind != groups.NEURONS)
    left = {name: widths[name].count for name in increases}
    # a chunk never looks cheaper than the one before it: the solver took them in order
    queue = [(prices[name] * own[0], name, 0) for name, own in increases.items() if own]
    heapq.heapify(queue)

    def now() -> Cut:
        return Cut(cut.dropped, heads, tuple(sorted(left.items())))
    while not budget.fits(now()):
        if not queue:
            return None
        value, name, place = heapq.heappop(queue)
        left[name] -= budget.step(widths[name].count)
        if place + 1 < len(increases[name]):
            heapq.heappush(queue, (max(value, prices[name] * increases[name][place + 1]), name, place + 1))
    return now()
