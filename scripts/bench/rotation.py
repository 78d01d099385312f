"""A rotated model computes the same with weights that may round better: for scripts/bench/integers.py.

The residual stream is turned by a random Hadamard matrix, and each head's values by another (QuaRot, 2024,
arXiv:2404.00456, what of it folds into weights), so that outliers spread over all columns. For models of Llama's
form: RMSNorm without bias, gate, up and down, q, k, v and o. A rotation needs norms without weights, so the last one
goes into the head, and a head that shared the embedding's weight has its own.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def rotate(model: nn.Module) -> None:
    """Rotate in place. Raises ValueError for a model of another form."""
    base = body(model)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
    into(base.norm, [model.lm_head])
    turn = hadamard(model.config.hidden_size, 0)
    for linear in (base.embed_tokens, model.lm_head):
        put(linear.weight, linear.weight.double() @ turn)
    for block in base.layers:
        q, k, v, o = (getattr(block.self_attn, f"{x}_proj") for x in "qkvo")
        gate, up, down = block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj
        into(block.input_layernorm, [q, k, v])
        into(block.post_attention_layernorm, [gate, up])
        for linear in (q, k, v, gate, up):
            put(linear.weight, linear.weight.double() @ turn)
        for linear in (o, down):
            put(linear.weight, turn.T @ linear.weight.double())
        head = block.self_attn.head_dim
        own = hadamard(head, 1)
        put(v.weight, (own.T @ v.weight.double().unflatten(0, (-1, head))).flatten(0, 1))
        put(o.weight, (o.weight.double().unflatten(1, (-1, head)) @ own).flatten(1))


def body(model: nn.Module) -> nn.Module:
    """The part of a model of Llama's form below the head. Raises ValueError for another form."""
    config = model.config
    if config.model_type not in ("llama", "mistral") or any(getattr(config, f"{x}_bias", False)
                                                            for x in ("mlp", "attention")):
        raise ValueError(f"--only: rotation is for models of Llama's form, not {type(model).__name__}")
    return model.model


def hadamard(n: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, float64 (n, n): Hadamard's for the power of two in n, a random one for the rest."""
    generator = torch.Generator().manual_seed(seed)
    power, matrix = n & -n, torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    rest = torch.linalg.qr(torch.randn(n // power, n // power, dtype=torch.float64, generator=generator))[0]
    signs = torch.randint(2, (n,), generator=generator).double() * 2 - 1
    return torch.kron(rest.contiguous(), matrix / math.sqrt(power)) * signs


def columns(linears: Sequence[nn.Linear], by: torch.Tensor) -> None:
    """Multiply the columns of linears."""
    for linear in linears:
        put(linear.weight, linear.weight.double() * by)


def into(norm: nn.Module, linears: Sequence[nn.Linear]) -> None:
    """Move a norm's weight into the linears behind it."""
    columns(linears, norm.weight.double())
    norm.weight.fill_(1)


def put(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Store a value of float64 in a weight's own dtype."""
    weight.copy_(value.to(weight.dtype))
