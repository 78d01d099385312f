"""Activations: blocks replayed one by one give the model's own logits and losses, in every family."""

import families
import pytest
import torch
from families import T, tiny
from plainly import CLOSE, FAMILIES, B, batches, padding, tokens
from torch.nn.functional import cross_entropy

from oneshot import calibrate, models
from oneshot.measure.losses import token_losses
from oneshot.measure.perplexity import perplexity


@pytest.mark.parametrize("name", FAMILIES)
def test_replay_equals_the_models_own_forward(name):
    model, ids = tiny(name), tokens()
    _, block_list = models.blocks(model)
    for mask in (None, padding()):
        real = torch.ones(len(ids), T, dtype=torch.bool) if mask is None else mask
        want = torch.cat([model(**inputs).logits for inputs in batches(ids, mask)])
        activations = calibrate.capture(model, ids, mask, batch_size=B)
        for b, block in enumerate(block_list):
            calibrate.replay(block, activations, b)
        parts = [list(calibrate.logits(model, activations, i, elements=700)) for i in range(len(activations))]
        assert all(torch.equal(torch.cat([p for p, _ in part]), torch.arange(T)) for part in parts)
        got = torch.cat([torch.cat([x for _, x in part], dim=1) for part in parts])
        torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5)

        seen = real[:, 1:] & real[:, :-1]
        losses = cross_entropy(want[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        got = token_losses(model, ids, mask, batch_size=B)
        torch.testing.assert_close(got, losses.where(seen, torch.zeros(())), **CLOSE)
        value, n = perplexity(model, ids, mask, batch_size=3)
        assert n == int(seen.sum()) and value == pytest.approx(losses[seen].mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"openai-gpt"}))
def test_in_the_stored_dtype_it_is_the_models_own_sixteen_bit_forward(name):
    model, ids = tiny(name, dtype=torch.bfloat16), tokens()
    with models.experts_one_by_one(model):
        logits = torch.cat([model(**inputs).logits for inputs in batches(ids, None)])
        want = cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        wide = token_losses(model, ids, batch_size=B)
        models.compute_as_stored(model)
        got = token_losses(model, ids, batch_size=B)
    torch.testing.assert_close(got, want, rtol=0, atol=0.05)
    assert not torch.equal(got, wide)
    assert (got - want).abs().mean() <= (wide - want).abs().mean()


def test_a_family_whose_code_cannot_compute_in_sixteen_bits_is_refused():
    model = tiny("openai-gpt", dtype=torch.bfloat16)
    models.compute_as_stored(model)
    with pytest.raises(ValueError, match="block by block with --compute stored: "):
        calibrate.capture(model, tokens(), batch_size=B)


@pytest.mark.parametrize("name", families.REFUSED)
def test_model_that_works_between_its_blocks_is_refused(name):
    model = tiny(name)
    block_list = models.blocks(model)[1]
    before = [*block_list]
    with pytest.raises(ValueError, match=f"--model: {type(model).__name__} cannot be run block by block: "):
        calibrate.capture(model, tokens(), batch_size=B)
    assert [*block_list] == before
