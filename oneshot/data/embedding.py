"""Embedding: a model can take only the tokens that its embedding has rows for; some tokenizers know more.

Tokens are added to a tokenizer (`[PAD]`, `<|im_start|>`) and the embedding is not resized, or the tokenizer is another
model's. Padding is masked, so any id within the embedding will do for it; text with such a token is refused.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from .. import models
from ..models import Tokenizer
from .windows import Tokens, digest, padding


def fitting(tokens: Tokens, model: nn.Module, tokenizer: Tokenizer | None, said: str) -> Tokens:
    """The tokens, their padding within the embedding. Raises ValueError that starts with `said` for any other id."""
    known, ids, mask = models.embedded(model), tokens.ids, tokens.mask
    if within(ids, known):
        return tokens
    check(ids if mask is None else ids[mask], model, tokenizer, said)
    ids = ids.where(mask, padding(tokenizer, known))
    return replace(tokens, ids=ids, sha256=digest(ids, mask))


def check(ids: torch.Tensor, model: nn.Module, tokenizer: Tokenizer | None, said: str) -> None:
    """Raise ValueError that starts with `said` and names the first of the token ids beyond the embedding."""
    known = models.embedded(model)
    if within(ids, known):
        return
    token = int(ids[(ids >= known) | (ids < 0)][0])
    name = tokenizer.convert_ids_to_tokens(token) if tokenizer is not None and token >= 0 else None
    raise ValueError(f"{said}: token {token}{f' ({name!r})' if name else ''} is beyond the {known} rows of the model's "
                     "embedding; use the model's own tokenizer, or resize the embedding (resize_token_embeddings)")


def within(ids: torch.Tensor, known: int) -> bool:
    """Whether all token ids are from 0 to known - 1."""
    return not ids.numel() or (int(ids.max()) < known and int(ids.min()) >= 0)


@contextlib.contextmanager
def guarded(model: nn.Module, tokenizer: Tokenizer, said: str) -> Iterator[None]:
    """Within the context, the model refuses token ids beyond its embedding; on a GPU they would end the process."""
    def look(module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], torch.Tensor) and not args[0].is_floating_point():
            check(args[0], model, tokenizer, said)

    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
