"""Collect the statistics of a block's linears, by hooks, while the block runs once on its activations.

It may be run several times: one stage after the other (true-sequential), or as many linears as a budget of bytes holds.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models import Weight
from .activations import Activations, forward
from .statistics import Statistics


@dataclass(frozen=True)
class Limits:
    """What one pass may collect.

    budget: bytes of Gram matrices; None: all. one_stage: only what is fed in the same stage of the block as the first
    linear (q, k, v; then o; then gate, up; then down).
    """

    budget: int | None = None
    one_stage: bool = False


@torch.no_grad()
def collect(block: nn.Module, activations: Activations, b: int, weights: Sequence[Weight], needs: Iterable[str], *,
            limits: Limits | None = None, dense: tuple[nn.Module, Activations] | None = None
            ) -> tuple[dict[str, Statistics], list[Weight], torch.Tensor | None]:
    """Run block b once: ({weight's name: Statistics}, weights that were deferred, the block's first output).

    Linears fed by the same tensor share one Statistics. What goes beyond the limits is deferred: call again with it.
    Weights that are neither deferred nor among the statistics saw no token (an idle expert).

    dense: (the block as it was, the dense model's activations), for statistics that compare the two. A linear that only
    some tokens reach (an expert) has none of `cross`: other tokens reach it in the dense model.
    """
    collector = Collector(weights, frozenset(needs), activations.device, limits or Limits())
    first = None
    with collector.watching():
        for i in range(len(activations)):
            collector.start(activations.rows[i], activations.inputs[i]["input_ids"].numel(),
                            inputs_of(weights, *dense, b, i) if dense else None)
            out = forward(block, activations, b, i)
            first = out if first is None else first
    return collector.statistics, [w for w in weights if w.name in collector.deferred], first


def inputs_of(weights: Sequence[Weight], block: nn.Module, activations: Activations, b: int,
              i: int) -> dict[str, torch.Tensor]:
    """{weight's name: its linear's input} as batch i passes through `block`, a copy of the one that holds `weights`.

    Without fused experts, and without linears that the block does not call on this batch.
    """
    modules, seen = dict(block.named_modules()), {}
    handles = [modules[w.linear].register_forward_pre_hook(lambda _, args, name=w.name: seen.update({name: args[0]}))
               for w in weights if w.expert is None]
    try:
        forward(block, activations, b, i)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Collector:
    """Gathers statistics by hooks on the linears; see `collect`."""

    def __init__(self, weights: Sequence[Weight], needs: frozenset[str], device: torch.device, limits: Limits):
        self.weights, self.needs, self.device, self.limits = weights, needs, device, limits
        self.stage: str | None = None  # kind of the linear that was fed first
        self.spent = 0  # bytes of Gram matrices
        self.statistics: dict[str, Statistics] = {}
        self.deferred: set[str] = set()
        self.leader: dict[str, str] = {}  # linear: the first one fed by the same tensor

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the linears while this lasts."""
        handles = []
        fused = {(id(w.owner), w.kind.rsplit(".", 1)[-1], w.expert): w for w in self.weights if w.expert is not None}
        owners = {id(w.owner): w.owner for w in self.weights if w.expert is not None}
        for weight in self.weights:
            if weight.expert is None:
                handles.append(weight.owner.register_forward_pre_hook(
                    lambda _, args, weight=weight: self.see(weight, args[0])))
        for key, owner in owners.items():
            def observe(name, e, x, rows, key=key):
                if (key, name, e) in fused:
                    self.see(fused[key, name, e], x, rows)
            owner.observe = observe
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner in owners.values():
                del owner.observe
            self.start(None, 0)

    def start(self, rows: torch.Tensor | None, tokens: int, dense: dict[str, torch.Tensor] | None = None) -> None:
        """A new batch begins: `rows` marks its real tokens among `tokens`. dense: the linears' inputs in the dense
        model, by name."""
        self.rows, self.tokens, self.fed, self.dense = rows, tokens, {}, dense

    def see(self, weight: Weight, x: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """The linear of `weight` is about to be fed x (..., C); `index`: which of the batch's tokens x holds."""
        if not x.numel():  # an idle expert; all empty tensors share one address
            return
        key = (x.data_ptr(), x.shape, x.stride())
        first, _ = self.fed.setdefault(key, (weight.name, x))  # holding x keeps its address from being used again
        leader = self.leader.setdefault(weight.name, first)
        if leader != weight.name:
            if leader in self.deferred:
                self.deferred.add(weight.name)
            elif leader in self.statistics:
                self.statistics[weight.name] = self.statistics[leader]
            return
        if weight.name not in self.statistics and not self.admit(weight, x.shape[-1]):
            self.deferred.add(weight.name)
        if weight.name not in self.deferred:
            statistics = self.statistics[weight.name]
            if statistics.cross is not None and not self.comparable(weight, x):
                statistics.cross = None
            other = self.real(weight, self.dense[weight.name], index) if statistics.cross is not None else None
            statistics.update(self.real(weight, x, index), other)

    def comparable(self, weight: Weight, x: torch.Tensor) -> bool:
        """Whether x (..., C) holds every token of the batch, as the linear's input in the dense model does."""
        dense = self.dense.get(weight.name)
        return dense is not None and dense.shape == x.shape and x.shape[:-1].numel() >= self.tokens

    def admit(self, weight: Weight, C: int) -> bool:
        """Begin Statistics for a weight if the budget and the stage allow."""
        if weight.name in self.deferred:
            return False
        needs = self.needs if weight.expert is None else self.needs - {"cross"}
        cost = 4 * C * C * len(needs & {"outer", "cross"})
        self.stage = self.stage or weight.kind
        limits, whole = self.limits, self.spent + cost
        if (limits.one_stage and weight.kind != self.stage) or \
                (limits.budget is not None and self.spent and whole > limits.budget):
            return False
        self.spent += cost
        self.statistics[weight.name] = Statistics(C, needs, self.device)
        return True

    def real(self, weight: Weight, x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Rows of x that are no padding, (tokens, C)."""
        x = x.reshape(-1, x.shape[-1])
        if self.rows is None:
            return x
        rows = self.rows if index is None else self.rows[index]
        if len(rows) != len(x):
            raise ValueError(f"{weight.name} is fed {len(x)} rows for {len(rows)} tokens, so padding cannot be told "
                             "from text; use --documents join")
        return x[rows]
