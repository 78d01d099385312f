"""Fused experts: compute them one at a time, so that the inputs of each expert can be observed.

transformers stores the experts of a mixture-of-experts layer as one 3-D parameter and runs them as one grouped matrix
product.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

EXPERTS_IMPLEMENTATION = "oneshot_one_by_one"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts with transformers' experts interface."""
    return all(hasattr(module, a) for a in ("has_gate", "is_transposed", "is_concatenated", "down_proj")) and \
        isinstance(module.down_proj, nn.Parameter) and module.down_proj.ndim == 3


@contextlib.contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Within the context, fused experts run in a loop; afterwards as before (by default as one grouped product).

    If a module of experts has an attribute `observe`, then `observe(kind, expert, x, rows)` is called for each matrix
    of each expert: kind, the parameter's name; x (tokens, C), its input; rows (tokens,), which of the layer's tokens
    these are.
    """
    if not any(is_experts(m) for m in model.modules()):
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
            raise ValueError(f"{type(self).__name__}: experts with a norm behind them are not supported")
        out.index_add_(0, rows, y.to(out.dtype))
    return out
