"""Weights: every matrix of a block is one, or listed; they read and write the parameter itself. Experts one by one."""

import pytest
import torch
from families import MOE, NOT_REACHED, tiny
from jobs import weights_in
from plainly import CLOSE, FAMILIES, tokens

from oneshot import models


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_a_block_is_a_weight_or_listed(name):
    for b, block in enumerate(models.blocks(tiny(name))[1]):
        weights, skipped = models.weights_of(block)
        left = dict(skipped)
        matrices = {n: p for n, p in block.named_parameters() if p.ndim >= 2}
        seen = dict.fromkeys(matrices, 0)
        for v in weights:
            full = next(n for n, p in matrices.items() if p is v.parameter)
            assert full in (f"{v.kind}.weight", v.kind) and v.get().shape == v.shape
            seen[full] += v.shape[0] * v.shape[1]
        for n, p in matrices.items():
            assert (seen[n] == p.numel()) != (n in left), n
        reasons = {n: why for n, why in left.items() if why not in ("router", "bias")}
        reasons = {n: why for n, why in reasons.items() if why != "mixing coefficients"}
        assert set(reasons) <= set(NOT_REACHED.get(name, ())), reasons
        assert len({v.name for v in weights}) == len(weights)
        assert not any("router" in v.name or "gate" in v.name.split(".") for v in weights)
        if b == 1:
            assert any(v.expert is not None for v in weights) == (name in MOE)
    if name in NOT_REACHED:
        assert {n for block in models.blocks(tiny(name))[1] for n, _ in models.weights_of(block)[1]} >= \
            set(NOT_REACHED[name])


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss"])
def test_weight_reads_and_writes_the_parameter_itself(name):
    block = models.blocks(tiny(name))[1][1]
    for v in weights_in(block):
        before = v.get().clone()
        v.set(torch.full(v.shape, -0.0))
        assert not torch.signbit(v.get()).any() and not v.get().any()
        v.set(before)
        assert torch.equal(v.get(), before)


@pytest.mark.parametrize("name", MOE)
def test_experts_one_by_one_changes_nothing_and_is_undone(name):
    model, inputs = tiny(name), {"input_ids": tokens(), "use_cache": False}
    before = model.config._experts_implementation
    want = model(**inputs).logits
    with models.experts_one_by_one(model):
        assert model.config._experts_implementation != before or name == "llama4"  # it has no such choice
        torch.testing.assert_close(model(**inputs).logits, want, **CLOSE)
    assert model.config._experts_implementation == before
    with pytest.raises(KeyboardInterrupt), models.experts_one_by_one(model):
        raise KeyboardInterrupt
    assert model.config._experts_implementation == before
    assert torch.equal(model(**inputs).logits, want)
