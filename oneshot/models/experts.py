"""Fused experts: run them one by one, so that each one's inputs can be seen.

transformers holds the experts of a mixture as one 3-D parameter and runs them as one grouped product.
"""

import contextlib

import torch
from torch import nn

EXPERTS_IMPLEMENTATION = "oneshot_one_by_one"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts behind transformers' experts interface."""
    return all(hasattr(module, a) for a in ("has_gate", "is_transposed", "is_concatenated", "down_proj")) and \
        isinstance(module.down_proj, nn.Parameter) and module.down_proj.ndim == 3


@contextlib.contextmanager
def experts_one_by_one(model: nn.Module):
    """Run fused experts in a loop, so that each one's inputs can be seen; the model's own way is restored at the end.

    transformers runs them as one grouped product by default. `module.observe(kind, expert, x, rows)` is called with the
    inputs x of each expert's matrices and their row numbers among the layer's tokens, where the module has it.
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
