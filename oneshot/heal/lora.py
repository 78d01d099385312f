"""LoRA: train a low-rank change of each linear on text (`--heal-data`) that respects the zeros, and merge it exactly.

    Ŵ    W + M ⊙ (B A)·alpha/r, with A (r, C), B (R, r), and M the mask of the kept weights (SQFT's SparsePEFT, arXiv
         2410.03750): what is trained is what is merged, and no zero is lost

Memory: the weights once more (Ŵ, for the backward pass), but gradients and Adam's averages of A and B alone. r, alpha,
dropout, targets: peft's r, lora_alpha, lora_dropout, target_modules. Dropout leaves out inputs of a linear for all
tokens of a step.

With `--lora.adapter` there is no mask: this is plain LoRA, saved unmerged too, as peft's adapter of `--model`. So that
must be dense. A few weights are exactly zero in any dense model of 16 bits; there they are weights like any other.
"""

import fnmatch
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from .. import models
from ..models import Weight
from ..runtime import environment
from ..runtime.flag import flag
from ..runtime.proof import prove
from . import Heal as Base
from . import Run, text
from .text import memory
from .text.student import Lesson

ALL = "all-linear"
RATES = (0.001, 0.0005, 0.00025)  # from which one is chosen where none is given
PRUNED = 0.01  # share of zeros from which on a model is no dense one; SmolLM2-135M cut to three quarters has 0.00025
FILLS = "which an adapter that is added later would fill; leave it out, the merged model has the change in it"


@dataclass(frozen=True)
class Config:
    r: int = flag(16, "rank")
    alpha: float = flag(32.0, "scale of the change, divided by r")
    dropout: float = flag(0.0, "share of a linear's inputs that the change leaves out in each step")
    targets: str = flag(ALL, "linears that are changed: all-linear, or ends of their names such as q_proj,v_proj")
    lr: float | None = flag(None, "learning rate of Adam; lowered where it does harm (default: found on the first "
                                  "steps)")
    adapter: str | None = flag(None, "folder to save the change in unmerged as well, for peft; only for a dense "
                                     "model", bears_on="output")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate that is given, or else those to choose among."""
        return RATES if self.lr is None else (self.lr,)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"--lora.r {self.r}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--lora.dropout {self.dropout:g}: give a share from 0 to below 1")
        if not (self.alpha > 0 and (self.lr is None or self.lr > 0)):
            raise ValueError("--lora.alpha, --lora.lr: must be above 0")


def check_model(model: nn.Module, cfg: Config, run: Run) -> None:
    """Raise ValueError naming `--lora.targets` if nothing matches one of them, `--lora.adapter` if zeros would go,
    `--heal` if the memory is too small."""
    memory.check(model, "lora", run, held(model, cfg, torch.device(run.device)))
    weights = list(models.all_weights(model)) if cfg.adapter else []
    total = sum(w.size for w in weights)
    zeros = total - sum(int(w.get().count_nonzero()) for w in weights)
    if zeros > PRUNED * total:
        raise ValueError(f"--lora.adapter {cfg.adapter}: {zeros / total:.0%} of the model's weights are zero, {FILLS}")


def held(model: nn.Module, cfg: Config, device: torch.device) -> memory.Held:
    """What training takes beside the model, which is as it is stored."""
    weights = targets(model, cfg)
    trained, sizes = cfg.r * sum(sum(w.shape) for w in weights), [w.size for w in weights]
    found = memory.held(model, device, trained, 0 if cfg.adapter else sum(sizes), 4 * trained)
    return replace(found, remade=sum(sizes), largest=max(sizes, default=0))


def targets(model: nn.Module, cfg: Config) -> list[Weight]:
    """The weights that are changed; those of fused experts cannot be."""
    every = [w for w in models.all_weights(model) if w.expert is None]
    ends = ["*"] if cfg.targets == ALL else [f"*.{part.strip()}" for part in cfg.targets.split(",")]
    for end in ends:
        if not fnmatch.filter([f".{w.name}" for w in every], end):
            raise ValueError(f"--lora.targets {end.removeprefix('*.')}: matches no linear; give all-linear, or ends of "
                             f"names such as {next(w.name for w in models.all_weights(model)).rpartition('.')[2]}")
    return [w for w in every if any(fnmatch.fnmatch(f".{w.name}", end) for end in ends)]


class Change(nn.Module):
    """The parametrization of one weight. mask: bool, of the weight's shape as it is stored, or None to change all."""

    def __init__(self, weight: Weight, mask: torch.Tensor | None, cfg: Config, gen: torch.Generator) -> None:
        super().__init__()
        (R, C), device = weight.shape, weight.parameter.device
        bound = math.sqrt(3 / C) / math.sqrt(3)  # kaiming_uniform with a = √5, as in peft
        self.A = nn.Parameter((torch.rand(cfg.r, C, generator=gen) * 2 - 1).mul_(bound).to(device))
        self.B = nn.Parameter(torch.zeros(R, cfg.r, device=device))
        self.mask, self.scale, self.dropout, self.transposed = mask, cfg.alpha / cfg.r, cfg.dropout, weight.transposed

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        """Ŵ, in the dtype and layout of W."""
        with torch.autocast(W.device.type, enabled=False):  # what is merged must be what was trained
            A = self.A
            if self.training and self.dropout:
                A = A * (torch.rand_like(A[:1]) >= self.dropout) / (1 - self.dropout)
            change = self.B @ A * self.scale
            change = change.T if self.transposed else change
            return W + (change if self.mask is None else change * self.mask)


