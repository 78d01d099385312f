"""Text sampled from the model itself, for calibration without any other text (`--calibration self`)."""

import math
import random

import torch
from torch import nn
from tqdm import tqdm

from .. import models
from ..models import Tokenizer
from .text import Unusable


@torch.no_grad()
def sample_from_model(model: nn.Module | None, tokenizer: Tokenizer, nsamples: int, seqlen: int, seed: int,
                      batch_size: int = 8, progress: bool = True) -> tuple[torch.Tensor, str]:
    """(ids, description): token ids int64 (nsamples, seqlen) on the CPU, sampled from the model at temperature 1.

    One third more windows than asked for are sampled; the quarter that the model finds least likely is then dropped.
    `model.generate` is not used, because a checkpoint's generation config (temperature, top-k, stopping at eos) would
    change the distribution, and because the log-probabilities are needed as well. Global random state is untouched.

    Raises Unusable when there is no model, it has too few positions, or its outputs are not finite.
    """
    if model is None:
        raise Unusable("needs a model to sample from; pass model=")
    positions = models.max_positions(model)
    if positions is not None and seqlen > positions:
        raise Unusable(f"the model has {positions} positions; use --seqlen {positions} or less")
    total = math.ceil(nsamples * 4 / 3)
    batches = _first_tokens(tokenizer, total, seed, models.embedded(model)).to(model.device).split(batch_size)
    drawn, was_training = [], model.training
    model.eval()
    try:
        with models.own_code(f"--calibration self: {type(model).__name__} cannot be run token by token"), \
                tqdm(total=total * (seqlen - 1), desc="sampling", unit=" tokens", disable=not progress) as bar:
            for number, first in enumerate(batches):
                # Seeded by a hash: with seed + number, seeds 0 and 1 would share most of their batches.
                mixed = random.Random(f"{seed}/{number}").getrandbits(63)
                generator = torch.Generator(model.device).manual_seed(mixed)
                drawn.append(_sample_batch(model, first, seqlen, generator, bar))
    finally:
        model.train(was_training)
    ids, surprise = (torch.cat(parts).cpu() for parts in zip(*drawn, strict=True))
    likeliest = surprise.argsort(stable=True)[:nsamples].sort().values
    how = f"self: sampled from the model, likeliest {nsamples} of {total} windows of {seqlen}, seed {seed}"
    return ids[likeliest], how


def _first_tokens(tokenizer: Tokenizer, n: int, seed: int, known: int) -> torch.Tensor:
    """Ids (n, 1) to start from: bos; without one eos, which then separates documents; without either random tokens.

    known: the model's embedding has rows for the ids below it.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None and token < known:
            return torch.full((n, 1), token)
    ordinary = sorted(set(range(min(known, len(tokenizer)))) - set(tokenizer.all_special_ids))
    return torch.tensor(random.Random(seed).choices(ordinary, k=n)).view(n, 1)


def _sample_batch(model: nn.Module, first: torch.Tensor, seqlen: int, generator: torch.Generator,
                  bar: tqdm) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids (b, seqlen), -log p of each row (b,)) sampled after the first tokens (b, 1)."""
    columns, cache, surprise = [first], None, 0.0
    for _ in range(seqlen - 1):
        output = model(input_ids=columns[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        log_p = output.logits[:, -1].float().log_softmax(-1)
        if log_p.isnan().any():
            raise Unusable("the model's outputs are not finite; check its weights")
        columns.append(torch.multinomial(log_p.exp(), 1, generator=generator))
        surprise = surprise - log_p.gather(1, columns[-1]).squeeze(1)
        bar.update(len(first))
    return torch.cat(columns, 1), surprise
