"""Losses: as transformers computes them, whatever the slices; a bar that ends when the work does."""

import families
import pytest
import torch
from torch.nn.functional import cross_entropy

from oneshot import models
from oneshot.measure import compared, losses


def windows(n=5, T=12):
    return torch.randint(3, families.VOCAB, (n, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("elements", [1, 300, 2**24])
def test_losses_in_slices(monkeypatch, elements):
    """The last axis is the softmax's, and no slice mixes positions or windows."""
    model, ids = families.tiny("llama"), windows()
    monkeypatch.setattr(losses, "SLICE", elements)
    with torch.no_grad():
        plain = cross_entropy(model(ids).logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(losses.token_losses(model, ids, batch_size=2).double(), plain, rtol=1e-4, atol=1e-5)


def test_a_large_head_has_its_share_of_the_bar():
    """SmolLM2's takes as long as eight blocks, during which the bar used to stand at 100 %."""
    model = families.tiny("llama")
    block = sum(p.numel() for p in models.blocks(model)[1].parameters()) / 2
    model.lm_head = torch.nn.Linear(32, 3 * round(block / 32), bias=False)
    assert losses.head_size(model) == 3
    model.lm_head = torch.nn.Linear(32, 8, bias=False)
    assert losses.head_size(model) == 1


@pytest.mark.parametrize("both", [False, True])
def test_the_bar_ends_with_the_work(monkeypatch, both):
    bars, real = [], losses.tqdm

    def watched(**how):
        bars.append(real(**how))
        return bars[-1]
    monkeypatch.setattr(losses, "tqdm", watched)
    monkeypatch.setattr(losses, "head_size", lambda model: 5)
    monkeypatch.setattr(compared, "GROUP_BYTES", 1)  # a group for each of the three batches
    model = families.tiny("llama")
    if both:
        compared.compare(model, families.tiny("llama", seed=1), windows(), batch_size=2, progress="x")
    else:
        losses.token_losses(model, windows(), batch_size=2, progress="x")
    [bar] = bars
    assert bar.n == bar.total == (3 * 2 if both else 1) * (2 + 5)
