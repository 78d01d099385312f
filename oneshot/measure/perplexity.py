"""Perplexity as in the pruning papers: non-overlapping windows, exp of the mean loss over predicted tokens.

The model runs block by block, so only one block and a group of windows' activations are on the device at a time; the
logits come in slices. A number means nothing without its window, so the window is returned with it.
"""

import math

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .. import calibrate, models

GROUP_BYTES = 2**31  # activations of the windows that go through the blocks together


@torch.no_grad()
def token_losses(model, ids, mask=None, *, batch_size=8, device="cpu", progress=None):
    """Loss (nats) of every predicted token: float32 (n, T-1); 0 where mask (n, T) hides the target or its context.

    ids: int64 (n, T). progress: text before a bar over blocks, or None.
    """
    parts = groups(model, ids, batch_size)
    losses = []
    with block_bar([model], parts, progress) as bar:
        for part in parts:
            activations = through_blocks(model, ids[part], None if mask is None else mask[part], batch_size, device, bar)
            with at_head(model, device):
                losses += [batch_losses(model, activations, i) for i in range(len(activations))]
    losses = torch.cat(losses)
    return losses if mask is None else losses.where(predicted(mask), 0.0)  # not times 0: padding may give NaN


def predicted(mask):
    """bool (n, T-1): which positions of mask (n, T) predict a token that is text, from one that is."""
    return mask[:, 1:] & mask[:, :-1]


def groups(model, ids, batch_size, bytes=GROUP_BYTES):
    """Slices of the windows that go through the blocks together: whole batches, at most `bytes` of activations."""
    width = getattr(models.config_of(model), "hidden_size", 1024)
    group = max(batch_size, bytes // (ids.shape[1] * width * 4) // batch_size * batch_size)
    return [slice(s, s + group) for s in range(0, len(ids), group)]


def block_bar(models_, parts, progress):
    """A bar over all blocks of all groups; progress: its text, or None for no bar."""
    total = len(parts) * sum(len(models.blocks(m)[1]) for m in models_)
    return tqdm(total=total, desc=progress, unit="block", disable=progress is None, leave=False)


def through_blocks(model, ids, mask, batch_size, device, bar):
    """The Stream of these windows after all blocks, one block at a time on the device."""
    activations = calibrate.capture(model, ids, mask, batch_size=batch_size, device=device)
    for b, block in enumerate(models.blocks(model)[1]):
        with models.resident(models.tensors_of(block), device):
            calibrate.replay(block, activations, b)
        bar.update()
    return activations


def at_head(model, device):
    """What `capture.logits` needs is on the device."""
    return models.resident(models.rest_of(model, models.blocks(model)[1]), device)


def batch_losses(model, activations, i):
    """(B, T-1) losses on the CPU of one batch that has passed all blocks."""
    ids = activations.inputs[i]["input_ids"]
    out = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for positions, logits in calibrate.logits(model, activations, i):
        positions = positions[positions < ids.shape[1] - 1]  # the last position predicts nothing
        targets = ids[:, positions + 1]
        logits = logits[:, : len(positions)].float()
        out[:, positions.cpu()] = cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu()
    return out


def perplexity(model, ids, mask=None, **options):
    """(perplexity, predicted tokens); inf when the model has broken down."""
    return of_losses(token_losses(model, ids, mask, **options), mask)


def of_losses(losses, mask=None):
    """(perplexity, predicted tokens) of what `token_losses` gives."""
    n = losses.numel() if mask is None else int(predicted(mask).sum())
    mean = (losses.double().sum() / n).item()
    return (math.exp(mean) if mean < 700 else math.inf), n
