"""Spread: widths that differ by layer, so that the next neurons to go cost every layer the same.

    Δ_l(k)   exact increase of layer l's error when its k cheapest neurons are gone (solvers/obs.py), on the dense
             model's inputs, tokens weighted by 1 / the squared norm of the dense block's output, as an error matters
             in proportion to the hidden state that it is added to

Of all layers' next chunks of neurons, the one with the least increase goes, until the cut fits. Every layer keeps at
least a quarter of its neurons.
"""

import heapq
from collections.abc import Mapping

import torch
from torch import nn

from .. import calibrate, models
from ..models import groups
from ..prune import loop
from ..prune.linalg import upper_factor
from ..prune.options import Options
from ..prune.patterns import Columns
from ..prune.solvers import obs
from ..runtime import products
from .budget import Budget
from .cut import Cut

LEAST = 4  # a layer keeps one in so many of its neurons


@torch.no_grad()
def curves(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: Options, cut: Cut,
           budget: Budget) -> dict[str, list[float]]:
    """{consumer of neurons: the increase of its error with each chunk that goes}, of the blocks that a cut leaves."""
    found: dict[str, list[float]] = {}
    with models.experts_one_by_one(model), products.float32(options.tf32):
        activations = loop.start(model, ids, mask, options)
        for block in models.walk(model, options.device):
            after = activations.fork()
            calibrate.replay(block.module, after, block.number)
            names = {w.consumer for w in groups.widths(block.module) if w.kind == groups.NEURONS}
            weights = [w for w in block.weights if w.linear in names]
            if block.number not in cut.dropped and weights:
                activations.scales = [1 / h.float().norm(dim=-1).flatten().clamp_min(1e-30) for h in after.hidden]
                statistics, _, _ = calibrate.collect(block.module, activations, block.number, weights, {"outer"})
                for weight in weights:
                    if weight.name in statistics:
                        found[weight.name] = curve(weight.get(), statistics[weight.name], budget)
            activations.hidden, activations.calls, activations.scales = after.hidden, after.calls, []
    return found


def curve(W: torch.Tensor, statistics: calibrate.Statistics, budget: Budget) -> list[float]:
    """The increase of one layer's error with each chunk of its neurons that goes."""
    V, dead, _ = upper_factor(statistics, 0.01, W.dtype)
    count, chunk = W.shape[1], budget.step(W.shape[1])
    gone = (count - count // LEAST) // chunk
    if not gone:
        return []
    trace: list[float] = []
    obs.remove(W.masked_fill(dead, 0).clone(), obs.inverse(V), Columns(count - gone * chunk, count), 1 / gone, trace)
    return trace


def spread(model: nn.Module, budget: Budget, cut: Cut, increases: Mapping[str, list[float]]) -> Cut | None:
    """The cut with its blocks and KV groups, and neurons by layer, that fits; None if there is none.

    increases: what `curves` gave.
    """
    widths = {f"{b.name}.{w.consumer}": w for b in models.walk(model) for w in groups.widths(b.module)}
    heads = tuple((kind, left) for kind, left in cut.kept if kind != groups.NEURONS)
    left = {name: widths[name].count for name in increases}
    # a chunk never looks cheaper than the one before it: the solver took them in order
    queue = [(own[0], name, 0) for name, own in increases.items() if own]
    heapq.heapify(queue)

    def now() -> Cut:
        return Cut(cut.dropped, heads, tuple(sorted(left.items())))
    while not budget.fits(now()):
        if not queue:
            return None
        value, name, place = heapq.heappop(queue)
        left[name] -= budget.step(widths[name].count)
        if place + 1 < len(increases[name]):
            heapq.heappush(queue, (max(value, increases[name][place + 1]), name, place + 1))
    return now()
