"""Block: attention and MLP told apart in every family, each trained by itself, undone where both do harm."""

import families
import jobs
import pytest
import torch
from families import FAMILIES, REFUSED, T
from healing import SAMPLE, heal_pruned, kl, tokens

from oneshot import calibrate, models
from oneshot.heal import block as by_block
from oneshot.heal.train import Trainable, distance, held_out_windows
from oneshot.pipeline import api
from oneshot.prune.patterns import parse
from oneshot.settings import flags

PARTED = sorted(set(FAMILIES) - set(REFUSED) - {"llama4"})


def first_block(name):
    """(block 0, the activations of some padded tokens at it)."""
    model, mask = families.tiny(name), torch.ones(8, T, dtype=torch.bool)
    mask[::2, 15:] = False
    activations = calibrate.capture(model, tokens(8), mask, batch_size=4)
    return jobs.first_walked(model), activations


@pytest.mark.parametrize("name", PARTED)
def test_attention_and_mlp_are_told_apart_in_every_family(name):
    """A silent MLP: its weights do not matter, attention's do; each parameter belongs to one part, by its name too."""
    walked, activations = first_block(name)
    block = walked.module
    rest = {weight.name for weight in models.mlp(block)}
    attention = [w for w in jobs.weights_in(block) if w.name not in rest]

    def out():
        with torch.no_grad():
            return calibrate.forward(block, activations, 0, 0)
    whole = out()
    with models.silent(models.mlp(block)):
        ahead = by_block.reached(Trainable(block, {}), walked, activations)
        half = out()
        for weight in models.mlp(block):
            weight.set(3 * weight.get())
        assert torch.equal(out(), half)
        for weight in attention:
            weight.set(3 * weight.get())
        assert not torch.allclose(out(), half)
        for weight in attention:
            weight.set(weight.get() / 3)
    for weight in models.mlp(block):
        weight.set(weight.get() / 3)
    torch.testing.assert_close(out(), whole)  # silence ends
    assert not torch.allclose(whole, half)
    parameters = {id(p): n for n, p in block.named_parameters()}
    assert {parameters[id(v.parameter)] for v in attention} <= ahead
    assert not {parameters[id(v.parameter)] for v in models.mlp(block)} & ahead


def test_attention_aims_at_the_dense_hidden_state_behind_its_residual_addition():
    """Written out for llama: norms on either side, the residual, the ratio of squares over real tokens."""
    dense, seen = families.tiny("llama"), {}
    mask, held = torch.ones(16, T, dtype=torch.bool), held_out_windows(16, T, 0)
    mask[1::2, 12:] = False
    layer = dense.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.update(X=args[0]))
    layer.self_attn.register_forward_hook(lambda _, args, out: seen.update(attention=out[0]))
    with torch.no_grad():
        dense(tokens(), attention_mask=mask.long(), use_cache=False)
        wrong = (0.9 * seen["attention"])[list(held)][mask[list(held)]]
    right = seen["attention"][list(held)][mask[list(held)]]
    want = float((wrong - right).square().sum() / right.square().sum())

    block, healer = jobs.first_walked(dense), by_block.Heal(by_block.Config(unit="parts", steps=4))
    activations = calibrate.capture(dense, tokens(), mask, batch_size=4, held_out=held)
    healer.before_block(block, activations.fork())
    targets = activations.fork()
    calibrate.replay(layer, targets, 0)
    layer.self_attn.o_proj.weight.data.mul_(0.9)
    info = healer.after_block(block, activations, targets.hidden)
    assert info["parts"]["attention"]["held_out_before"] == pytest.approx(want, rel=1e-4) == pytest.approx(0.01)
    assert info["held_out_after"] == info["parts"]["mlp"]["held_out_after"] <= info["held_out_before"]


