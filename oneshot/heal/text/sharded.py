"""Sharded: training in which the processes of torchrun divide the weights, gradients and Adam's averages (FSDP2).

torch's `fully_shard` cuts each matrix along its first dimension; a block is put together while it is computed with. It
is a copy that is trained: the model itself waits as it is stored, and gets the result at the end.

transformers' Trainer takes such a model as it takes one that was sharded while loading, but cannot keep the optimiser's
state of one. So each process keeps its own part in the checkpoint (`Shards` in trainer.py), as Trainer does with random
states.
"""

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ... import models
from ...runtime import distributed
from ...runtime.proof import prove
from ..train import Trainable, rms

VARIABLE = "ACCELERATE_USE_FSDP"  # accelerate's own name; its FSDP knows GPUs alone


def asked() -> bool:
    """Whether the environment asks for it, in any of the words that accelerate takes."""
    return os.environ.get(VARIABLE, "false").lower() in ("true", "1", "yes", "y", "on", "t")


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that cannot be sharded, where the environment asks for it.

    Of experts that are linears of their own, those of a process without tokens have no gradient; FSDP2 would add up
    those of others.
    """
    lists = [name for name, module in models.blocks(model)[1].named_modules()
             if isinstance(module, nn.ModuleList) and "expert" in name]
    why = "its experts are linears of their own" if lists else "its blocks share weights"
    if asked() and (lists or models.shares_weights(model)):
        raise ValueError(f"{VARIABLE}: is set, and --model cannot be divided among processes ({why}); unset it")


class Sharded(Trainable):
    """A Trainable of which each process has a part: `model` is the copy that is trained.

    original: the model, which gets the result on leaving the context. device: where to train. stored, leave: as for
    Trainable.
    """

    def __init__(self, original: nn.Module, device: torch.device, stored: dict[str, torch.dtype],
                 leave: Iterable[str]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        leave, mesh = set(leave), init_device_mesh(device.type, (distributed.world(),))
        self.original = original
        self.model = copy.deepcopy(original, {id(p): nn.Parameter(p.data, requires_grad=False)
                                              for p in original.parameters()})
        _, block_list = models.blocks(self.model)
        for name, p in block_list.named_parameters():
            p.requires_grad_(p.is_floating_point() and name not in leave)
        parts = [(block.module, models.tensors_of(block.module)) for block in models.walk(self.model)]
        rest = models.rest_of(self.model, block_list)
        for module, tensors in [*parts, (self.model, rest)]:
            for t in tensors:
                weight = isinstance(t, nn.Parameter) and t.is_floating_point()
                t.data = t.data.to(device, torch.float32 if weight else t.dtype)
            fully_shard(module, mesh=mesh)
        super().__init__(block_list, stored, leave)

    def __enter__(self) -> "Sharded":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.give_back()

    @torch.no_grad()
    def give_back(self) -> None:
        """Write what was trained, rounded, into the original model."""
        originals = dict(models.blocks(self.original)[1].named_parameters())
        for name, p in self.parameters.items():
            t = originals[name]
            zeros = t == 0 if name in self.masks else None
            t.copy_(p.full_tensor().to(self.stored[name]).add_(0.0))
            prove(zeros is None or not t[zeros].any(), f"{name}: a pruned weight came back")

    def groups(self, lr: float) -> list[dict]:
        """As Trainable's."""
        sizes = {name: rms(p.data.full_tensor(), self.masks[name].full_tensor() if name in self.masks else None)
                 for name, p in self.parameters.items()}
        return self.groups_of(sizes, lr)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """As Trainable's, of this process's part."""
        return {name: p.to_local().detach().to("cpu", self.stored[name], copy=True)
                for name, p in self.parameters.items()}

    @torch.no_grad()
    def round(self) -> None:
        """As Trainable's."""
        for name, p in self.parameters.items():
            p.to_local().copy_(p.to_local().to(self.stored[name]))

    @torch.no_grad()
    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        """As Trainable's."""
        for name, p in self.parameters.items():
            p.to_local().copy_(snapshot[name])


def is_sharded(p: torch.Tensor) -> bool:
    """Whether this process has a part of a tensor alone."""
    return hasattr(p, "full_tensor")


def whole(p: torch.Tensor) -> torch.Tensor:
    """A parameter's values, put together from all processes."""
    return p.detach().full_tensor() if is_sharded(p) else p.data


@torch.no_grad()
def fill(p: torch.Tensor, values: torch.Tensor) -> None:
    """Set a parameter to its values, of which each process has all."""
    if not is_sharded(p):
        p.copy_(values)
        return
    from torch.distributed.tensor import distribute_tensor

    p.copy_(distribute_tensor(values.to(p.device), p.device_mesh, p.placements))


class Adam(torch.optim.AdamW):
    """AdamW whose state, as it is kept, is that of this process's part."""

    def state_dict(self) -> dict[str, Any]:
        """See the class."""
        found = super().state_dict()
        local = {i: {key: t.to_local() if is_sharded(t) else t for key, t in own.items()}
                 for i, own in found["state"].items()}
        return found | {"state": local}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See the class."""
        from torch.distributed.tensor import DTensor

        parameters = [p for group in self.param_groups for p in group["params"]]

        def placed(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        state = {i: {key: t if key == "step" else placed(t, parameters[i]) for key, t in own.items()}
                 for i, own in state_dict["state"].items()}
        super().load_state_dict(state_dict | {"state": state})


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Within the context, accelerate does not look at VARIABLE."""
    before = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[VARIABLE] = before
