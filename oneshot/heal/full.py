"""Full: train all kept weights of the blocks on text (`--heal-data`).

Embedding, output head, routers and unrecognised matrices stay as they are. Memory: 17 bytes per weight of the blocks,
4 per other weight, the dense model beside it, and the activations of a step (heal/text/memory.py); on a CPU the stored
weights twice as well.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import models
from ..runtime.flag import flag
from . import Heal as Base
from . import Run, text
from .text import memory, sharded
from .text.student import Lesson
from .train import Trainable

RATES = (0.004, 0.002, 0.001, 0.0005)  # from which one is chosen where none is given


@dataclass(frozen=True)
class Config:
    lr: float | None = flag(None, "learning rate as a share of each tensor's root mean square; lowered where it does "
                                  "harm (default: found on the first steps)")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate that is given, or else those to choose among."""
        return RATES if self.lr is None else (self.lr,)

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < 1:
            raise ValueError(f"--full.lr {self.lr:g}: must lie between 0 and 1")


def check_model(model: nn.Module, cfg: Config, run: Run) -> None:
    """Raise ValueError for a model that cannot be sharded, if it is to be, or is too large for the memory."""
    sharded.check_model(model)
    memory.check(model, "full", run, held(model, torch.device(run.device)))


def held(model: nn.Module, device: torch.device) -> memory.Held:
    """What training takes beside the model, which is as it is stored."""
    left = left_alone(model)
    own = [p for name, p in models.blocks(model)[1].named_parameters() if p.is_floating_point() and name not in left]
    return memory.held(model, device, sum(p.numel() for p in own), sum(p.numel() for p in own if p.ndim > 1),
                       sum(p.nbytes for p in own))


def left_alone(model: nn.Module) -> set[str]:
    """Names, within the list of blocks, of the parameters in it that are not trained."""
    return {f"{block.number}.{name}" for block in models.walk(model) for name in models.untouched(block.module)}


class Heal(Base):
    """Training of all kept weights at work in one run, see above."""

    def on_text(self, model: nn.Module, lesson: Lesson) -> dict:
        """Train the blocks on the lesson's text."""
        _, block_list = models.blocks(model)
        stored = {name: p.dtype for name, p in block_list.named_parameters()}
        leave, beside = left_alone(model), held(model, lesson.device)
        if sharded.asked():
            with sharded.Sharded(model, lesson.device, stored, leave) as trainable:
                return text.heal(trainable.model, lesson, "full", trainable, self.cfg.rates, beside)
        with models.resident(model, lesson.device, write_back=True, dtype=torch.float32), \
                Trainable(block_list, stored, leave) as trainable:
            return text.heal(model, lesson, "full", trainable, self.cfg.rates, beside)
