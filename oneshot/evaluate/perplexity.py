"""Perplexity as in the pruning papers: non-overlapping windows, exp of the mean loss over predicted tokens.

The model runs block by block, so only one block and a group of windows' activations are on the device at a time; the
logits come in slices. A number means nothing without its window, so the window is returned with it.
"""

import math

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .. import capture, models

GROUP_BYTES = 2**31  # activations of the windows that go through the blocks together


@torch.no_grad()
def token_losses(model, ids, mask=None, *, batch_size=8, device="cpu", progress=None):
    """Loss (nats) of every predicted token: float32 (n, T-1); 0 where mask (n, T) hides the target or its context.

    ids: int64 (n, T). progress: text before a bar over blocks, or None.
    """
    _, block_list = models.blocks(model)
    width = getattr(models.config_of(model), "hidden_size", 1024)
    group = max(batch_size, GROUP_BYTES // (ids.shape[1] * width * 4) // batch_size * batch_size)
    starts = range(0, len(ids), group)
    bar = tqdm(total=len(starts) * len(block_list), desc=progress, unit="block", disable=progress is None, leave=False)
    losses = []
    with bar:
        for s in starts:
            part = slice(s, s + group)
            stream = capture.capture(model, ids[part], None if mask is None else mask[part],
                                     batch_size=batch_size, device=device)
            for b, block in enumerate(block_list):
                with models.resident(models.tensors_of(block), device):
                    capture.replay(block, stream, b)
                bar.update()
            with models.resident(models.rest_of(model, block_list), device):
                losses += [batch_losses(model, stream, i) for i in range(len(stream))]
    losses = torch.cat(losses)
    if mask is not None:
        losses = losses.where(mask[:, 1:] & mask[:, :-1], 0.0)  # not times 0: padding may give NaN
    return losses


def batch_losses(model, stream, i):
    """(B, T-1) losses on the CPU of one batch that has passed all blocks."""
    ids = stream.inputs[i]["input_ids"]
    out = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for positions, logits in capture.logits(model, stream, i):
        positions = positions[positions < ids.shape[1] - 1]  # the last position predicts nothing
        targets = ids[:, positions + 1]
        logits = logits[:, : len(positions)].float()
        out[:, positions.cpu()] = cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu()
    return out


def perplexity(model, ids, mask=None, **options):
    """(perplexity, predicted tokens); inf when the model has broken down."""
    losses = token_losses(model, ids, mask, **options).double()
    n = losses.numel() if mask is None else int((mask[:, 1:] & mask[:, :-1]).sum())
    mean = (losses.sum() / n).item()
    return (math.exp(mean) if mean < 700 else math.inf), n
