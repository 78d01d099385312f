"""Heal: train what pruning kept, without losing a zero. One file, one method; its name is the `--heal` name.

A method is a module with

    Config       a frozen dataclass: its flags, each made by `runtime.flag.flag`
    Heal         the method at work on one run: a subclass of `heal.Heal` that overrides the stages it takes part in
    check_model  (model, cfg, device), where needed: raise ValueError naming the flag where the model or the device does
                 not allow it

Stages, in the order in which they come; each returns plain values for the record, with `warnings`, a list of str, for
every weaker path taken:

    before_block  the block is resident and still dense: look at it
    after_block   the block has been pruned: train it in place
    after_model   all blocks have been pruned: train the whole model in place

Law, tested for every method: a weight that is zero stays zero, bit by bit; its own held-out loss never gets worse.
What is trained lives in float32 and is rounded to the stored dtype at the end. The calibration windows are all the
data. A tenth of them, rounded up, is held out: drawn once a run by its seed, in batches of its own, the same for every
block and every method, so none judges by windows that another has trained on (solvers and their statistics do see
them). A run with one window holds out nothing, keeps the last state and warns.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..calibrate import Activations
from ..models import Block

STAGES = ("before_block", "after_block", "after_model")


class Heal:
    """A healing method at work on one run; a method overrides the stages it takes part in.

    cfg: its Config. seed: of all that is random. progress: whether to show bars.
    """

    def __init__(self, cfg: Any, seed: int = 0, progress: bool = False):
        self.cfg, self.seed, self.progress = cfg, seed, progress

    def before_block(self, block: Block, dense: Activations) -> None:
        """Look at the resident, still dense block. dense: the dense model's activations at it."""

    def after_block(self, block: Block, activations: Activations, targets: list[torch.Tensor]) -> dict | None:
        """Train the pruned, resident block in place.

        activations: the pruned model's at this block. targets: the dense block's outputs on the dense model's
        activations, one (B, T, H) a batch.
        """

    def after_model(self, model: nn.Module, dense: Activations) -> dict | None:
        """Train the pruned, offloaded model in place. dense: the dense model's activations behind its last block."""


def names() -> list[str]:
    """All `--heal` methods there are."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "Heal")
                  and name != "train")


def module(name: str) -> ModuleType:
    """The module of one method. Raises ValueError naming `--heal` when there is none."""
    if name not in names():
        raise ValueError(f"--heal {name}: no such method; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def stages(method: ModuleType) -> list[str]:
    """The stages that a method takes part in."""
    return [stage for stage in STAGES if getattr(method.Heal, stage) is not getattr(Heal, stage)]


def check_order(methods: list[ModuleType], text: str) -> None:
    """Raise ValueError naming `--heal` where a method for single blocks stands behind one for the whole model, or one
    stands there twice: settings and record have one place for each."""
    if len(set(methods)) < len(methods):
        once = ",".join(dict.fromkeys(m.__name__.rsplit(".", 1)[-1] for m in methods))
        raise ValueError(f"--heal {text}: each method once: --heal {once}")
    whole = ["after_block" not in stages(m) for m in methods]
    if whole != sorted(whole):
        right = ",".join(m.__name__.rsplit(".", 1)[-1] for m in sorted(methods, key=lambda m: "after_block"
                                                                       not in stages(m)))
        raise ValueError(f"--heal {text}: what heals block by block comes first: --heal {right}")
