"""Depth: in which order blocks can go, by how much each changes the hidden state, or by the true loss.

    influence   1 - E[cos(x, block(x))], ShortGPT's block influence (arXiv 2403.03853), on the dense model
    kl          KL(dense ‖ cut) of the logits without the block, measured anew after each that goes; before that, the
                candidates are the AMONG blocks of least influence on the cut model's own hidden states

The hidden states before every block of the cut model are kept, so a candidate costs a run through the blocks after it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations

ORDERS = ("kl", "influence")
AMONG = 6
KEPT = 2**28  # numbers of the dense model's log-probabilities that are kept


@torch.no_grad()
def teacher(model: nn.Module, dense: Activations) -> list[list[torch.Tensor]] | None:
    """The dense model's log-probabilities, float32, per batch and slice of positions; None if they are too many.

    dense: activations that have passed all blocks.
    """
    tokens = sum(i["input_ids"].numel() for i in dense.inputs)
    if tokens * models.config_of(model).vocab_size > KEPT:
        return None
    with models.resident(model, dense.device, models.rest_of(model, models.blocks(model)[1])):
        return [[p.float().log_softmax(-1) for _, p in calibrate.logits(model, dense, i)] for i in range(len(dense))]


@torch.no_grad()
def divergence(model: nn.Module, dense: Activations, cut: Activations, batches: Sequence[int] | None = None,
               known: list[list[torch.Tensor]] | None = None) -> float:
    """KL(dense ‖ cut), nats per token, of activations that have passed all blocks. batches: which; None: all.

    known: what `teacher` gave.
    """
    total = n = 0.0
    _, block_list = models.blocks(model)
    with models.resident(model, dense.device, models.rest_of(model, block_list)):
        for i in range(len(dense)) if batches is None else batches:
            taught = known[i] if known else (p.float().log_softmax(-1) for _, p in calibrate.logits(model, dense, i))
            for p, (at, q) in zip(taught, calibrate.logits(model, cut, i), strict=True):
                q = q.float().log_softmax(-1)
                each = (p.exp() * (p - q)).sum(-1)
                if dense.rows[i] is not None:
                    each = each[dense.rows[i].view(len(each), -1)[:, at]]
                total, n = total + each.double().sum().item(), n + each.numel()
    return total / max(n, 1)


def through(model: nn.Module, activations: Activations, start: int, without: Sequence[int]) -> Activations:
    """The activations at block `start`, run through it and all later blocks but those in `without`."""
    for block in models.walk(model, activations.device, start=start):
        if block.number not in without:
            calibrate.replay(block.module, activations, block.number)
    return activations


def by_influence(model: nn.Module, activations: Activations, count: int, fixed: Sequence[int] = (),
                 allowed: Callable[[list[int]], bool] = lambda blocks: True) -> list[dict]:
    """The order of `by_kl`, by block influence on the dense model instead."""
    (_, found), gone = influences(model, activations.fork(), ()), []
    for number, value in sorted(found.items(), key=lambda item: (item[1], item[0])):
        if len(gone) < count and number not in fixed and allowed([*(row["block"] for row in gone), number]):
            gone.append({"block": number, "influence": value})
    return gone


def by_kl(model: nn.Module, activations: Activations, count: int, fixed: Sequence[int] = (),
          allowed: Callable[[list[int]], bool] = lambda blocks: True, progress: bool = False,
          known: list[list[torch.Tensor]] | None = None) -> list[dict]:
    """[{"block", "kl", "influence"}] of at most `count` blocks, in the order in which they go.

    activations: of the dense model at its first block; they stay there. fixed: blocks that never go. allowed: whether a
    list of blocks may go together. known: what `teacher` gave for the model to compare with, if not this one.
    """
    dense, gone, rows = through(model, activations.fork(), 0, ()), [], []
    known = known or teacher(model, dense)
    n = len(models.blocks(model)[1])
    bar = tqdm(total=count, desc="order of blocks", unit="block", disable=not progress, leave=False)
    with bar:
        while len(gone) < count:
            before, found = influences(model, activations.fork(), gone)
            left = sorted((value, b) for b, value in found.items() if b not in fixed)[:AMONG]
            tried = []
            for influence, b in left:
                if allowed(sorted([*gone, b])):
                    cut = through(model, before[b].fork(), b + 1, gone) if b + 1 < n else before[b]
                    tried.append((divergence(model, dense, cut, known=known), b, influence))
            if not tried:
                break
            kl, b, influence = min(tried)
            gone.append(b)
            rows.append({"block": b, "kl": kl, "influence": influence})
            bar.update()
    return rows


@torch.no_grad()
def influences(model: nn.Module, activations: Activations,
               without: Sequence[int]) -> tuple[dict[int, Activations], dict[int, float]]:
    """({number: activations before it}, {number: influence}) of the blocks that are left."""
    before, found = {}, {}
    for block in models.walk(model, activations.device):
        if block.number in without:
            continue
        before[block.number] = activations.fork()
        total = n = 0
        for i in range(len(activations)):
            x = activations.hidden[i].to(activations.device).float()
            y = calibrate.forward(block.module, activations, block.number, i)
            cos = torch.nn.functional.cosine_similarity(x, y.float(), dim=-1).flatten()
            cos = cos if activations.rows[i] is None else cos[activations.rows[i]]
            total, n = total + cos.double().sum().item(), n + len(cos)
            activations.put(i, y)
        found[block.number] = 1 - total / n
    return before, found
