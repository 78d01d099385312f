"""Search: prune a model by several cuts in turn, and choose the one with the least KL on held-out windows.

At the end the model is as it was: only consumers change (fold is the only healing method that runs here), and they get
their dense weights back.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import models
from ..models import groups
from ..prune import loop
from ..prune.job import Job, Result
from .budget import Mixtures
from .cut import Cut, patterns
from .depth import divergence

Known = Callable[[str, Callable[[], Any]], Any]
"""known(key, look): what was found under a key, plain values, where a search that was killed noted it, else look()."""


def anew(_: str, look: Callable[[], Any]) -> Any:
    """The Known of a search of which nothing is kept."""
    return look()


def job_for(job: Job, model: nn.Module, cut: Cut) -> Job:
    """The job that does a cut, made from one that says how."""
    for healer in job.healers:
        healer.skips, healer.columns = frozenset(cut.dropped), True
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


def known_kl(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor | None, Known], job: Job, cut: Cut) -> float:
    """`measured`, unless it is known. given: ids, mask, and what is known already."""
    ids, mask, noted = given
    return noted(f"kl of {json.dumps(cut.plain())}", lambda: measured(model, ids, mask, job, cut))


def of_result(model: nn.Module, result: Result) -> float:
    """KL(dense ‖ cut) on the held-out windows of a walk that has just ended."""
    held = [i for i, apart in enumerate(result.dense.held) if apart]
    return divergence(model, result.dense, result.pruned, held or None)


def best(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor | None, Known], job: Job, mixtures: Mixtures,
         tries: int, progress: bool = False) -> tuple[Cut, list[dict]]:
    """(the best cut found, a row of the record for each that was tried, in order).

    First neurons alone, blocks alone, and half of either; at the best depth, fewer KV groups; then from the best of all
    one step at a time in depth. Each is walked once, `tries` at most. given: ids, mask, and what is known already.

    Raises ValueError naming `--shrink` if no cut is small enough.
    """
    known: dict[tuple[int, int], tuple[float, Cut]] = {}
    rows: list[dict] = []
    bar = tqdm(total=tries, desc="mixtures", unit="walk", disable=not progress, leave=False)

    def look(depth: int, heads: int) -> None:
        cut = mixtures.at(depth, heads)
        if cut is None or (depth, heads) in known or len(known) >= tries:
            return
        kl = known_kl(model, given, job, cut) if tries > 1 else 0.0
        known[depth, heads] = kl, cut
        rows.append(cut.plain() | ({"kl": kl} if tries > 1 else {}))
        bar.update()

    def least() -> tuple[int, int]:
        return min(known, key=lambda place: (known[place][0], place))

    with bar:
        for depth in dict.fromkeys((0, mixtures.most, mixtures.most // 2)):
            look(depth, 0)
        for depth in range(mixtures.most + 1) if not known else ():  # nothing fits without fewer KV groups
            for heads in range(len(mixtures.heads)):
                look(depth, heads)
        if not known:
            raise ValueError("--shrink: leaves less than one unit in every layer; give a larger share")
        for heads in range(1, len(mixtures.heads)):
            look(least()[0], heads)
        before = -1
        while len(known) > before:
            before, (depth, heads) = len(known), least()
            look(depth - 1, heads)
            look(depth + 1, heads)
    return known[least()][1], rows
