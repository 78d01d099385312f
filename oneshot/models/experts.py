"""Fused experts: run them one by one, so that each one's inputs can be seen.

transformers holds the experts of a mixture as one 3-D parameter and runs them as one grouped product.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import nn

EXPERTS_IMPLEMENTATION = "oneshot_one_by_one"


class Layout(NamedTuple):
    """How a module stores its fused experts. has_gate: gate and up are one parameter, `gate_up_proj`, else `up_proj`.
    is_transposed: (E, C, R) instead of (E, R, C)."""

    has_gate: bool
    is_transposed: bool

    @property
    def parts(self) -> tuple[str, str]:
        """Names of the two parameters, in the order in which tokens meet them."""
        return "gate_up_proj" if self.has_gate else "up_proj", "down_proj"


def layout(module: nn.Module) -> Layout | None:
    """The layout of a module of fused experts, behind transformers' experts interface or of a family in SORTED; None of
    all other modules."""
    if not isinstance(getattr(module, "down_proj", None), nn.Parameter) or module.down_proj.ndim != 3:
        return None
    if all(hasattr(module, a) for a in ("has_gate", "is_transposed", "is_concatenated")):
        return Layout(module.has_gate, module.is_transposed)
    return SORTED.get(type(module).__name__)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts that can be seen one by one."""
    return layout(module) is not None


# Experts that are fed all tokens once for each expert, those of other experts as zeros, outside the interface
SORTED = {"Llama4TextExperts": Layout(has_gate=True, is_transposed=True)}


@contextlib.contextmanager
def experts_one_by_one(model: nn.Module):
    """Run fused experts in a loop, so that each one's inputs can be seen; the model's own way is restored at the end.

    transformers runs them as one grouped product by default. `module.observe(kind, expert, x, rows)` is called with the
    inputs x of each expert's matrices and their row numbers among the layer's tokens, where the module has it.
    """
    own = [m for m in model.modules() if type(m).__name__ in SORTED and layout(m)]
    for module in own:
        module.forward = functools.partial(_sorted_forward, module)
    try:
        with _interface(model):
            yield
    finally:
        for module in own:
            module.__dict__.pop("forward", None)


@contextlib.contextmanager
def _interface(model: nn.Module):
    """The experts behind transformers' interface in a loop."""
    if not any(layout(m) and type(m).__name__ not in SORTED for m in model.modules()):
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_forward)
    before = model.config._experts_implementation
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """transformers' eager expert loop for every layout of the experts interface, with the inputs shown on the way."""
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    observe = getattr(self, "observe", None)

    def linear(name, e, x, rows):
        if observe:
            observe(name, e, x, rows)
        w = getattr(self, name)[e]
        y = x @ w if self.is_transposed else x @ w.T
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    out = torch.zeros_like(hidden_states)
    for e in top_k_index.unique().tolist():
        if not 0 <= e < self.num_experts:  # expert parallelism marks absent experts so
            continue
        rows, slot = torch.where(top_k_index == e)
        y = linear(up_name, e, hidden_states[rows], rows)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = linear("down_proj", e, y, rows) * top_k_weights[rows, slot, None]
        if getattr(self, "has_post_expert_norm", False):
            raise ValueError(f"{type(self).__name__}: experts with a norm behind them are not supported")
        out.index_add_(0, rows, y.to(out.dtype))
    return out


def _sorted_forward(self, hidden_states):
    """Llama-4's forward, bit by bit, with each expert's inputs shown on the way: the rows of its tokens."""
    x = hidden_states.view(self.gate_up_proj.shape[0], -1, self.hidden_size)
    gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
    inner = up * self.act_fn(gate)
    if observe := getattr(self, "observe", None):
        for e in range(len(x)):
            rows = x[e].any(-1).nonzero()[:, 0]
            observe("gate_up_proj", e, x[e][rows], rows)
            observe("down_proj", e, inner[e][rows], rows)
    return torch.bmm(inner, self.down_proj).view(-1, self.hidden_size)
