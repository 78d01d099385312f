"""Weights: every prunable weight of a block as an (R, C) matrix, however the model stores it.

    linear  one linear layer: nn.Linear with a weight (R, C), transformers' Conv1D with (C, R), or one expert of a fused
            3-D parameter (E, R, C) or (E, C, R)
    R, C    its outputs and inputs

Weights are found generically; what is specific to a model family is in the tables below and nowhere else.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import layout

LEFT_ALONE = {  # {one of the last two parts of a linear's name: why it is never pruned}
    "gate": "router", "router": "router", "shared_expert_gate": "router", "classifier": "router",
    "altup": "mixing coefficients",  # Gemma 3n: 16x4 at most; they weight whole copies of the hidden state
}
UNKNOWN = "no linear this program knows"
ATTENTION = ("attn", "attention", "mamba")  # the block's child that mixes tokens has one of these in its name


@dataclass
class Weight:
    """The weight of one linear as an (R, C) matrix, rows = outputs.

    linear: the linear's name within the block, including the expert's number. kind: the same without that number.
    owner: the module whose input it multiplies. parameter: where it is stored. expert: the expert's number, or None.
    transposed: whether it is stored as (C, R). stored: the dtype it is saved in. block: the block's name in the model,
    "" if only the block is known. fetch: called before the weight is read, with True before it is written, where the
    model is on disk.
    """

    linear: str
    kind: str
    owner: nn.Module
    parameter: nn.Parameter
    expert: int | None
    transposed: bool
    stored: torch.dtype
    block: str = ""
    fetch: Callable[..., None] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The linear's full name in the model, such as "model.layers.3.mlp.up_proj"."""
        return f"{self.block}.{self.linear}" if self.block else self.linear

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        R, C = self.parameter.shape[-2:]
        return (C, R) if self.transposed else (R, C)

    @property
    def size(self) -> int:
        """R·C."""
        return self.shape[0] * self.shape[1]

    def _slice(self) -> torch.Tensor:
        w = self.parameter.data if self.expert is None else self.parameter.data[self.expert]
        return w.T if self.transposed else w

    def get(self) -> torch.Tensor:
        """The weight (R, C) in float32 (float64 if stored so). It may share memory with the model: do not modify it."""
        if self.fetch:
            self.fetch()
        w = self._slice()
        return w if w.dtype == torch.float64 else w.float()

    def set(self, W: torch.Tensor, rounds: bool = True) -> None:
        """Write W (R, C) into the model; negative zeros become +0.0. rounds: to the stored dtype first."""
        if self.fetch:
            self.fetch(True)
        self._slice().copy_(W.to(self.stored).add_(0.0) if rounds else W + 0.0)


def weights_of(block: nn.Module, name: str = "") -> tuple[list[Weight], list[tuple[str, str]]]:
    """(weights, skipped): every prunable weight of a block named `name`, and [(parameter name, why it is not pruned)].

    Call it while the block is offloaded (not `resident`), because the stored dtype is taken from the parameters.
    """
    weights, skipped, reached = [], [], set()
    for linear, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            parameter = f"{linear}.weight"
            reached.add(parameter)
            if not module.weight.numel():
                continue  # what is left of a part that was cut off as a whole (uneven.py)
            if left_alone(linear):
                skipped.append((parameter, left_alone(linear)))
            elif not module.weight.is_floating_point() or module.weight.element_size() < 2:
                skipped.append((parameter, f"quantised weight ({module.weight.dtype})"))
            else:
                weights.append(Weight(linear, linear, module, module.weight, None, isinstance(module, Conv1D),
                                      module.weight.dtype, name))
        elif experts := layout(module):
            for part in experts.parts:
                kind, parameter = f"{linear}.{part}", getattr(module, part)
                reached.add(kind)
                weights += [Weight(f"{kind}.{e}", kind, module, parameter, e, experts.is_transposed, parameter.dtype,
                                   name) for e in range(parameter.shape[0])]
    for parameter, p in block.named_parameters():
        if parameter not in reached and p.ndim >= 2:
            owner, _, last = parameter.rpartition(".")
            skipped.append((parameter, left_alone(owner) or ("bias" if "bias" in last else
                            f"{UNKNOWN}, shape {tuple(p.shape)}")))
    return weights, [(f"{name}.{parameter}" if name else parameter, why) for parameter, why in skipped]


def left_alone(name: str) -> str | None:
    """Why the linear of this name is never pruned, or None if it may be."""
    return next((LEFT_ALONE[part] for part in name.split(".")[-2:] if part in LEFT_ALONE), None)


def untouched(block: nn.Module) -> set[str]:
    """Names of the block's parameters that neither pruning nor healing changes: routers and unrecognised matrices."""
    routers = {name for name, _ in block.named_parameters() if left_alone(name.rpartition(".")[0])}
    return routers | {name for name, _ in weights_of(block)[1]}


def mlp(block: nn.Module) -> list[Weight]:
    """The weights of all linears of a block that are not part of its attention: MLP, experts, per-layer inputs.

    Raises ValueError when attention and MLP cannot be told apart.
    """
    def attends(name: str) -> bool:
        return any(word in name.partition(".")[0] for word in ATTENTION)

    weights, skipped = weights_of(block)
    rest = [weight for weight in weights if not attends(weight.name)]
    unknown = [name for name, why in skipped if not attends(name) and why not in ("bias", *LEFT_ALONE.values())]
    if len(rest) in (0, len(weights)) or unknown:
        found = f"{unknown[0]} is no linear this program knows" if unknown else \
            f"its linears are {', '.join(weight.name for weight in weights) or 'none'}"
        raise ValueError(f"attention and MLP of {type(block).__name__} cannot be told apart: {found}")
    return rest


@contextlib.contextmanager
def silent(weights: Sequence[Weight]) -> Iterator[None]:
    """Within the context, the modules that hold these weights return zeros without computing anything."""
    def zeros(x: torch.Tensor, *_: Any, shape: tuple[int, int], **__: Any) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], shape[0])

    owners = {id(w.owner): (w.owner, w.shape) for w in weights}  # of fused experts the last shape counts: down_proj's
    before = {key: owner.__dict__.get("forward") for key, (owner, _) in owners.items()}
    try:
        for owner, shape in owners.values():
            owner.forward = functools.partial(zeros, shape=shape)
        yield
    finally:
        for key, (owner, _) in owners.items():
            del owner.forward
            if before[key] is not None:
                owner.forward = before[key]
