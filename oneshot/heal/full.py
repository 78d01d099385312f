"""Full: train all kept weights of the blocks on text (`--heal-data`).

Embedding, output head, routers and unrecognised matrices stay as they are. Memory: 17 bytes per weight of the blocks,
4 per other weight, the dense model beside it, and the activations of a step (heal/text/memory.py).
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import models
from ..runtime.flag import flag
from . import Heal as Base
from . import text
from .text import sharded
from .text.student import Lesson
from .train import Trainable


@dataclass(frozen=True)
class Config:
    lr: float = flag(0.004, "learning rate as a share of each tensor's root mean square; lowered where it does harm")

    def __post_init__(self) -> None:
        if not 0 < self.lr < 1:
            raise ValueError(f"--full.lr {self.lr:g}: must lie between 0 and 1")


def check_model(model: nn.Module, cfg: Config, device: str) -> None:
    """Raise ValueError for a model that cannot be sharded, if it is to be."""
    sharded.check_model(model)


class Heal(Base):
    """Training of all kept weights at work in one run, see above."""

    def on_text(self, model: nn.Module, lesson: Lesson) -> dict:
        """Train the blocks on the lesson's text."""
        _, block_list = models.blocks(model)
        stored = {name: p.dtype for name, p in block_list.named_parameters()}
        leave = {f"{block.number}.{name}" for block in models.walk(model) for name in models.untouched(block.module)}
        if sharded.asked():
            with sharded.Sharded(model, lesson.device, stored, leave) as trainable:
                return text.heal(trainable.model, lesson, "full", trainable, self.cfg.lr)
        with models.resident(model, lesson.device, write_back=True, dtype=torch.float32), \
                Trainable(block_list, stored, leave) as trainable:
            return text.heal(model, lesson, "full", trainable, self.cfg.lr)
