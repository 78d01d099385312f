"""Sliced: the mean of a loss over tokens, computed for a few tokens at a time, with its gradient.

All tokens' logits at once take several copies of (tokens, V) numbers, a fifth of a GiB each for 1024 tokens and 49 152
ids, and more time to get that memory than to compute. Here the gradient is computed with the loss and kept in the
dtype of the logits, so that one copy is all.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

TOKENS = 64  # at a time: some MB, which stay in the cache


def mean(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits: torch.Tensor,
         rows: torch.Tensor) -> torch.Tensor:
    """Mean of the losses of some tokens, a float32 scalar tensor; NaN without tokens.

    loss(z, part): (r,), of z (r, V), float32, the logits of the tokens `part` (r,). logits: (..., V). rows: int64 (n,),
    the numbers of the tokens that count, when all dimensions but the last are flattened.
    """
    return _Mean.apply(logits, rows, loss, torch.is_grad_enabled() and logits.requires_grad)


def divergence(z: torch.Tensor, dense: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(r,) KL(dense ‖ z) of logits (r, V) at a temperature, nats."""
    log_p = log_softmax(dense, temperature)
    return (log_p.exp() * (log_p - log_softmax(z, temperature))).sum(-1)


def log_softmax(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """(r, V) log-probabilities of logits (r, V) at a temperature."""
    return (z if temperature == 1 else z / temperature).log_softmax(-1)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor,
                loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], wanted: bool) -> torch.Tensor:
        """See `mean`. wanted: whether there will be a gradient."""
        flat, total = logits.flatten(0, -2), torch.zeros((), device=logits.device)
        grad = torch.zeros_like(flat) if wanted else None
        for part in rows.split(TOKENS):
            z = flat[part].to(torch.promote_types(flat.dtype, torch.float32)).detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted), torch.autocast(z.device.type, enabled=False):
                found = loss(z, part).sum()
            if wanted:
                grad[part] = (torch.autograd.grad(found, z)[0] / len(rows)).to(grad.dtype)
            total = total + found.detach()
        ctx.save_for_backward(*([grad.view_as(logits)] if wanted else []))
        return (total / len(rows)).to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient of the logits."""
        (grad,) = ctx.saved_tensors
        return grad * upstream.item() if upstream != 1 else grad, None, None, None
