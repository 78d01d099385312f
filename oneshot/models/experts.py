"""Fused experts: compute them one at a time, so that the inputs of each expert can be observed.

transformers stores the experts of a mixture-of-experts layer as one 3-D parameter and runs them as one grouped matrix
product.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

EXPERTS_IMPLEMENTATION = "oneshot_one_by_one"


class Layout(NamedTuple):
    """How a module stores its fused experts.

    has_gate: whether gate and up are one parameter, `gate_up_proj`; else there is `up_proj` only. is_transposed:
    whether parameters are (E, C, R) instead of (E, R, C).
    """

    has_gate: bool
    is_transposed: bool

    @property
    def parts(self) -> tuple[str, str]:
        """The names of the two parameters, in the order in which they are applied."""
        return "gate_up_proj" if self.has_gate else "up_proj", "down_proj"


def layout(module: nn.Module) -> Layout | None:
    """The layout of a module of fused experts, with transformers' experts interface or in SORTED; None for others."""
    if not isinstance(getattr(module, "down_proj", None), nn.Parameter) or module.down_proj.ndim != 3:
        return None
    if all(hasattr(module, a) for a in ("has_gate", "is_transposed", "is_concatenated")):
        return Layout(module.has_gate, module.is_transposed)
    return SORTED.get(type(module).__name__)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts whose inputs can be observed one by one."""
    return layout(module) is not None


# Experts outside the interface that get all tokens once per expert, with zeros for the tokens of other experts
SORTED = {"Llama4TextExperts": Layout(has_gate=True, is_transposed=True)}


@contextlib.contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Within the context, fused experts run in a loop; afterwards as before (by default as one grouped product).

    If a module of experts has an attribute `observe`, then `observe(kind, expert, x, rows)` is called for each matrix
    of each expert: kind, the parameter's name; x (tokens, C), its input; rows (tokens,), which of the layer's tokens
    these are.
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
def _interface(model: nn.Module) -> Iterator[None]:
    """Within the context, experts with transformers' experts interface run in a loop."""
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


def _experts_forward(self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                     top_k_weights: torch.Tensor) -> torch.Tensor:
    """transformers' eager loop over experts, for every layout of the experts interface, with calls of `observe`.

    hidden_states (tokens, H), top_k_index and top_k_weights (tokens, k) -> (tokens, H).
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    observe = getattr(self, "observe", None)

    def linear(name: str, e: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if observe:
            observe(name, e, x, rows)
        w = getattr(self, name)[e]
        y = x @ w if self.is_transposed else x @ w.T
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    out = torch.zeros_like(hidden_states)
    for e in top_k_index.unique().tolist():
        if not 0 <= e < self.num_experts:  # expert parallelism marks absent experts this way
            continue
        rows, slot = torch.where(top_k_index == e)
        y = linear(up_name, e, hidden_states[rows], rows)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = linear("down_proj", e, y, rows) * top_k_weights[rows, slot, None]
        if getattr(self, "has_post_expert_norm", False):
            raise ValueError(f"{type(self).__name__}: experts followed by a norm are not supported")
        out.index_add_(0, rows, y.to(out.dtype))
    return out


def _sorted_forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Llama 4's forward, bit for bit, with calls of `observe` on the rows of each expert's own tokens.

    hidden_states (E·tokens, H): all tokens once per expert, zeros where a token is not the expert's -> the same shape.
    """
    x = hidden_states.view(self.gate_up_proj.shape[0], -1, self.hidden_size)
    gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
    inner = up * self.act_fn(gate)
    if observe := getattr(self, "observe", None):
        for e in range(len(x)):
            rows = x[e].any(-1).nonzero()[:, 0]
            observe("gate_up_proj", e, x[e][rows], rows)
            observe("down_proj", e, inner[e][rows], rows)
    return torch.bmm(inner, self.down_proj).view(-1, self.hidden_size)