@pytest.mark.parametrize("name", [*SAMPLE, "opt-350m", "gptj", "gemma4_moe"])
def test_parts_help_and_lose_no_zero(name):
    dense, plain, healed = (families.tiny(name) for _ in range(3))
    heal_pruned(plain, "none")
    result = heal_pruned(healed, "block", **{"block.steps": 15, "block.unit": "parts"})
    for weight in models.all_weights(healed):
        assert parse("2:4").holds(weight.get()), weight.name
    for row in result.blocks:
        assert set(row["heal"]["block"]["parts"]) == {"attention", "mlp"} and row["heal"]["block"]["steps"] <= 30
        assert row["heal"]["block"]["held_out_after"] < row["heal"]["block"]["held_out_before"]
    assert kl(dense, healed, tokens()) < 0.9 * kl(dense, plain, tokens())


def test_each_part_trains_its_own_parameters(monkeypatch):
    """Attention's stage leaves the MLP's bits alone and the other way round; routers belong to neither."""
    told, real = [], by_block.Heal.train

    def spy(healer, block, *args):
        before = {n: p.clone() for n, p in block.module.named_parameters()}
        info = real(healer, block, *args)
        told.append({n for n, p in block.module.named_parameters() if not torch.equal(p, before[n])})
        return info
    monkeypatch.setattr(by_block.Heal, "train", spy)
    heal_pruned(families.tiny("mixtral"), "block", **{"block.steps": 8, "block.unit": "parts"})
    assert told[:2] == [
        {"input_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkvo")},
        {"post_attention_layernorm.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}]


def test_parts_that_harm_the_block_together_are_undone(monkeypatch):
    def spoil(healer, block, activations, targets, leave):
        for p in block.module.parameters():
            p.data.mul_(2)
        return {"steps": 1, "lr": healer.cfg.lr, "warnings": []}
    monkeypatch.setattr(by_block.Heal, "train", spoil)
    plain, healed = families.tiny("llama"), families.tiny("llama")
    heal_pruned(plain, "none")
    result = heal_pruned(healed, "block", **{"block.unit": "parts"})
    for p, q in zip(plain.parameters(), healed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert sum("one by one made the held-out loss worse" in w for w in result.warnings) == 2


def test_a_family_without_parts_is_refused_before_anything_is_pruned():
    model = families.tiny("llama")
    model.model.layers[1].mlp.strange = torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"--block\.unit parts: block 1: attention and MLP of LlamaDecoderLayer"):
        api.prune(model, method="wanda", calibration=tokens(4), heal="block", progress=False,
                  parts={"block.unit": "parts"})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="its linears are fc"):
        models.mlp(torch.nn.ModuleDict({"fc": torch.nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r"--block\.unit layer: give block or parts"):
        flags.build({"method": "wanda", "pattern": "0.5", "heal": "block", "block.unit": "layer"})


def test_the_loss_counts_all_tokens_alike():
    """As written out in float64, padding left out; and a token a thousand times as large has no more weight."""
    walked, activations = first_block("llama")
    gen = torch.Generator().manual_seed(0)
    targets = [x + 0.3 * torch.randn(x.shape, generator=gen) for x in activations.hidden]
    targets[0][1, 2] *= 1000
    with torch.no_grad():
        found = distance(walked, activations, targets)(0)
        out = calibrate.forward(walked.module, activations, 0, 0)
    X, Y, out = (t.double() for t in (activations.hidden[0], targets[0], out))
    above = below = 0.0
    for window, token in activations.rows[0].view(X.shape[:2]).nonzero().tolist():
        x, y, o = (t[window, token] for t in (X, Y, out))
        above, below = above + ((o - y) @ (o - y) / (y @ y)).item(), below + ((y - x) @ (y - x) / (y @ y)).item()
    assert found.item() == pytest.approx(above / below, rel=1e-5)
    targets[0][1, 2] *= 1000
    assert distance(walked, activations, targets)(0).item() == pytest.approx(found.item(), rel=0.01)
