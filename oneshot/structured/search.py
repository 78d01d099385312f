"""Search: do several cuts to a model one after the other, and choose the one of least KL on held-out windows.

The model is as it was at the end: only consumers change in a walk (no healing method but fold runs here), and they are
put back.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from .. import models
from ..models import groups
from ..prune import loop
from ..prune.job import Job, Result
from .cut import Cut, patterns
from .depth import divergence


def job_for(job: Job, model: nn.Module, cut: Cut) -> Job:
    """The job that does a cut, made from one that says how."""
    for healer in job.healers:
        healer.skips = frozenset(cut.dropped)
    return replace(job, plan=patterns(model, cut), dropped=frozenset(cut.dropped), staged=True)


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Within the context consumers may change; afterwards their weights and biases are what they were."""
    kept = []
    for block in models.walk(model):
        own = {w.linear: w for w in block.weights}
        for width in groups.widths(block.module):
            weight = own[width.consumer]
            bias = getattr(weight.owner, "bias", None) if weight.expert is None else None
            kept.append((weight, weight.get().to(weight.stored, copy=True), bias,
                         None if bias is None else bias.data.clone()))
    try:
        yield
    finally:
        for weight, W, bias, values in kept:
            weight.set(W.float() if W.dtype != torch.float64 else W)
            if weight.expert is None:
                weight.owner.bias = bias
            if bias is not None:
                bias.data.copy_(values)


def measured(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, job: Job, cut: Cut) -> float:
    """KL(dense ‖ cut) on the held-out windows (on all, if none are), nats per token, after the whole cut."""
    with put_back(model):
        result = loop.prune_model(model, ids, mask, job_for(job, model, cut))
        return of_result(model, result)


def of_result(model: nn.Module, result: Result) -> float:
    """KL(dense ‖ cut) on the held-out windows of a walk that has just ended."""
    held = [i for i, apart in enumerate(result.dense.held) if apart]
    return divergence(model, result.dense, result.pruned, held or None)


def best(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, job: Job, cuts: Sequence[Cut],
         progress: bool = False) -> tuple[Cut, list[dict]]:
    """(the best of the cuts, a row of the record for each)."""
    if len(cuts) == 1:
        return cuts[0], [cuts[0].plain()]
    rows = []
    for cut in tqdm(cuts, desc="mixtures", unit="walk", disable=not progress, leave=False):
        rows.append(cut.plain() | {"kl": measured(model, ids, mask, job, cut)})
    place = min(range(len(cuts)), key=lambda i: rows[i]["kl"])
    return cuts[place], rows
