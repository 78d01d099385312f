"""Greedy continuations, one prompt at a time, so that neither a checkpoint's generation settings nor other prompts in a
batch can affect them.
"""

import torch
from torch import nn


def greedy(model: nn.Module, ids: torch.Tensor, new: int) -> list[int]:
    """Generate `new` tokens greedily after ids (1, T); fewer if the model ends the text."""
    ends = model.config.get_text_config(decoder=True).eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    written, cache, token = [], None, ids
    for _ in range(new):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        if token.item() in ends:
            break
        written.append(token.item())
    return written
