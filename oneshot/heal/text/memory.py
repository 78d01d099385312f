"""Memory: what healing on text takes, and how it is made to fit before it starts.

Bytes per number, in training: weights 4; of those that are trained also gradients 4, Adam's averages 8, and what `Held`
says. The activations that the backward pass needs are, per token, the inputs and outputs of all linears, FACTOR times,
in float32; with gradient checkpointing, each block's input and one block's activations. The logits are held LOGITS
times, in float32. Of a sharded model (sharded.py) each process has its part of all but the activations.

It is planned twice: by `check` before anything is computed, of a model that may yet be cut, and when training begins.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ... import models
from ...runtime import distributed, environment
from ...runtime.flag import listed
from .. import Run
from ..options import HealOptions
from .sharded import asked
from .student import windows_of

FACTOR, LOGITS = 1.5, 4
SPARE = 0.9  # of the free memory may be used
ONCE = 2048  # tokens: more at once are no faster
STATE = 12  # bytes beside the weight: gradient, Adam's averages
HALF = 2  # bytes of a weight that autocast has cast
MAKING = 3  # float32 copies of a weight while it is put together


@dataclass(frozen=True)
class Held:
    """What a method holds beside the model in float32.

    trained: numbers that have gradients and Adam's averages. masks: bytes. remade: weights that are put together anew
    in a step (LoRA's Ŵ), and stay until its backward pass; largest: of the largest of them. cast: weights that autocast
    copies, until the backward pass too. stored: bytes of the stored weights and of the start, in the computer's memory.
    """

    trained: int
    masks: int
    remade: int = 0
    largest: int = 0
    cast: int = 0
    stored: int = 0


def held(model: nn.Module, device: torch.device, trained: int, masked: int, start: int) -> Held:
    """The Held of a method that puts no weights together. masked: numbers with a mask. start: bytes of the start.

    model: as it is stored.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    short = all(p.element_size() < 4 for p in weights) and environment.fast_bfloat16(device)
    stored = sum(p.nbytes for p in weights if p.dtype != torch.float32)
    return Held(trained, masked, cast=sum(p.numel() for p in weights) * short, stored=stored + start)


@dataclass(frozen=True)
class Task:
    """What is to fit. name: of the method. teacher: bytes of the dense model beside the student. left: the share of the
    blocks that is healed, of a model that is yet to be cut."""

    name: str
    options: HealOptions
    device: torch.device
    held: Held
    teacher: int = 0
    left: float = 1.0


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


def check(model: nn.Module, name: str, run: Run, held: Held) -> None:
    """Raise ValueError naming `--heal` if there is too little memory, now, to train the model by the method `name`.

    A dense model that will lie beside it is taken to be as large as the model is before it is cut.
    """
    options, device = run.options, torch.device(run.device)
    beside = set(listed(options.heal_loss)) & {"kl", "hidden"} and options.heal_cache is None
    total = sum(p.numel() for p in model.parameters())
    short = next(p.element_size() for p in model.parameters() if p.is_floating_point()) < 4
    teacher = total * (HALF if short and environment.fast_bfloat16(device) else 4) if beside else 0
    free = environment.free_memory(device)
    fit(model, Task(name, options, device, held, teacher, run.left), free and free // sharing(device))


def fit(model: nn.Module, task: Task, free: int | None) -> Fit:
    """The fastest Fit that the memory allows. free: bytes that may be used beside those that the model takes on the
    device already; None: any number.

    Many windows at once are tried first, up to ONCE tokens, then gradient checkpointing.

    Raises ValueError naming `--heal` when nothing fits.
    """
    seqlen, windows = task.options.heal_seqlen, windows_of(task.options) // distributed.world()
    fixed, whole, once = parts_of(model, task)
    there = 0 if asked() else sum(p.nbytes for p in model.parameters() if p.device.type == task.device.type)
    for checkpointing in (False, True):
        for count in range(windows, 0, -1):
            if windows % count or count * seqlen > max(ONCE, seqlen):
                continue
            needed = int(fixed + (once if checkpointing else whole)
                         + count * seqlen * per_token(model, checkpointing, task.left))
            if free is None or needed - there <= SPARE * free:
                return Fit(count, windows // count, checkpointing, needed)
    other = "--heal lora" if task.name != "lora" else "a smaller model"
    cached = "give --heal-cache, which needs no dense model in memory, " if task.teacher else ""
    raise ValueError(f"--heal {task.name}: takes at least {needed / 2**30:.1f} GiB on {task.device}, where "
                     f"{(there + free) / 2**30:.1f} are free for it; {cached}lower --heal-seqlen, or use {other}")


def parts_of(model: nn.Module, task: Task) -> tuple[float, float, float]:
    """(bytes that are held all the time, those until the backward pass, the same with gradient checkpointing)."""
    held, left, blocks = task.held, task.left, models.blocks(model)[1]
    inside = sum(p.numel() for p in blocks.parameters())
    rest = sum(p.numel() for p in model.parameters()) - inside
    fixed = 4 * (rest + left * inside) + left * (STATE * held.trained + held.masks)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    if asked():  # a block is whole, with its gradients, where it is computed; so are all in bfloat16 until the backward
        return fixed // distributed.world() + 8 * largest + task.teacher, HALF * held.trained, 0
    on_cpu = left * held.stored + environment.freed_memory(4 * largest) if task.device.type == "cpu" else 0
    fixed += task.teacher + on_cpu + 4 * left * held.trained * (distributed.world() > 1)  # gradients to be averaged
    making = MAKING * 4 * held.largest
    return fixed, making + left * (4 * held.remade + HALF * held.cast), making + 4 * held.remade / len(blocks)


def least_free(device: torch.device) -> int | None:
    """Bytes that a process may have on the device, of torchrun's the one with least; None if a system does not say.

    On a CPU, the processes of a machine share its memory.
    """
    with distributed.joined():
        found = distributed.gathered(environment.free_memory(device))
    return None if None in found else min(found) // sharing(device)


def sharing(device: torch.device) -> int:
    """How many processes share the memory of a device."""
    return distributed.local() if device.type == "cpu" else 1


def per_token(model: nn.Module, checkpointing: bool, left: float = 1.0) -> int:
    """Bytes of activations and logits for one token. left: as in Task."""
    _, block_list = models.blocks(model)
    sizes = dict.fromkeys(range(len(block_list)), 0)
    for name, p in block_list.named_parameters():
        linear = p.ndim > 1 and not name.endswith((".A", ".B"))  # of lora.Change, which only make weights
        sizes[int(name.partition(".")[0])] += sum(p.shape[-2:]) if linear else 0
    blocks = list(sizes.values())
    width = model.get_input_embeddings().weight.shape[-1]
    saved = max(blocks) * FACTOR + len(blocks) * width if checkpointing else sum(blocks) * FACTOR
    return int(4 * (left * saved + LOGITS * models.config_of(model).vocab_size))
