"""Losses of single tokens.

The model runs block by block, so that only one block and the activations of a group of windows are on the device at a
time. Logits are computed in slices.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations
from ..runtime import distributed, products, together

GROUP_BYTES = 2**31  # of activations of the windows that pass through the blocks together
CACHED = 2**18  # logits of a thread at a time: 1 MiB in float32
SLICE = 2**24  # logits at a time: with their softmax these take 128 MiB in float32


@torch.no_grad()
def token_losses(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, *, batch_size: int = 8,
                 device: str = "cpu", progress: str | None = None) -> torch.Tensor:
    """Loss in nats of every predicted token, float32 (n, T-1); 0 where the target or the token before it is padding.

    ids: int64 (n, T). mask: bool (n, T), False at padding, or None. batch_size: windows per batch. device: where blocks
    run. progress: label of a bar over the blocks, or None.

    Where other processes hold the model as well, each runs its share of the windows, in the same batches as one alone.
    """
    return together.run(divided_losses, model, ids, mask, batch_size, device, progress)


@torch.no_grad()
def divided_losses(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, batch_size: int, device: str,
                   progress: str | None) -> torch.Tensor:
    """`token_losses` of all windows, from all processes."""
    device, progress = distributed.device(device), None if distributed.rank() else progress
    parts = groups(model, ids, batch_size, GROUP_BYTES * distributed.ranks())
    losses = []
    with products.float32(), block_bar([model], parts, progress) as bar:
        for part in parts:
            part_mask = None if mask is None else mask[part]
            activations = through_blocks(model, ids[part], part_mask, batch_size, device, bar)
            with at_head(model, device):
                own = [batch_losses(model, activations, i) for i in head_steps([model], len(activations), bar)]
            losses += [batch for part in distributed.gathered(own) for batch in part]
    losses = torch.cat(losses)
    return losses if mask is None else losses.where(predicted(mask), 0.0)  # not multiplied by 0: padding may give NaN


def predicted(mask: torch.Tensor) -> torch.Tensor:
    """bool (n, T-1): where both a token and the next one are text, by mask bool (n, T)."""
    return mask[:, 1:] & mask[:, :-1]


def groups(model: nn.Module, ids: torch.Tensor, batch_size: int, bytes: int = GROUP_BYTES) -> list[slice]:
    """Slices of the windows that pass through the blocks together: whole batches, at most `bytes` of activations.

    ids: (n, T).
    """
    width = getattr(models.config_of(model), "hidden_size", 1024)
    group = max(batch_size, bytes // (ids.shape[1] * width * 4) // batch_size * batch_size)
    return [slice(s, s + group) for s in range(0, len(ids), group)]


def block_bar(models_: list[nn.Module], parts: list[slice], progress: str | None) -> tqdm:
    """A progress bar over all blocks of all groups, the output heads counted as so many blocks as they are large.

    progress: its label, or None for no bar.
    """
    total = len(parts) * sum(len(models.blocks(m)[1]) + head_size(m) for m in models_)
    return tqdm(total=total, desc=progress, unit="block", disable=progress is None, leave=False)


def head_size(model: nn.Module) -> int:
    """How many blocks have as many weights as the output head, at least 1: it takes about their time."""
    _, block_list = models.blocks(model)
    head, block = model.get_output_embeddings(), sum(p.numel() for p in block_list.parameters()) / len(block_list)
    return max(1, round(sum(p.numel() for p in head.parameters()) / max(block, 1))) if head is not None else 1


def head_steps(models_: list[nn.Module], batches: int, bar: tqdm) -> Iterator[int]:
    """The numbers of the batches; the bar advances by the heads' sizes as they are done."""
    size = sum(map(head_size, models_))
    for i in range(batches):
        yield i
        bar.update((i + 1) * size // batches - i * size // batches)


def through_blocks(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, batch_size: int, device: str,
                   bar: tqdm) -> Activations:
    """The Activations of ids (n, T), mask (n, T) or None, after all blocks, of which one at a time is on the device."""
    activations = calibrate.capture(model, ids, mask, batch_size=batch_size, device=device)
    for block in models.walk(model, device, bar=bar):
        calibrate.replay(block.module, activations, block.number)
    return activations


def at_head(model: nn.Module, device: str | torch.device) -> AbstractContextManager[None]:
    """Within the context, the parts of the model that `calibrate.logits` needs are on the device."""
    return models.resident(model, device, models.rest_of(model, models.blocks(model)[1]))


def batch_losses(model: nn.Module, activations: Activations, i: int) -> torch.Tensor:
    """Losses in nats, float32 (B, T-1) on the CPU, of batch i of activations that have passed all blocks."""
    ids = activations.inputs[i]["input_ids"]
    out = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    for positions, logits in calibrate.logits(model, activations, i, elements=SLICE):
        positions = positions[positions < ids.shape[1] - 1]  # the last position predicts nothing
        targets = ids[:, positions + 1]
        out[:, positions.cpu()] = of_logits(logits[:, : len(positions)], targets).cpu()
    return out


def of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses in nats, float32 (B, P), of logits (B, P, V) and targets, int64 (B, P)."""
    parts = zip(in_cache(logits.flatten(0, 1), logits), in_cache(targets.flatten(), logits), strict=True)
    losses = [cross_entropy(x.float(), target, reduction="none") for x, target in parts]  # a softmax on the last axis
    return torch.cat(losses).view(targets.shape)


def in_cache(rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`rows`, one for each position of logits (.., V), in parts: on a CPU so few that a thread's logits stay in its
    cache, where softmaxes take less than half the time. The results are the same, bit for bit."""
    at_once = CACHED * torch.get_num_threads() // logits.shape[-1] if logits.device.type == "cpu" else len(rows)
    return rows.split(max(1, at_once))
