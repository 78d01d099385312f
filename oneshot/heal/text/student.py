"""Student: a model that is healed on text, as transformers' Trainer sees it, what is trained, what its lesson is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ... import models
from ...data.training import TrainingText
from ...runtime import distributed
from ...runtime.flag import listed
from ..options import HealOptions
from . import losses
from .sharded import fill, whole
from .teacher import Cached, Live, model_inputs


@dataclass
class Lesson:
    """What healing on text needs. options: a RunConfig's HealOptions.

    teacher: the dense model, caches of its predictions for the text to `train` on and the `held` one, or None where the
    loss needs neither. work: a folder for checkpoints. device: where to train. seed: of all that is random.
    """

    text: TrainingText
    teacher: Live | dict[str, Cached] | None
    work: Path
    options: HealOptions
    device: torch.device
    seed: int = 0
    progress: bool = False

    @property
    def windows(self) -> int:
        """How many windows a step has, in all processes together."""
        return windows_of(self.options)


def windows_of(options: HealOptions) -> int:
    """How many windows a step has, in all processes together."""
    return max(distributed.world(), options.heal_batch // options.heal_seqlen)


class Trained(Protocol):
    """What a method trains; `train.Trainable` is one."""

    parameters: dict[str, nn.Parameter]

    def products(self) -> torch.dtype:
        """The dtype in which matrices are multiplied."""

    def groups(self, lr: float) -> list[dict]:
        """Adam's parameter groups."""

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero."""

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters."""

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        """Set the parameters to a snapshot."""

    def round(self) -> None:
        """Round the weights as they will be saved."""


class Student(nn.Module):
    """The model as Trainer sees it: its forward gives the loss, its state are the parameters that are trained.

    trained: {name: parameter}. lesson, products: see Lesson and `train.Trainable.products`.
    """

    def __init__(self, model: nn.Module, trained: dict[str, nn.Parameter], lesson: Lesson,
                 products: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.__dict__.update(trained=trained, lesson=lesson, products=products)  # no submodules: teachers do not train

    def forward(self, index: torch.Tensor, labels: torch.Tensor, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"loss": the sum of the losses asked for}, of windows (B, T).

        As a mean over all positions, those that predict nothing included: so a mean over batches is the same, however
        windows are put into batches and shared among processes.
        """
        options, teacher = self.lesson.options, self.lesson.teacher
        wanted = listed(options.heal_loss)
        inputs = model_inputs(self.model, batch, labels.device)
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.products == torch.bfloat16):
            out = self.model(**inputs, use_cache=False, output_hidden_states="hidden" in wanted)
        found, dense, states = labels.new_zeros((), dtype=torch.float32), None, None
        if isinstance(teacher, dict):
            dense = teacher["train" if torch.is_grad_enabled() else "held"](index)
        elif teacher is not None:
            dense, states = teacher(inputs, "hidden" in wanted)
            if options.heal_top_k:
                dense = losses.TopK.of(dense, options.heal_top_k, options.heal_temperature)
        if "next" in wanted:
            found = found + losses.next_token(out.logits, labels)
        if "kl" in wanted:
            found = found + losses.kl(out.logits, dense, labels, options.heal_temperature)
        found = found * counted(labels)
        if "hidden" in wanted:
            found = found + losses.hidden(out.hidden_states, states)
        return {"loss": found}

    def state_dict(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """The parameters that are trained, under their names in the model."""
        return {name: whole(p) for name, p in self.trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor], *_: Any, **__: Any) -> Any:
        """Set the parameters that are trained."""
        for name, p in self.trained.items():
            fill(p, state[name])
        return _IncompatibleKeys([], [])


def counted(labels: torch.Tensor) -> torch.Tensor:
    """The share of the positions of windows (B, T) that predict something."""
    return (labels[..., 1:] != -100).float().mean()


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether no token sees an earlier document of its window: transformers sees to it for most families.

    Found by changing one document and looking at the logits of the next.
    """
    ids = torch.arange(16)[None] % models.embedded(model)
    batch = {"input_ids": ids, "position_ids": torch.arange(8).repeat(2)[None]}
    said = []
    for first in (ids, ids.roll(1)):
        batch["input_ids"] = torch.cat([first[:, :8], ids[:, 8:]], 1)
        with models.own_code("--heal: the model cannot be run"):
            said.append(model(**model_inputs(model, batch, model.device), use_cache=False).logits[:, 8:].float())
    return torch.allclose(*said, rtol=1e-3, atol=1e-3)
