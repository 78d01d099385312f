"""Memory: what healing on text takes, and how it is made to fit before it starts.

Bytes per number, in training: weights 4; of those that are trained also gradients 4, Adam's averages 8, the mask 1.
The activations that the backward pass needs are, per token, the inputs and outputs of all linears, FACTOR times, in
float32; with gradient checkpointing, each block's input and one block's activations. The logits are held LOGITS times,
in float32. Of a sharded model (sharded.py) each process has its part of all but the activations.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ... import models
from ...runtime import distributed, environment
from .sharded import asked
from .student import Lesson
from .teacher import Live

FACTOR, LOGITS = 1.5, 4
SPARE = 0.9  # of the free memory may be used
ONCE = 2048  # tokens: more at once are no faster
STATE = 13  # bytes beside the weight: gradient, Adam's averages, mask
HALF = 2  # bytes of a weight that autocast has cast


@dataclass(frozen=True)
class Fit:
    """How a step is computed: windows at once, how many such parts a step has, whether activations are recomputed."""

    windows: int
    parts: int
    checkpointing: bool
    bytes: int

    def said(self) -> str:
        """One line."""
        return (f"{self.bytes / 2**30:.1f} GiB expected: {self.windows} window{'s' * (self.windows > 1)} at once, "
                f"{self.parts} a step" + (", activations computed twice (gradient checkpointing)" * self.checkpointing))


def fit(model: nn.Module, trained: int, lesson: Lesson, name: str, free: int | None = None) -> Fit:
    """The fastest Fit that the memory allows. trained: numbers. name: the method.

    free: bytes that may be used (default: what is free on the device, in the process that has least: all compute a step
    alike). Many windows at once are tried first, up to ONCE tokens, then gradient checkpointing.

    Raises ValueError naming `--heal` when nothing fits.
    """
    seqlen, device, windows = lesson.options.heal_seqlen, lesson.device, lesson.windows // distributed.world()
    free = least_free(device) if free is None else free
    teacher = lesson.teacher.bytes if isinstance(lesson.teacher, Live) else 0
    fixed, whole = 4 * sum(p.numel() for p in model.parameters()) + STATE * trained, 0
    if asked():  # a block is whole, with its gradients, where it is computed; so are all in bfloat16 until the backward
        block = max(sum(p.numel() for p in block.module.parameters()) for block in models.walk(model))
        fixed, whole = fixed // distributed.world() + 8 * block, HALF * trained
    fixed += teacher
    for checkpointing in (False, True):
        for count in range(windows, 0, -1):
            if windows % count or count * seqlen > max(ONCE, seqlen):
                continue
            needed = fixed + whole * (not checkpointing) + count * seqlen * per_token(model, checkpointing)
            if free is None or needed <= SPARE * free:
                return Fit(count, windows // count, checkpointing, needed)
    other = "--heal lora" if name != "lora" else "a smaller model"
    raise ValueError(f"--heal {name}: takes at least {needed / 2**30:.1f} GiB on {device}, where "
                     f"{free / 2**30:.1f} are free; lower --heal-seqlen, or use {other}")


def least_free(device: torch.device) -> int | None:
    """Bytes that a process may have on the device, of torchrun's the one with least; None if a system does not say.

    On a CPU, the processes of a machine share its memory.
    """
    with distributed.joined():
        found = distributed.gathered(environment.free_memory(device))
    return None if None in found else min(found) // (distributed.local() if device.type == "cpu" else 1)


def per_token(model: nn.Module, checkpointing: bool) -> int:
    """Bytes of activations and logits for one token."""
    _, block_list = models.blocks(model)
    sizes = dict.fromkeys(range(len(block_list)), 0)
    for name, p in block_list.named_parameters():
        sizes[int(name.partition(".")[0])] += sum(p.shape[-2:]) if p.ndim > 1 else 0
    blocks = list(sizes.values())
    width = model.get_input_embeddings().weight.shape[-1]
    saved = max(blocks) * FACTOR + len(blocks) * width if checkpointing else sum(blocks) * FACTOR
    return int(4 * (saved + LOGITS * models.config_of(model).vocab_size))
