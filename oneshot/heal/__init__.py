"""Heal: train the weights that pruning kept, while every zero stays zero. One file, one method, named as for `--heal`.

A method is a module with

    Config       a frozen dataclass: its flags, each made by `runtime.flag.flag`
    Heal         the method at work in one run: a subclass of `heal.Heal` that overrides the stages it needs
    check_model  (model, cfg, run), optional: raise ValueError naming the flag if the method cannot be used on this
                 model as it is before the run. run: a `heal.Run`

The stages, in order; the last three return plain values for the record, with `warnings`, a list of str with one entry
for every fallback taken:

    before_block  the block is resident and still dense: inspect it
    after_block   the block has been pruned: train it in place
    after_model   all blocks have been pruned: train the whole model in place
    on_text       everything before is done: train the whole model in place on text of the user's own (`--heal-data`)

Law, tested for every method: a weight that is zero stays zero, bit for bit (but for a dense model's few, with
`--lora.adapter`), and the method's own held-out loss never gets worse. Parameters are trained in float32 and rounded to
the stored dtype at the end. But for `on_text`, the only data are the calibration windows. A tenth of them, but at most
4096 tokens, is held out: drawn once per run from its seed, in batches of their own, the same for every block and every
method, so that no method is judged on windows that another has trained on (solvers and calibration statistics do use
them). A run with a single window holds out nothing, keeps the last state and warns.

With several processes (torchrun) the stages of a block run in all of them, each with its share of the batches: what is
computed from these must be put together by `runtime.distributed`, as `train.fit` does. Afterwards all have rank 0's
parameters. `after_model` runs in rank 0 alone, with the batches of all.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..calibrate import Activations
from ..models import Block
from ..runtime.verb import make_callable

make_callable(__name__, "oneshot.pipeline.api:heal")

STAGES = ("before_block", "after_block", "after_model", "on_text")


@dataclass(frozen=True)
class Run:
    """What a method checks a model for. device: where it is healed. options: the run's HealOptions.

    left: the share of the blocks that is healed, of a model that is yet to be cut; 0 where no one knows yet.
    """

    device: str
    options: Any
    left: float = 1.0


class Heal:
    """A healing method at work in one run; a method overrides the stages it needs.

    cfg: the method's Config. seed: of everything random. progress: whether to show bars.
    """

    def __init__(self, cfg: Any, seed: int = 0, progress: bool = False) -> None:
        self.cfg, self.seed, self.progress = cfg, seed, progress

    def before_block(self, block: Block, dense: Activations) -> None:
        """Inspect the resident block while it is still dense. dense: the dense model's activations at this block."""

    def after_block(self, block: Block, activations: Activations, targets: list[torch.Tensor]) -> dict | None:
        """Train the pruned, resident block in place; returns plain values for the record, or None.

        activations: the pruned model's at this block. targets: the dense block's outputs on the dense model's
        activations, (B, T, H) per batch.
        """

    def after_model(self, model: nn.Module, dense: Activations) -> dict | None:
        """Train the pruned, offloaded model in place; returns plain values for the record, or None.

        dense: the dense model's activations after its last block.
        """

    def on_text(self, model: nn.Module, lesson: Any) -> dict | None:
        """Train the pruned, offloaded model in place on text; returns plain values for the record, or None.

        lesson: a heal.text.Lesson.
        """


def names() -> list[str]:
    """All `--heal` methods, sorted."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "Heal"))


def module(name: str) -> ModuleType:
    """The module of one method. Raises ValueError naming `--heal` when there is none."""
    if name not in names():
        raise ValueError(f"--heal {name}: no such method; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def stages(method: ModuleType) -> list[str]:
    """The stages that a method overrides."""
    return [stage for stage in STAGES if getattr(method.Heal, stage) is not getattr(Heal, stage)]


def trains_on_text(name: str) -> bool:
    """Whether a method trains on `--heal-data` (and not on the calibration windows)."""
    return name in names() and stages(module(name)) == ["on_text"]


def check_order(methods: list[ModuleType], text: str) -> None:
    """Raise ValueError naming `--heal` if a method is given twice, or methods stand in another order than their stages.

    text: the flag's value. (Settings and record have one place per method.)
    """
    if len(set(methods)) < len(methods):
        once = ",".join(dict.fromkeys(m.__name__.rsplit(".", 1)[-1] for m in methods))
        raise ValueError(f"--heal {text}: each method once: --heal {once}")
    in_order = sorted(methods, key=lambda m: STAGES.index(stages(m)[-1]))
    if in_order != list(methods):
        right = ",".join(m.__name__.rsplit(".", 1)[-1] for m in in_order)
        raise ValueError(f"--heal {text}: methods that heal single blocks come first, those that train on text last: "
                         f"--heal {right}")