class Adapters:
    """The changes of a model's weights, at work: a `text.Trained`.

    Within the context the modules use Ŵ; on leaving it the weights are Ŵ, rounded to their stored dtype, which is
    proved: `merge_error` is the largest difference as a share of Ŵ. There are no masks where the changes are to be an
    adapter (`cfg.adapter`).
    """

    merge_error = 0.0

    def __init__(self, weights: list[Weight], cfg: Config, seed: int = 0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.weights, self.rounded, self.final = weights, None, {}
        masks = (None if cfg.adapter else w.parameter.data != 0 for w in weights)
        self.masks = [None if mask is None or mask.all() else mask for mask in masks]
        self.changes = [Change(w, mask, cfg, gen) for w, mask in zip(weights, self.masks, strict=True)]
        self.parameters = {f"{w.name}.{name}": p for w, change in zip(weights, self.changes, strict=True)
                           for name, p in change.named_parameters()}

    def __enter__(self) -> "Adapters":
        for weight, change in zip(self.weights, self.changes, strict=True):
            weight.parameter.requires_grad_(False)
            parametrize.register_parametrization(weight.owner, "weight", change, unsafe=True)
        return self

    @torch.no_grad()
    def __exit__(self, *_: Any) -> None:
        self.round()
        for weight, mask in zip(self.weights, self.masks, strict=True):
            parametrize.remove_parametrizations(weight.owner, "weight", leave_parametrized=False)
            prove(weight.owner.weight is weight.parameter, f"{weight.name}: merging replaced its parameter")
            prove(mask is None or not weight.parameter.data[~mask].any(), f"{weight.name}: a pruned weight came back")
        self.prove_merged()

    def prove_merged(self) -> None:
        """Put Ŵ together once more from what was trained, and prove that the weights are it, rounded once.

        Raises ProofError naming the linear. Below the normal numbers of the stored dtype, whose spacing is absolute,
        the difference is a share of the least of these.
        """
        for weight, change, before in zip(self.weights, self.changes, self.rounded, strict=True):
            for name in ("A", "B"):
                getattr(change, name).copy_(self.final[f"{weight.name}.{name}"])
            trained, kind = change(before.to(change.A)), torch.finfo(weight.stored)
            difference = (weight.parameter.data.to(weight.stored).to(trained) - trained).abs()
            error = float((difference / trained.abs().clamp(min=kind.smallest_normal)).max())
            prove(error <= kind.eps / 2, f"{weight.name}: is not what was trained, but off by {error:.2g} of it")
            self.merge_error = max(self.merge_error, error)

    def products(self) -> torch.dtype:
        """The dtype in which matrices are multiplied, as for `train.Trainable`."""
        short = all(w.stored.itemsize < 4 for w in self.weights)
        fast = environment.fast_bfloat16(self.weights[0].parameter.device)
        return torch.bfloat16 if short and fast else torch.float32

    def groups(self, lr: float) -> list[dict]:
        """One group for all."""
        return [{"params": list(self.parameters.values()), "lr": lr}]

    def mask_gradients(self) -> None:
        """Nothing to do: the mask is part of Ŵ."""

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of A and B."""
        return {name: p.data.clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        """Set A and B to a snapshot, and the weights to what they were."""
        if self.rounded is not None:
            for weight, W in zip(self.weights, self.rounded, strict=True):
                weight.parameter.data.copy_(W)
            self.rounded, self.final = None, {}
        for name, p in self.parameters.items():
            p.copy_(snapshot[name])

    @torch.no_grad()
    def round(self) -> None:
        """Merge: the weights become Ŵ, rounded to their stored dtype, and B zero."""
        before, self.final = [], self.final or self.snapshot()
        for weight, change in zip(self.weights, self.changes, strict=True):
            change.eval()
            before.append(weight.parameter.data.to("cpu", weight.stored, copy=True))
            merged = change(weight.parameter.data)
            weight.parameter.data.copy_(merged.to(weight.stored).add_(0.0))
            change.B.zero_()
        self.rounded = self.rounded or before

    def save(self, folder: str, cfg: Config, model: nn.Module) -> None:
        """Write the change as it was before it was merged, as peft's adapter of the folder that the model came from."""
        from peft import LoraConfig

        Path(folder).mkdir(parents=True, exist_ok=True)
        names, base = {w.name for w in self.weights}, model.config.name_or_path
        ends = {name.rpartition(".")[2] for name in names}
        reached = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
        LoraConfig(r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, task_type="CAUSAL_LM", inference_mode=True,
                   target_modules=sorted(ends if reached == names else names),
                   base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
                   fan_in_fan_out=self.weights[0].transposed).save_pretrained(folder)
        state = {f"base_model.model.{w.name}.lora_{name}.weight": self.final[f"{w.name}.{name}"].cpu()
                 for w in self.weights for name in ("A", "B")}
        save_file(state, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


class Heal(Base):
    """LoRA at work in one run, see above."""

    def on_text(self, model: nn.Module, lesson: Lesson) -> dict:
        """Train the changes on the lesson's text, then merge them."""
        weights, beside = targets(model, self.cfg), held(model, self.cfg, lesson.device)
        with models.resident(model, lesson.device, write_back=True, dtype=torch.float32), \
                Adapters(weights, self.cfg, self.seed) as adapters:
            found = text.heal(model, lesson, "lora", adapters, self.cfg.rates, beside)
        if self.cfg.adapter:
            adapters.save(self.cfg.adapter, self.cfg, model)
        fused = sum(w.size for w in models.all_weights(model) if w.expert is not None)
        if fused:
            found["warnings"].append(f"{fused / sum(w.size for w in models.all_weights(model)):.1%} of the weights are "
                                     "experts in one tensor, which --heal lora leaves as they are; use --heal full")
        return found | {"trained": sum(p.numel() for p in adapters.parameters.values()),
                        "merge_error": adapters.merge_error}
