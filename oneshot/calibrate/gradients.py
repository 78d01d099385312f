"""Gradients of the loss with respect to every linear's weight, one backward pass over the calibration windows.

    loss    next-token loss, mean over the tokens of a batch that are not padding, nats

Of a batch the inputs of all blocks are kept; then its gradient passes backwards through one resident block at a time,
which is run once more for it. So only one block, its gradient and one batch's hidden states are on the device; the sums
wait on the CPU, 8 bytes a weight.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .. import models
from ..runtime import distributed
from .activations import Activations, forward
from .head import tail
from .statistics import Gradient


def gradients(model: nn.Module, activations: Activations, wanted: Iterable[str],
              progress: bool = False) -> dict[str, Gradient]:
    """{full linear name: its Gradient} of the linears `wanted`.

    activations: at the model's first block; they stay there. Processes that work together have the Gradient over the
    windows of all.
    """
    _, block_list = models.blocks(model)
    sums: dict[str, list[torch.Tensor]] = {}
    wanted, n = set(wanted), len(activations)
    bar = tqdm(total=n, desc="gradients", unit="batch", disable=not progress, leave=False)
    with models.experts_one_by_one(model), bar:
        for i in range(n):
            at = activations.fork()
            inputs = []
            for block in models.walk(model, activations.device):
                inputs.append(at.hidden[i])
                with torch.no_grad():
                    at.put(i, forward(block.module, at, block.number, i))
            upstream = of_head(model, block_list, at, i)
            for block in reversed(list(models.walk(model))):
                at.hidden[i] = inputs.pop()
                with models.resident(block.module, activations.device, dtype=torch.float32):
                    upstream = backward(block, at, i, upstream, wanted, sums)
            bar.update()
    n = sum(distributed.gathered(n))
    for shapes in distributed.gathered({name: total.shape for name, (total, _) in sums.items()}):
        for name, shape in shapes.items():
            sums.setdefault(name, [torch.zeros(shape), torch.zeros(shape)])
    for name in sorted(sums):
        distributed.add(*sums[name])
    return {name: Gradient(total / n, squares / n) for name, (total, squares) in sums.items()}


@torch.enable_grad()
def of_head(model: nn.Module, block_list: nn.ModuleList, at: Activations, i: int) -> torch.Tensor:
    """The gradient of batch i's loss with respect to the hidden states after the last block, (B, T, H)."""
    with models.resident(model, at.device, models.rest_of(model, block_list), dtype=torch.float32):
        hidden = at.hidden[i].to(at.device).float().requires_grad_(True)
        at.hidden[i] = hidden
        ids = at.inputs[i]["input_ids"]
        logits = tail(model, at, i, torch.arange(ids.shape[1], device=at.device))[:, :-1].float()
        target = ids[:, 1:].clone()
        if at.rows[i] is not None:
            real = at.rows[i].view(ids.shape)
            target[~(real[:, 1:] & real[:, :-1])] = -100
        loss = cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        return torch.autograd.grad(loss, hidden)[0]


@torch.enable_grad()
def backward(block: models.Block, at: Activations, i: int, upstream: torch.Tensor, wanted: set[str],
             sums: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """The gradient with respect to the block's input; adds its linears' gradients to `sums`."""
    hidden = at.hidden[i].to(at.device).float().requires_grad_(True)
    at.hidden[i] = hidden
    weights = [w for w in block.weights if w.name in wanted]
    parameters = list({id(w.parameter): w.parameter for w in weights}.values())
    for p in parameters:
        p.requires_grad_(True)
    try:
        out = forward(block.module, at, block.number, i)
        found = torch.autograd.grad(out, [hidden, *parameters], upstream, allow_unused=True)
    finally:
        for p in parameters:
            p.requires_grad_(False)
    grads = {id(p): g for p, g in zip(parameters, found[1:], strict=True)}
    for w in weights:
        g = grads[id(w.parameter)]
        if g is not None:
            g = g if w.expert is None else g[w.expert]
            g = (g.T if w.transposed else g).detach().float().cpu()
            total, squares = sums.setdefault(w.name, [torch.zeros_like(g), torch.zeros_like(g)])
            total += g
            squares += g.square()
    return found[0].detach()
