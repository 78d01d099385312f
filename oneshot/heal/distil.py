"""Distil: train all kept weights of the blocks towards the dense model's predictions (masked distillation).

    loss    KL(dense ‖ pruned), nats, mean over the tokens that are not padding

The dense model is represented by its hidden states after the last block. Final norm and output head are never pruned,
so the pruned model's own head turns these into the dense logits. Memory on the device: the whole model in float32,
Adam's two averages and the mask (13 bytes per weight), and one batch's activations; in CPU memory two snapshots in the
stored dtype (4 bytes per weight). If a batch has more than LOGITS logits, each step uses a random subset of the
positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations
from ..runtime import environment
from ..runtime.flag import flag
from . import Heal as Base
from . import Run, sliced
from .train import Trainable, check, fit

LOGITS = 2**24
TRAINED = 13  # bytes per weight on the device, see above


@dataclass(frozen=True)
class Config:
    steps: int = flag(200, "updates of the whole model, each on one batch of windows (512 tokens, or one longer "
                           "window)")
    lr: float = flag(0.004, "learning rate as a share of each tensor's root mean square")

    def __post_init__(self) -> None:
        check(self, "distil")


def check_model(model: nn.Module, cfg: Config, run: Run) -> None:
    """Raise ValueError naming `--heal` if the device's memory is too small to train the whole model."""
    blocks = sum(p.numel() for p in models.blocks(model)[1].parameters() if p.is_floating_point())
    rest = sum(p.numel() for p in model.parameters()) - blocks
    needed, there = TRAINED * blocks + 4 * rest, environment.total_memory(run.device)
    if there is not None and needed > there:
        raise ValueError(f"--heal distil: trains the whole model, which takes at least {needed / 2**30:.0f} GiB, but "
                         f"{run.device} has {there / 2**30:.0f}; use --heal block alone, or --effort 2 with --method "
                         "best")


class Heal(Base):
    """Distillation at work in one run, see above."""

    def after_model(self, model: nn.Module, dense: Activations) -> dict:
        """Train the pruned model on the batches of `dense`."""
        _, block_list = models.blocks(model)
        stored = {name: p.dtype for name, p in block_list.named_parameters()}
        leave = {f"{block.number}.{name}" for block in models.walk(model) for name in models.untouched(block.module)}
        bar = tqdm(total=self.cfg.steps, desc="distil", unit="step", disable=not self.progress, leave=False)
        with models.resident(model, dense.device, write_back=True, dtype=torch.float32), bar, \
                Trainable(block_list, stored, leave) as trainable:
            return fit(trainable, divergence(model, dense, self.seed), dense.held, steps=self.cfg.steps,
                       lr=self.cfg.lr, seed=self.seed, progress=bar.update)


def divergence(model: nn.Module, dense: Activations, seed: int) -> Callable[[int], torch.Tensor]:
    """The loss function: loss(i) is a scalar tensor, KL(dense ‖ pruned) in nats per token on batch i."""
    gen = torch.Generator().manual_seed(seed)

    def loss(i: int) -> torch.Tensor:
        held_out = not torch.is_grad_enabled()  # the held-out loss is always computed on the same positions
        at = positions(model, dense, i, torch.Generator().manual_seed(seed + i) if held_out else gen)
        with torch.no_grad():
            teacher = calibrate.tail(model, dense, i, at)
        inputs, real = dense.inputs[i], torch.ones(teacher.shape[:-1], dtype=torch.bool, device=teacher.device)
        if dense.rows[i] is not None:
            real = dense.rows[i].view(inputs["input_ids"].shape)[:, at]
        logits = model(**inputs, use_cache=False, **calibrate.logits_to_keep(model, at)).logits
        flat, rows = teacher.flatten(0, -2), real.flatten().nonzero()[:, 0]
        return sliced.mean(lambda z, part: sliced.divergence(z, flat[part].to(z)), logits, rows)
    return loss


def positions(model: nn.Module, activations: Activations, i: int, gen: torch.Generator) -> torch.Tensor:
    """The positions of batch i that a step uses, int64 (P,): all, or a random subset within LOGITS logits.

    In a subset, positions that are padding in every window are left out.
    """
    B, T = activations.inputs[i]["input_ids"].shape
    most = max(1, LOGITS // (B * models.config_of(model).vocab_size))
    if most >= T or not calibrate.slices_logits(model):
        return torch.arange(T, device=activations.device)
    rows = activations.rows[i]
    real = torch.arange(T) if rows is None else rows.view(B, T).any(0).nonzero()[:, 0].cpu()
    return real[torch.randperm(len(real), generator=gen)[:most]].sort().values.to(activations.device)
