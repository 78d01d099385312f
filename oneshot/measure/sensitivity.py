"""Sensitivity: what the model loses when ONE linear, or one kind of linear in all blocks, is pruned and nothing else.

All linears are solved once on the dense model's inputs. Then each unit gets its pruned weights for one measurement and
its dense ones back; the windows start from the dense hidden states in front of the unit's first block.
"""

import dataclasses

import torch
from tqdm import tqdm

from .. import calibrate, models
from ..prune import loop
from .perplexity import at_head, batch_losses, predicted


@torch.no_grad()
def sensitivity(model, calibration, plan, steps, evaluation, unit="linear", options=None,
                eval_batch_size=None):
    """Rows for the record, the most sensitive first; the model is left as it was.

    calibration, evaluation: Tokens. plan, steps: as for loop.prune_model. Each row: name; block (its first) and linear;
    loss_increase in nats a token against the dense model; relative_error, the mean over the unit's linears; weights.
    """
    options = options or loop.Options()
    measuring = dataclasses.replace(options, batch_size=eval_batch_size or options.batch_size)
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    [(result, weights)] = loop.prune_shared(model, ids, mask, [(plan, steps)], options)
    errors = {row["name"]: row["relative_error"] for row in result.layers}
    path, block_list = models.blocks(model)
    activations, at, rows = loop.start(model, evaluation.ids, evaluation.mask, measuring), 0, []
    real = predicted(evaluation.mask) if evaluation.mask is not None else None
    dense = mean_loss(model, activations.fork(), 0, real)
    for name, parts in tqdm(units(path, block_list, unit), desc="sensitivity", unit=unit, leave=False,
                            disable=not options.progress):
        while at < parts[0][0]:
            with models.resident(models.tensors_of(block_list[at]), options.device):
                calibrate.replay(block_list[at], activations, at)
            at += 1
        kept = [weight.get().to(weight.stored, copy=True) for _, weight in parts]
        full = [f"{path}.{b}.{weight.name}" for b, weight in parts]
        for (_, weight), n in zip(parts, full, strict=True):
            weight.set(weights[n])
        loss = mean_loss(model, activations.fork(), at, real)
        for (_, weight), W in zip(parts, kept, strict=True):
            weight.set(W)
        known = [errors[n] for n in full if errors.get(n) is not None]
        rows.append({"name": name, "block": parts[0][0], "linear": parts[0][1].kind, "loss_increase": loss - dense,
                     "relative_error": sum(known) / len(known) if known else None,
                     "weights": sum(weight.shape[0] * weight.shape[1] for _, weight in parts)})
    return sorted(rows, key=lambda row: -row["loss_increase"])


def units(path, block_list, unit):
    """[(name, [(block number, view), ...])] of what is pruned together, by first block. Experts count as one linear."""
    found = {}
    for b, block in enumerate(block_list):
        for weight in models.linears(block)[0]:
            found.setdefault(weight.kind if unit == "kind" else f"{path}.{b}.{weight.kind}", []).append((b, weight))
    return list(found.items())


def mean_loss(model, activations, b, real):
    """Mean loss (nats a token) of a stream in front of block b; real: bool (n, T-1), what counts, or None."""
    _, block_list = models.blocks(model)
    for i in range(b, len(block_list)):
        with models.resident(models.tensors_of(block_list[i]), activations.device):
            calibrate.replay(block_list[i], activations, i)
    with at_head(model, activations.device):
        losses = torch.cat([batch_losses(model, activations, i) for i in range(len(activations))]).double()
    return float(losses[real].mean() if real is not None else losses.mean())
