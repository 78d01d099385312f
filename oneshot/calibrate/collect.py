"""Collect the statistics of a block's linears by hooks, in one forward pass of the block over its activations.

There can be several passes per block: one per stage of the block (`--true-sequential`), or as many as it takes when the
Gram matrices of all linears exceed a memory budget.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import Weight
from ..runtime import distributed
from .activations import Activations, forward
from .statistics import Statistics


@dataclass(frozen=True)
class Limits:
    """What one pass may collect.

    budget: bytes of Gram matrices; None: no limit. With several processes, which must agree on what fits, linears with
    the same input count one by one. one_stage: only linears in the same stage of the block as the first
    one that runs (q, k, v; then o; then gate, up; then down).
    """

    budget: int | None = None
    one_stage: bool = False


@torch.no_grad()
def collect(block: nn.Module, activations: Activations, b: int, weights: Sequence[Weight], needs: Iterable[str], *,
            limits: Limits | None = None, dense: tuple[nn.Module, Activations] | None = None
            ) -> tuple[dict[str, Statistics], list[Weight], torch.Tensor | None]:
    """Run block b once: ({weight's name: Statistics}, deferred weights, the block's output on the first batch).

    needs: names of the sums to collect, see statistics.py. Linears with the same input tensor share one Statistics.
    Weights beyond `limits` are deferred: call again with them. A weight that is neither deferred nor among the
    statistics saw no token (an idle expert).

    dense: (the dense block, the dense model's activations), needed for `cross`. A linear that only some of the tokens
    reach (an expert) gets no `cross`, because in the dense model other tokens reach it.

    Raises ValueError naming a linear whose inputs do not match the padding mask.
    """
    collector = Collector(weights, frozenset(needs), activations.device, limits or Limits())
    first = None
    with collector.watching():
        for i in range(len(activations)):
            collector.start(activations.rows[i], activations.inputs[i]["input_ids"].numel(),
                            inputs_of(weights, *dense, b, i) if dense else None)
            collector.held = bool(activations.held and activations.held[i])
            collector.scale = activations.scales[i] if activations.scales else None
            with contextlib.suppress(Enough):
                out = forward(block, activations, b, i)
                first = out if first is None else first
    return collector.statistics, [w for w in weights if w.name in collector.deferred], first


def inputs_of(weights: Sequence[Weight], block: nn.Module, activations: Activations, b: int,
              i: int) -> dict[str, torch.Tensor]:
    """{weight's name: its linear's input (..., C)} on batch i of `block`, a copy of the block that holds `weights`.

    Fused experts, and linears that the block does not call on this batch, are missing.
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


class Enough(BaseException):
    """Ends a forward pass of a block once all its linears have been seen; no Exception, which becomes a message."""


def needs_of(weight: Weight, needs: frozenset[str]) -> frozenset[str]:
    """The sums to keep of one linear's input."""
    return needs if weight.expert is None else needs - {"cross"}


def gram_bytes(weight: Weight, needs: frozenset[str], C: int) -> int:
    """Bytes of the Gram matrices of one linear's input (..., C)."""
    return 4 * C * C * len(needs_of(weight, needs) & {"outer", "cross", "held"})


def affordable(weights: Sequence[Weight], needs: frozenset[str], limits: Limits) -> set[str]:
    """Names of the first weights, of each stage if there is one stage a pass, whose Gram matrices fit the budget."""
    spent: dict[str, int] = {}
    names = set()
    for weight in weights:
        stage = weight.kind if limits.one_stage else ""
        whole = spent.get(stage, 0) + gram_bytes(weight, needs, weight.shape[1])
        if not spent.get(stage) or whole <= limits.budget:
            spent[stage] = whole
            names.add(weight.name)
    return names


class Collector:
    """Collects statistics by hooks on the linears; see `collect`.

    After the first batch, of which the block's output is wanted, passes end with the last linear's input: what follows,
    such as down_proj itself, would be computed for nothing. With experts they do not, as each batch reaches others.
    """

    def __init__(self, weights: Sequence[Weight], needs: frozenset[str], device: torch.device,
                 limits: Limits) -> None:
        self.weights, self.needs, self.device, self.limits = weights, needs, device, limits
        shares = distributed.ranks() > 1 and limits.budget is not None
        self.allowed = affordable(weights, needs, limits) if shares else None  # names of weights
        self.stage: str | None = None  # kind of the linear that ran first
        self.spent = 0  # bytes of Gram matrices
        self.statistics: dict[str, Statistics] = {}
        self.deferred: set[str] = set()
        self.held = False  # whether the batch is held out
        self.scale: torch.Tensor | None = None  # (tokens,) by which the batch's inputs are multiplied
        self.leader: dict[str, str] = {}  # {linear: the first linear with the same input tensor}
        self.calls: list[str] = []  # the linears that this batch has reached
        self.whole: list[str] | None = None  # all that the first batch reached

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, the linears' inputs are observed."""
        handles = []
        fused = {(id(w.owner), w.kind.rsplit(".", 1)[-1], w.expert): w for w in self.weights if w.expert is not None}
        owners = {id(w.owner): w.owner for w in self.weights if w.expert is not None}
        for weight in self.weights:
            if weight.expert is None:
                handles.append(weight.owner.register_forward_pre_hook(
                    lambda _, args, weight=weight: self.pass_by(weight, args[0])))
        for key, owner in owners.items():
            def observe(name: str, e: int, x: torch.Tensor, rows: torch.Tensor, key: Any = key) -> None:
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
        """Begin a new batch of `tokens` tokens.

        rows: bool (tokens,), False at padding, or None. dense: {linear: its input in the dense model}.
        """
        if self.calls and self.whole is None and all(w.expert is None for w in self.weights):
            self.whole = self.calls
        self.rows, self.tokens, self.fed, self.dense, self.calls = rows, tokens, {}, dense, []

    def pass_by(self, weight: Weight, x: torch.Tensor) -> None:
        """Take in a linear's input; raise Enough at the last one."""
        self.see(weight, x)
        self.calls.append(weight.name)
        if self.calls == self.whole:
            raise Enough

    def see(self, weight: Weight, x: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Take in x (..., C), the input of a linear. index: which of the batch's tokens x holds; None: all of them."""
        if not x.numel():  # an idle expert; all empty tensors share one address
            return
        key = (x.data_ptr(), x.shape, x.stride())
        first, _ = self.fed.setdefault(key, (weight.name, x))  # keeping x alive keeps its address from being reused
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
            statistics.update(self.real(weight, x, index), other, self.held)

    def comparable(self, weight: Weight, x: torch.Tensor) -> bool:
        """Whether x (..., C) and the linear's input in the dense model both hold every token of the batch."""
        dense = self.dense.get(weight.name)
        return dense is not None and dense.shape == x.shape and x.shape[:-1].numel() >= self.tokens

    def admit(self, weight: Weight, C: int) -> bool:
        """Start Statistics of C inputs for a weight, if budget and stage allow; whether they do."""
        if weight.name in self.deferred:
            return False
        needs, cost = needs_of(weight, self.needs), gram_bytes(weight, self.needs, C)
        self.stage = self.stage or weight.kind
        limits, whole = self.limits, self.spent + cost
        full = limits.budget is not None and self.spent and whole > limits.budget
        if (limits.one_stage and weight.kind != self.stage) or \
                (full if self.allowed is None else weight.name not in self.allowed):
            return False
        self.spent += cost
        self.statistics[weight.name] = Statistics(C, needs, self.device)
        return True

    def real(self, weight: Weight, x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """The rows of x that are not padding, (tokens, C), each times its token's scale if there is one."""
        x = x.reshape(-1, x.shape[-1])
        if self.scale is not None:
            scale = self.scale if index is None else self.scale[index]
            x = x * scale.to(x).unsqueeze(1) if len(scale) == len(x) else x
        if self.rows is None:
            return x
        rows = self.rows if index is None else self.rows[index]
        if len(rows) != len(x):
            raise ValueError(f"{weight.name}: gets {len(x)} input rows for {len(rows)} tokens, so padding cannot be "
                             "told from text; use --documents join")
        return x[rows]
