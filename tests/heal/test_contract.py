"""The contract of every healing method: it helps, loses no zero, touches no router, learns nothing from padding."""

from dataclasses import fields

import families
import jobs
import pytest
import torch
from families import FAMILIES, REFUSED, T
from healing import SAMPLE, heal_pruned, kl, tokens

from oneshot import calibrate, heal, models
from oneshot.heal import train
from oneshot.prune.patterns import parse

ON_WINDOWS = [name for name in heal.names() if not heal.trains_on_text(name)]  # the others: test_text.py
# Of the divergence that is left, at most. CONTRIBUTING's example trains norms and biases alone: it may lose a little.
MUCH = {"block": 0.9, "distil": 0.9, "vectors": 1.05}


def steps(method, n):
    """The flag that trains for so many steps, where the method has it."""
    return {f"{method}.steps": n} if "steps" in {f.name for f in fields(heal.module(method).Config)} else {}


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("method", ON_WINDOWS)
def test_healing_helps_and_loses_no_zero(name, method):
    dense, plain, healed = (families.tiny(name) for _ in range(3))
    heal_pruned(plain, "none")
    result = heal_pruned(healed, method, **steps(method, 30))
    said = [row["heal"][method] for row in result.blocks if "heal" in row]
    said += [result.heal[method]] if method in result.heal else []
    if method == "fold" and not any("linear" in info for info in said):
        assert name in ("gemma3", "mixtral", "gpt_oss", "qwen3_next")  # a norm behind it, or experts
        assert any("not folded" in w for w in result.warnings)
        return
    assert said and all(info["held_out_after"] <= info["held_out_before"] for info in said)
    for weight in models.all_weights(healed):
        assert parse("2:4").holds(weight.get()), weight.name
    for (full, p), q in zip(plain.named_parameters(), healed.named_parameters(), strict=True):
        if method == "distil" and p.ndim > 1:  # a healed block feeds the next one other inputs, so other masks
            assert not q[1][p == 0].any(), full
        assert torch.isfinite(q[1]).all() and not q[1].requires_grad
    assert kl(dense, healed, tokens()) < MUCH.get(method, 1.0) * kl(dense, plain, tokens())


@pytest.mark.parametrize("method", sorted(set(ON_WINDOWS) - {"fold"}))  # which leaves experts alone
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_routers_and_what_is_outside_the_blocks_stay_as_they_were(name, method):
    before, model = families.tiny(name), families.tiny(name)
    heal_pruned(model, method, **steps(method, 4))
    changed = {n for (n, p), q in zip(before.named_parameters(), model.parameters(), strict=True)
               if not torch.equal(p, q)}
    assert changed and all(".layers." in n for n in changed)
    assert not [n for n in changed if models.left_alone(n.rpartition(".")[0])]


@pytest.mark.parametrize("method", ON_WINDOWS)
def test_padding_teaches_nothing(method):
    """Whatever stands in the padding, the same model comes out."""
    mask = torch.ones(16, T, dtype=torch.bool)
    mask[::2, 15:] = False
    found = []
    for filler in (0, 7):
        model, ids = families.tiny("llama"), tokens().where(mask, filler)
        heal_pruned(model, method, mask=mask, ids=ids, **steps(method, 8))
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3n", "gemma4"])  # Gemma: blocks share keys and values
def test_the_teacher_is_the_dense_model_on_dense_inputs(name):
    """What healing aims at is, block by block, the dense model's own hidden state."""
    model, aimed, passed = families.tiny(name), [], []

    class Look(heal.Heal):
        def after_block(self, block, activations, targets):
            aimed.append(list(targets))
    activations = calibrate.capture(model, tokens(), batch_size=4)
    for block in models.walk(model):
        calibrate.replay(block.module, activations, block.number)
        passed.append(list(activations.hidden))
    jobs.prune(model, "wanda", ids=tokens(), healers=[Look(None)])
    for targets, want in zip(aimed, passed, strict=True):
        torch.testing.assert_close(targets, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_trained_is_rounded_to_the_stored_dtype_before_the_next_block_sees_it(dtype):
    model, replayed = families.tiny("llama", dtype=dtype), []
    real = calibrate.replay

    def replay(block, activations, b):
        replayed.append([p.detach().clone() for p in block.parameters()])
        return real(block, activations, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "replay", replay)
        heal_pruned(model, "block", **{"block.steps": 4})
    for p in replayed[-1]:
        assert torch.equal(p, p.to(dtype).float())
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_families_named_here_exist():
    assert set(SAMPLE) <= set(FAMILIES) - set(REFUSED)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "gemma3", "gpt_neox", "bloom", "falcon", "mixtral",
                                  "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("method, own", [("block", {"block.unit": "block"}), ("block", {"block.unit": "parts"}),
                                         ("distil", {})])
def test_sixteen_bit_blocks_are_trained_in_float32(monkeypatch, name, method, own):
    """As on a GPU, where blocks and hidden states keep the stored dtype."""
    model, trained, real = families.tiny(name, dtype=torch.bfloat16), set(), train.Fitting.descend
    models.compute_as_stored(model)

    def descend(fitting, *args, **kwargs):
        trained.update(p.dtype for p in fitting.trainable.parameters.values())
        return real(fitting, *args, **kwargs)
    monkeypatch.setattr(train.Fitting, "descend", descend)
    heal_pruned(model, method, **{f"{method}.steps": 2}, **own)
    assert trained == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters())
