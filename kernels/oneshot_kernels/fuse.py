"""`sparsify`: put packed layers into a model, and fuse layers that read the same input into one launch.

Layers are found by attribute names: q_proj, k_proj, v_proj of a module share one launch; a module with gate_proj,
up_proj, down_proj and a SiLU becomes one SwiGLU launch and one plain launch. Fusion is checked: a fused MLP is compared
with the original once, and a fused projection checks that its input is the one that was computed with.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cpu.integers import IntegerLinear
from .linear import Sparse24Linear
from .reference import is_24
from .rounded import Rounded24Linear

SHARED_INPUT = ("q_proj", "k_proj", "v_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Report:
    """What `sparsify` did. replaced, fused: names of layers and groups. skipped, no_prefill_copy: {layer: reason}."""

    replaced: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    prefill_copy_bytes: int = 0
    no_prefill_copy: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = (
            f"2:4: {len(self.replaced)} layers packed, {len(self.fused)} groups fused, {len(self.skipped)} left dense"
        )
        if self.prefill_copy_bytes or self.no_prefill_copy:
            mib = self.prefill_copy_bytes / 2**20
            text += f", {mib:.0f} MiB of prefill copies ({len(self.no_prefill_copy)} impossible)"
        return text


class SharedLaunch:
    """One stacked layer for several projections of the same input.

    The first projection that is called computes all of them, the others take their part, and the last one releases the
    result. Not safe for two threads in the same model.
    """

    def __init__(self, parts: list[Sparse24Linear]) -> None:
        self.layer = _stack(parts)
        self.sizes = [part.out_features for part in parts]
        self.x: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def take(self, slot: int, x: torch.Tensor) -> torch.Tensor:
        """The projection number `slot` of x (..., K)."""
        if self.x is not x or slot not in self.outputs:
            self.x, self.outputs = x, dict(enumerate(self.layer(x).split(self.sizes, dim=-1)))
        y = self.outputs.pop(slot)
        if not self.outputs:
            self.x = None
        return y


class FusedProjection(nn.Module):
    """Takes the place of one of several projections. Slot 0 owns the stacked layer. state_dict is as before fusing."""

    def __init__(self, shared: SharedLaunch, slot: int) -> None:
        super().__init__()
        self.shared, self.slot = shared, slot
        self.in_features, self.out_features = shared.layer.in_features, shared.sizes[slot]
        if slot == 0:
            self.layer = shared.layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N of this slot)."""
        return self.shared.take(self.slot, x)

    def state_dict(self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "",
                   keep_vars: bool = False) -> dict[str, Any]:
        """This projection's row-major tensors, as before fusing."""
        destination = {} if destination is None else destination
        first = sum(self.shared.sizes[: self.slot])
        return _save_rows(destination, prefix, self.shared.layer, slice(first, first + self.out_features))


class FusedGatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)) in two launches. state_dict is as before fusing."""

    def __init__(self, gate: Sparse24Linear, up: Sparse24Linear, down: Sparse24Linear) -> None:
        super().__init__()
        self.gate_up = _stack([gate, up], swiglu=True)
        self.down_proj = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., K)."""
        return self.down_proj(self.gate_up(x))

    def state_dict(self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "",
                   keep_vars: bool = False) -> dict[str, Any]:
        """The row-major tensors of gate_proj, up_proj and down_proj, as before fusing."""
        destination = {} if destination is None else destination
        half = self.gate_up.out_features
        _save_rows(destination, prefix + "gate_proj.", self.gate_up, slice(0, half))
        _save_rows(destination, prefix + "up_proj.", self.gate_up, slice(half, 2 * half))
        return self.down_proj.state_dict(destination=destination, prefix=prefix + "down_proj.", keep_vars=keep_vars)


