"""Sensitivity: how much the loss increases when only ONE linear, or one kind of linear in all blocks, is pruned.

All linears are solved once on the dense model's inputs. Then each unit gets its pruned weights for one measurement, and
its dense weights back afterwards. The windows start from the dense hidden states before the unit's first block.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations
from ..data import Tokens
from ..models import Weight
from ..prune import loop, shared_inputs
from ..prune.job import Job
from ..runtime.flag import Settings, flag
from . import Found, Subject, needs_text
from .losses import at_head, batch_losses, predicted

when = "before"  # because each unit is pruned in a model that is otherwise dense


@dataclass(frozen=True)
class Config:
    sensitivity: str = flag("none", "before the run, prune one linear layer, or one kind of linear layer, at a time "
                                    "and measure the loss, to see what is harmful to prune", section="evaluation",
                            bears_on="measuring", choices=("none", "linear", "kind"), rows=("pruned",))


def asked(cfg: Settings) -> bool:
    """Whether the flag is set and the run prunes."""
    return cfg.sensitivity != "none" and cfg.prunes


def refuse(cfg: Settings) -> None:
    """Raise ValueError naming `--sensitivity` if there is no text to measure on."""
    needs_text(cfg, "--sensitivity")


def measure(subject: Subject) -> Found:
    """The record's `sensitivity`, measured on the first text."""
    rows = sensitivity(subject.model, subject.calibration, subject.job, next(iter(subject.texts.values())),
                       subject.cfg.sensitivity, subject.cfg.eval_batch_size)
    return Found(parts={"sensitivity": rows})


@torch.no_grad()
def sensitivity(model: nn.Module, calibration: Tokens | None, job: Job, evaluation: Tokens, unit: str = "linear",
                eval_batch_size: int | None = None) -> list[dict]:
    """Rows for the record, the most sensitive first; the model is unchanged at the end.

    job: what each linear is pruned to. unit: "linear", or "kind" for one kind of linear in all blocks. Keys of a row:
    name; block, the number of its first; linear, its kind; loss_increase over the dense model, nats per token;
    relative_error, mean over the unit's linears; weights, how many.
    """
    options = job.options
    measuring = dataclasses.replace(options, batch_size=eval_batch_size or options.batch_size)
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    [(result, new)] = shared_inputs.prune_shared(model, ids, mask, [job])
    errors = {row["name"]: row["relative_error"] for row in result.layers}
    activations, at, rows = loop.start(model, evaluation.ids, evaluation.mask, measuring), 0, []
    real = predicted(evaluation.mask) if evaluation.mask is not None else None
    dense = mean_loss(model, activations.fork(), 0, real)
    for name, parts in tqdm(units(model, unit), desc="sensitivity", unit=unit, leave=False,
                            disable=not options.progress):
        first = parts[0][0]
        for block in models.walk(model, options.device, start=at, end=first):
            calibrate.replay(block.module, activations, block.number)
        at = first
        kept = [weight.get().to(weight.stored, copy=True) for _, weight in parts]
        for _, weight in parts:
            weight.set(new[weight.name])
        loss = mean_loss(model, activations.fork(), at, real)
        for (_, weight), W in zip(parts, kept, strict=True):
            weight.set(W)
        known = [errors[w.name] for _, w in parts if errors.get(w.name) is not None]
        rows.append({"name": name, "block": first, "linear": parts[0][1].kind, "loss_increase": loss - dense,
                     "relative_error": sum(known) / len(known) if known else None,
                     "weights": sum(weight.size for _, weight in parts)})
    return sorted(rows, key=lambda row: -row["loss_increase"])


def units(model: nn.Module, unit: str) -> list[tuple[str, list[tuple[int, Weight]]]]:
    """[(name, [(block number, weight), ...])] of what is pruned together, in order of the first block.

    unit: "linear" or "kind". All experts of a layer count as one linear.
    """
    found = {}
    for block in models.walk(model):
        for weight in block.weights:
            name = weight.kind if unit == "kind" else f"{block.name}.{weight.kind}"
            found.setdefault(name, []).append((block.number, weight))
    return list(found.items())


def mean_loss(model: nn.Module, activations: Activations, b: int, real: torch.Tensor | None) -> float:
    """Mean loss in nats per token from activations at block b on. real: bool (n, T-1), what counts; None: all."""
    for block in models.walk(model, activations.device, start=b):
        calibrate.replay(block.module, activations, block.number)
    with at_head(model, activations.device):
        losses = torch.cat([batch_losses(model, activations, i) for i in range(len(activations))]).double()
    return float(losses[real].mean() if real is not None else losses.mean())
