"""Collect the Moments of a block's linears, by hooks, while the block runs once on a captured stream (capture.py).

It may be run several times: one stage after the other (true-sequential), or as many linears as a budget of bytes holds.
"""

import contextlib

import torch

from . import capture
from .moments import Moments


@torch.no_grad()
def collect(block, stream, b, views, needs, *, budget=None, one_stage=False, dense=None):
    """Run block b once and gather the Moments of `views`: ({name: Moments}, deferred views, first output).

    Linears fed by the same tensor share one Moments. What does not fit into `budget` bytes of Gram matrices, and with
    `one_stage` all that is fed later than the first linear, is deferred: call again with it. Views whose Moments are
    missing and which are not deferred saw no token (an idle expert).

    dense: (the block as it was, the dense model's stream), for Moments that compare the two. A linear that only some
    tokens reach (an expert) has none of `cross`: other tokens reach it in the dense model.
    """
    collector = Collector(views, needs, stream, budget, one_stage)
    first = None
    with collector.watching():
        for i in range(len(stream)):
            collector.start(stream.rows[i], stream.inputs[i]["input_ids"].numel(),
                            inputs_of(views, *dense, b, i) if dense else None)
            out = capture.forward(block, stream, b, i)
            first = out if first is None else first
    return collector.moments, [v for v in views if v.name in collector.deferred], first


def inputs_of(views, block, stream, b, i):
    """{view name: its linear's input} as batch i passes through `block`, a copy of the one that `views` look at.

    Without fused experts, and without linears that the block does not call on this batch.
    """
    modules, seen = dict(block.named_modules()), {}
    handles = [modules[v.name].register_forward_pre_hook(lambda _, args, name=v.name: seen.update({name: args[0]}))
               for v in views if v.expert is None]
    try:
        capture.forward(block, stream, b, i)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Collector:
    """Gathers Moments by hooks on the linears; see `collect`."""

    def __init__(self, views, needs, stream, budget, one_stage):
        self.views, self.needs, self.device = views, needs, stream.device
        self.budget, self.one_stage, self.stage, self.spent = budget, one_stage, None, 0
        self.moments, self.deferred, self.leader = {}, set(), {}

    @contextlib.contextmanager
    def watching(self):
        handles = []
        fused = {(id(v.owner), v.kind.rsplit(".", 1)[-1], v.expert): v for v in self.views if v.expert is not None}
        owners = {id(v.owner): v.owner for v in self.views if v.expert is not None}
        for view in self.views:
            if view.expert is None:
                handles.append(view.owner.register_forward_pre_hook(
                    lambda _, args, view=view: self.see(view, args[0])))
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

    def start(self, rows, tokens, dense=None):
        """A new batch begins: `rows` marks its real tokens among `tokens`. dense: the linears' inputs in the dense
        model, by name."""
        self.rows, self.tokens, self.fed, self.dense = rows, tokens, {}, dense

    def see(self, view, x, index=None):
        """The linear of `view` is about to be fed x (..., C); `index`: which of the batch's tokens x holds."""
        if not x.numel():  # an idle expert; all empty tensors share one address
            return
        key = (x.data_ptr(), x.shape, x.stride())
        first, _ = self.fed.setdefault(key, (view.name, x))  # holding x keeps its address from being used again
        leader = self.leader.setdefault(view.name, first)
        if leader != view.name:
            if leader in self.deferred:
                self.deferred.add(view.name)
            elif leader in self.moments:
                self.moments[view.name] = self.moments[leader]
            return
        if view.name not in self.moments and not self.admit(view, x.shape[-1]):
            self.deferred.add(view.name)
        if view.name not in self.deferred:
            moments = self.moments[view.name]
            if moments.cross is not None and not self.comparable(view, x):
                moments.cross = None
            other = self.real(view, self.dense[view.name], index) if moments.cross is not None else None
            moments.update(self.real(view, x, index), other)

    def comparable(self, view, x):
        """Whether x (..., C) holds every token of the batch, as the linear's input in the dense model does."""
        dense = self.dense.get(view.name)
        return dense is not None and dense.shape == x.shape and x.shape[:-1].numel() >= self.tokens

    def admit(self, view, C):
        """Begin Moments for a view if the budget and the stage allow."""
        if view.name in self.deferred:
            return False
        needs = self.needs if view.expert is None else self.needs - {"cross"}
        cost = 4 * C * C * len(needs & {"outer", "cross"})
        self.stage = self.stage or view.kind
        if (self.one_stage and view.kind != self.stage) or \
                (self.budget is not None and self.spent and self.spent + cost > self.budget):
            return False
        self.spent += cost
        self.moments[view.name] = Moments(C, needs, self.device)
        return True

    def real(self, view, x, index):
        """Rows of x that are no padding, (tokens, C)."""
        x = x.reshape(-1, x.shape[-1])
        if self.rows is None:
            return x
        rows = self.rows if index is None else self.rows[index]
        if len(rows) != len(x):
            raise ValueError(f"{view.name} is fed {len(x)} rows for {len(rows)} tokens, so padding cannot be told from "
                             "text; use --documents join")
        return x[rows]
