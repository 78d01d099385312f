"""Head: from the hidden states after the last block to logits, by the model's own code."""

import inspect
from collections.abc import Iterator

import torch
from torch import nn

from .. import models
from .activations import Activations, Stub, cannot, stubbed


def logits(model: nn.Module, activations: Activations, i: int, *,
           elements: int = 2**26) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (positions (P,), logits (B, P, V)) of batch i, for activations that have passed all blocks.

    At most `elements` logits at a time, so that a large vocabulary cannot exhaust the memory. The parts of the model
    outside the blocks must be resident on the activations' device.
    """
    B, T = activations.inputs[i]["input_ids"].shape
    step = max(1, elements // (B * models.config_of(model).vocab_size)) if slices_logits(model) else T
    for positions in torch.arange(T, device=activations.device).split(step):
        with torch.no_grad():
            yield positions, tail(model, activations, i, positions)


def tail(model: nn.Module, activations: Activations, i: int, positions: torch.Tensor) -> torch.Tensor:
    """Logits (B, P, V) at `positions` (P,) of batch i, computed by the model's own code after its last block."""
    _, block_list = models.blocks(model)
    hidden = activations.hidden[i].to(activations.device, model.get_input_embeddings().weight.dtype)
    stubs = [Stub(block, None, hidden, activations.returns) for block in block_list]
    with models.own_code(cannot(model)), stubbed(block_list, stubs):
        return model(**activations.inputs[i], use_cache=False, **logits_to_keep(model, positions)).logits


def slices_logits(model: nn.Module) -> bool:
    """Whether the model can compute the logits of selected positions only (nearly every model can)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def logits_to_keep(model: nn.Module, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keyword arguments that restrict the model's logits to `positions` (P,); none if it cannot."""
    return {"logits_to_keep": positions} if slices_logits(model) else {}