def sparsify(
    model: nn.Module, *, fuse: bool = True, prefill_copy: bool = False, skip: tuple[str, ...] = ("lm_head",),
    head: str | None = None, round_inputs: bool = False,
) -> Report:
    """Replace, in place, every nn.Linear with a 2:4 weight by a `Sparse24Linear`, then fuse. Returns what was done.

    Layers that are already packed (from a packed checkpoint) are prepared and fused too; those of int8 or int4 codes
    compute with the codes, where they are compiled. fuse: whether to fuse. round_inputs: whether these round their
    inputs to int8 as well: faster, and further from what was measured.
    prefill_copy: whether to keep copies for cuSPARSELt and print their size. skip: last parts of names to leave dense.
    head: "int8" rounds the output head, `lm_head`, to int8 (on a CPU): a fifth to a third of a small model's bytes.

    Raises ValueError if the model has no 2:4 layer, or if its head cannot be rounded.
    """
    if head not in (None, "int8"):
        raise ValueError(f"head={head!r}: give 'int8' or None")
    report = Report()
    for name, module in list(model.named_modules()):
        if isinstance(module, Sparse24Linear):
            module.prepare()
            report.replaced.append(name)
        elif isinstance(module, Rounded24Linear):
            if module.can_compile():
                _put(model, name, module.compiled(round_inputs))
            report.replaced.append(name)
        elif isinstance(module, nn.Linear):
            reason = _refuses(name, module, skip)
            if reason:
                report.skipped[name] = reason
                continue
            _put(model, name, Sparse24Linear.from_linear(module))
            report.replaced.append(name)
    if not report.replaced:
        raise ValueError("no linear layer of this model is 2:4; prune it to 2:4 first")
    if head:
        _round_head(model, report, round_inputs)
    if fuse:
        for name, module in list(model.named_modules()):
            _fuse_shared_input(name, module, report)
            _fuse_gated_mlp(model, name, module, report)
    if prefill_copy:
        _keep_prefill_copies(model, report)
    return report


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into the place of the one named `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _round_head(model: nn.Module, report: Report, round_inputs: bool) -> None:
    """Put an int8 twin in the place of `lm_head`. Raises ValueError if there is no plain one on a CPU."""
    head = getattr(model, "lm_head", None)
    if type(head) is not nn.Linear or head.weight.device.type != "cpu":
        raise ValueError("head='int8' needs a model with a plain nn.Linear lm_head on a CPU")
    model.lm_head = IntegerLinear.from_linear(head, round_inputs=round_inputs)
    report.skipped.pop("lm_head", None)
    report.replaced.append("lm_head (int8)")


def _keep_prefill_copies(model: nn.Module, report: Report) -> None:
    """Make the copies for cuSPARSELt, and print the report."""
    for name, module in model.named_modules():
        if not isinstance(module, Sparse24Linear):
            continue
        if reason := module.prefill_refuses():
            report.no_prefill_copy[name] = reason
            continue
        module.prepare(prefill_copy=True)
        report.prefill_copy_bytes += module.prefill_copy.numel()
    print(report)


def _refuses(name: str, linear: nn.Linear, skip: tuple[str, ...]) -> str | None:
    """Why a linear stays dense, or None."""
    if name.rpartition(".")[2] in skip:
        return "asked to skip"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, not a plain nn.Linear"
    return None if is_24(linear.weight) else "weight is not 2:4"


def _children(module: nn.Module, names: tuple[str, ...]) -> list[Sparse24Linear] | None:
    """The named children if all are packed layers of the same input size and dtype, which can be stacked; else None."""
    children = [getattr(module, name, None) for name in names]
    if not all(isinstance(child, Sparse24Linear) and not child.swiglu for child in children):
        return None
    same = {(c.in_features, c.weight.dtype, c.weight.device, c.bias is None) for c in children}
    return children if len(same) == 1 else None


def _fuse_shared_input(name: str, module: nn.Module, report: Report) -> None:
    """Fuse the projections in SHARED_INPUT of a module, if it has them."""
    parts = _children(module, SHARED_INPUT)
    if parts is None:
        return
    shared = SharedLaunch(parts)
    for slot, child in enumerate(SHARED_INPUT):
        setattr(module, child, FusedProjection(shared, slot))
    report.fused.append(f"{name}.({', '.join(SHARED_INPUT)})")


def _fuse_gated_mlp(model: nn.Module, name: str, module: nn.Module, report: Report) -> None:
    """Replace a module by a FusedGatedMLP, if it is one and computes the same."""
    gate_and_up = _children(module, GATED_MLP[:2])
    down, activation = getattr(module, "down_proj", None), getattr(module, "act_fn", None)
    if gate_and_up is None or not isinstance(down, Sparse24Linear) or activation is None:
        return
    probe = torch.linspace(-4, 4, 64)
    if not torch.allclose(activation(probe), F.silu(probe)):
        return
    fused = FusedGatedMLP(*gate_and_up, down)
    if not _agree(module, fused, gate_and_up[0]):
        return  # the attribute names are familiar, but the forward is another
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, fused)
    report.fused.append(f"{name}.({', '.join(GATED_MLP)})")


@torch.no_grad()
def _agree(module: nn.Module, fused: nn.Module, first: Sparse24Linear) -> bool:
    """Whether both compute the same for two random tokens, to within 16 roundings (else the error is about 1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, first.in_features, generator=generator).to(first.weight)
    want, got = module(x).double(), fused(x).double()
    return bool((want - got).norm() <= 16 * torch.finfo(x.dtype).eps * want.norm())


def _stack(parts: list[Sparse24Linear], swiglu: bool = False) -> Sparse24Linear:
    """Layers of the same input as one layer with the rows of all."""
    packed = [part.packed for part in parts]
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    values, metadata = (torch.cat([p[i] for p in packed]) for i in range(2))
    return Sparse24Linear.from_packed(values, metadata, bias, swiglu=swiglu)


def _save_rows(destination: dict[str, Any], prefix: str, layer: Sparse24Linear, rows: slice) -> dict[str, Any]:
    """Add copies of some rows of a layer, in row-major order, to a state dict."""
    values, metadata, _ = layer.packed
    destination[prefix + "weight"], destination[prefix + "metadata"] = (
        values[rows].clone(),
        metadata[rows].clone(),
    )
    if layer.bias is not None:
        destination[prefix + "bias"] = layer.bias.detach()[rows].clone()
    return destination
