"""Text sampled from the model itself, to calibrate on where there is no other (`--calibration self`)."""

import math
import random

import torch
from torch import nn
from tqdm import tqdm

from .sources import Unusable


@torch.no_grad()
def sample_from_model(model: nn.Module | None, tokenizer, nsamples: int, seqlen: int, seed: int, batch_size: int = 8,
                      progress: bool = True) -> tuple[torch.Tensor, str]:
    """ids (nsamples, seqlen) on the CPU and a description: sampled from the model at temperature 1. A third
    more is drawn than asked for, and the quarter that the model itself finds least likely is dropped.

    Not with `model.generate`: a checkpoint's generation config (temperature, top-k, stop at eos) bends the
    distribution, and here the log-probabilities come for free. Global random state stays untouched.
    """
    if model is None:
        raise Unusable("needs a model to sample from; pass model=")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise Unusable(f"the model has {positions} positions; use --seqlen {positions} or less")
    total = math.ceil(nsamples * 4 / 3)
    batches = _first_tokens(tokenizer, total, seed).to(model.device).split(batch_size)
    drawn, was_training = [], model.training
    model.eval()
    try:
        with tqdm(total=total * (seqlen - 1), desc="sampling", unit=" tokens", disable=not progress) as bar:
            for number, first in enumerate(batches):
                # Seeded by a hash: with seed + number, seeds 0 and 1 would have most batches in common.
                activations = random.Random(f"{seed}/{number}").getrandbits(63)
                generator = torch.Generator(model.device).manual_seed(activations)
                drawn.append(_sample_batch(model, first, seqlen, generator, bar))
    finally:
        model.train(was_training)
    ids, surprise = (torch.cat(parts).cpu() for parts in zip(*drawn, strict=True))
    likeliest = surprise.argsort(stable=True)[:nsamples].sort().values
    how = f"self: sampled from the model, likeliest {nsamples} of {total} windows of {seqlen}, seed {seed}"
    return ids[likeliest], how


def _first_tokens(tokenizer, n: int, seed: int) -> torch.Tensor:
    """(n, 1): bos, or eos (in models without a bos it stands between documents), or else random tokens."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return torch.full((n, 1), token)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    return torch.tensor(random.Random(seed).choices(ordinary, k=n)).view(n, 1)


def _sample_batch(model: nn.Module, first: torch.Tensor, seqlen: int, generator: torch.Generator,
                  bar: tqdm) -> tuple[torch.Tensor, torch.Tensor]:
    """first (b, 1) -> ids (b, seqlen) and -log p of each row (b,)."""
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
