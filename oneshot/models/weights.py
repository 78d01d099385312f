"""Weights: every prunable weight of a block as an (R, C) matrix, whatever way the model stores it.

    weight  one linear's: nn.Linear (R, C), transformers' Conv1D (C, R), or one expert's slice of a fused 3-D parameter
            (E, R, C) or (E, C, R)

Everything is found generically; what is peculiar to a family stands in the tables below and nowhere else.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .experts import layout

LEFT_ALONE = {  # one of the last two parts of a linear's name: why it is never pruned
    "gate": "router", "router": "router", "shared_expert_gate": "router", "classifier": "router",
    "altup": "mixing coefficients",  # Gemma-3n: 16x4 at most, they weigh whole copies of the hidden state
}
UNKNOWN = "no linear this program knows"
ATTENTION = ("attn", "attention", "mamba")  # one is in the name of the block's child that mixes tokens


@dataclass
class Weight:
    """One linear's weight as an (R, C) matrix, rows = outputs.

    linear: its name within the block, with the expert's number. kind: the same without it. owner: the module that is
    fed. expert: its number, or None. transposed: whether it is stored as (C, R). stored: dtype it is saved in. block:
    the block's name in the model, "" where only the block is known.
    """

    linear: str
    kind: str
    owner: nn.Module
    parameter: nn.Parameter
    expert: int | None
    transposed: bool
    stored: torch.dtype
    block: str = ""

    @property
    def name(self) -> str:
        """Full name in the model."""
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
        """(R, C), float32 (float64 if the parameter is), not to be written to."""
        w = self._slice()
        return w if w.dtype == torch.float64 else w.float()

    def set(self, W: torch.Tensor) -> None:
        """Write W (R, C), rounded to the stored dtype; every zero becomes +0.0."""
        self._slice().copy_(W.to(self.stored).add_(0.0))


def weights_of(block: nn.Module, name: str = "") -> tuple[list[Weight], list[tuple[str, str]]]:
    """(weights, skipped): every prunable weight of a block called `name`, and [(parameter name, why it is left alone)].

    Call it while the block is offloaded (not `resident`): the stored dtype is read off the parameters.
    """
    weights, skipped, reached = [], [], set()
    for linear, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            parameter = f"{linear}.weight"
            reached.add(parameter)
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
    """Why the linear of this name is never pruned, or None."""
    return next((LEFT_ALONE[part] for part in name.split(".")[-2:] if part in LEFT_ALONE), None)


def untouched(block: nn.Module) -> set[str]:
    """Names of a block's parameters that neither pruning nor healing changes: routers, and what it does not know."""
    routers = {name for name, _ in block.named_parameters() if left_alone(name.rpartition(".")[0])}
    return routers | {name for name, _ in weights_of(block)[1]}


def mlp(block: nn.Module) -> list[Weight]:
    """The weights of a block's linears behind its attention (or beside it): MLP, experts, per-layer inputs.

    Raises ValueError when attention and the rest cannot be told apart.
    """
    def attends(name):
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
def silent(weights: Sequence[Weight]):
    """The modules that hold these weights give zeros, and compute nothing."""
    def zeros(x, *_, shape, **__):
        return x.new_zeros(*x.shape[:-1], shape[0])

    owners = {id(w.owner): (w.owner, w.shape) for w in weights}  # of experts, the last one's: the way down
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
