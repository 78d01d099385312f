"""Pruning in every model family: exact counts, what is stored, idle experts, passes, errors that name the layer."""

import types

import jobs
import pytest
import torch
from families import T, tiny
from jobs import BYTE, chain_of, weights_in
from plainly import CLOSE, FAMILIES, B, independent_inputs, padding, tokens
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from oneshot import models
from oneshot.measure.losses import token_losses
from oneshot.models.experts import EXPERTS_IMPLEMENTATION, layout
from oneshot.prune import loop
from oneshot.prune.patterns import NM, parse
from oneshot.prune.solvers import magnitude


def prune(model, method, pattern, mask=None, **options):
    return jobs.prune(model, method, pattern, ids=tokens(), mask=mask, **{"batch_size": B} | options)


def input_rows(block):
    """{weight's name: weight with its inputs last}, by what the modules themselves say."""
    out = {}
    for name, m in block.named_modules():
        if isinstance(m, (nn.Linear, Conv1D)):
            out[name] = m.weight.T if isinstance(m, Conv1D) else m.weight
        elif models.is_experts(m):
            for part in ("gate_up_proj", "up_proj", "down_proj"):
                for e, w in enumerate(getattr(m, part, ())):
                    out[f"{name}.{part}.{e}"] = w.T if layout(m).is_transposed else w
    return out


def assert_pruned(model, rows, method, pattern):
    """Every linear in the record has exactly half of its weights zero, where the method's pattern says."""
    prefix, block_list = models.blocks(model)
    for b, block in enumerate(block_list):
        weights = input_rows(block)
        names = [r["linear"] for r in rows if r["block"] == b]
        assert sorted(names) == sorted(v.name for v in weights_in(block))
        for r in (r for r in rows if r["block"] == b):
            zero = weights[r["linear"]] == 0
            assert r["name"] == f"{prefix}.{b}.{r['linear']}" and r["shape"] == list(zero.shape)
            assert r["zeros"] == int(zero.sum()) == r["target_zeros"] + r["surplus"]
            assert 2 * r["target_zeros"] == zero.numel()
            if r["surplus"]:
                continue
            if pattern == "2:4":
                assert (zero.reshape(-1, 4).sum(1) == 2).all()
            elif method == "wanda" and not r["fallback"]:
                assert (2 * zero.sum(1) == zero.shape[1]).all()


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_with_exact_counts(name, method, pattern):
    model = tiny(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = prune(model, method, pattern, padding())
    idle = {w.split(":")[0] for w in result.warnings if "no calibration token" in w}
    rows = [r | {"fallback": r["name"] in idle} for r in result.layers]
    assert_pruned(model, rows, method, pattern)
    assert all(0 <= r["relative_error"] < 2 for r in rows if r["relative_error"] is not None)
    assert torch.isfinite(model(input_ids=tokens(), use_cache=False).logits).all()
    reported = {s["name"] for s in result.skipped}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not changed & reported
    assert {n for n, p in model.named_parameters() if p.ndim >= 2} == changed | reported
    assert not any(before[n].ndim == 1 for n in changed)


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"openai-gpt"}))  # whose code mixes in float32
def test_computing_as_stored_prunes_like_float32(name):
    """The same counts; the errors of the layers but for rounding."""
    model, wide = (tiny(name, dtype=torch.bfloat16) for _ in range(2))
    models.compute_as_stored(model)
    found, want = (prune(m, "sparsegpt", "2:4", padding()) for m in (model, wide))
    assert_pruned(model, found.layers, "sparsegpt", "2:4")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    pairs = [(a["relative_error"], b["relative_error"]) for a, b in zip(found.layers, want.layers, strict=True)]
    assert all(abs(a - b) < 0.1 for a, b in pairs if a is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_stored_bf16_and_saved_model_keep_every_zero(name, tmp_path):
    """bf16 on disk and in memory, float32 while computing; from_pretrained brings the same weights back."""
    model = tiny(name, dtype=torch.bfloat16)
    wide = tiny(name, dtype=torch.bfloat16).float()
    torch.testing.assert_close(token_losses(model, tokens(), batch_size=B),
                               token_losses(wide, tokens(), batch_size=B), **CLOSE)
    result = prune(model, "sparsegpt", "2:4")
    assert_pruned(model, result.layers, "sparsegpt", "2:4")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    prune(wide, "sparsegpt", "2:4")
    first = {v.name: v for v in weights_in(models.blocks(wide)[1][0])}
    for v in weights_in(models.blocks(model)[1][0])[:1]:  # the same mask: the arithmetic was float32
        assert torch.equal(v.get() == 0, first[v.name].get() == 0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    loaded = dict(again.named_parameters())
    for n, p in model.named_parameters():
        assert loaded[n].dtype == torch.bfloat16 and torch.equal(loaded[n], p), n
    assert torch.isfinite(again.float()(input_ids=tokens()).logits).all()


@pytest.mark.parametrize(("name", "idle"), [("gpt_oss", {3}), ("deepseek_v3", {2, 3})])  # {2, 3}: a group
def test_expert_without_tokens_is_pruned_by_magnitude(name, idle):
    model = tiny(name)
    for block in models.blocks(model)[1]:
        for n, t in [*block.named_parameters(), *block.named_buffers()]:
            if n.endswith(("router.bias", "e_score_correction_bias")):
                t[list(idle)] = -1e4
    before = [{v.name: v.get().clone() for v in weights_in(block)}
              for block in models.blocks(model)[1]]
    for options in ({}, {"true_sequential": True}, {"gram_budget": BYTE}):
        copy = tiny(name)
        copy.load_state_dict(model.state_dict())
        result = prune(copy, "sparsegpt", "2:4", **options)
        warned = {w.split(":")[0] for w in result.warnings if "no calibration token" in w}
        expected = {r["name"] for r in result.layers if r["name"].rsplit(".", 1)[-1] in map(str, idle)}
        assert warned == expected and expected
        for b, block in enumerate(models.blocks(copy)[1]):
            for v in weights_in(block):
                W = before[b][v.name]
                by_magnitude = torch.equal(v.get(), W * NM(2, 4).keep(W.abs()))
                assert by_magnitude == (v.expert in idle), v.name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_true_sequential_sees_what_is_already_pruned(name):
    """Each stage's Gram is that of the model with all earlier stages pruned, no later one."""
    grams = {}

    def spy_prune(W, statistics, pattern, cfg):
        grams.setdefault("order", []).append((statistics.G.clone(), statistics.n))
        return magnitude.prune(W, statistics, pattern, cfg)

    spy = types.SimpleNamespace(__name__="spy", needs=frozenset({"outer"}), updates=False, prune=spy_prune)
    chain = [(spy, magnitude.Config())]
    for sequential in (True, False):
        grams.clear()
        model, twin = tiny(name), tiny(name)
        result = prune(model, chain, "0.5", true_sequential=sequential)
        rows = [r for r in result.layers if r["block"] == 0]
        new = {v.name: v.get().clone() for v in weights_in(models.blocks(model)[1][0])}
        weights = {v.name: v for v in weights_in(models.blocks(twin)[1][0])}
        inputs = independent_inputs(twin, tokens(), None)[0]
        stage = None
        for r, (G, n) in zip(rows, grams["order"], strict=False):
            kind = weights[r["linear"]].kind.replace("k_proj", "q_proj").replace("v_proj", "q_proj") \
                .replace("gate_proj", "up_proj")
            if sequential and stage not in (None, kind):
                inputs = independent_inputs(twin, tokens(), None)[0]
            stage = kind
            x = torch.cat(inputs[r["linear"]])
            assert n == len(x)
            torch.testing.assert_close(G, x.T @ x / n, **CLOSE)
            weights[r["linear"]].set(new[r["linear"]])


def test_budget_and_batch_size_give_the_same_model():
    """Passes over a dense block: what is pruned early in a block must not be seen by its later passes."""
    want = tiny("qwen3_moe")
    prune(want, "sparsegpt", "0.5", padding())
    for options in ({"gram_budget": BYTE}, {"batch_size": 5}, {"layer_errors": False}):
        got = tiny("qwen3_moe")
        prune(got, "sparsegpt", "0.5", padding(), **options)
        for (n, p), q in zip(want.named_parameters(), got.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-3, msg=n)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_names_the_layer(method, value):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .*not finite"):
        prune(model, method, "0.5")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activation_names_the_layer(method, value):
    model = tiny("mixtral")
    model.model.layers[1].post_attention_layernorm.weight[2] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj\.\d: .*not finite"):
        prune(model, method, "0.5")
    assert model.config._experts_implementation != EXPERTS_IMPLEMENTATION


def test_pattern_that_does_not_fit_names_the_layer():
    model = tiny("mistral")
    with pytest.raises(ValueError, match=r"--pattern 2:3: .*by 3.*model\.layers\.0\.self_attn\.q_proj"):
        loop.make_plan(model, parse("2:3"), chain_of("magnitude"))
    model = tiny("deepseek_v3")
    with pytest.raises(ValueError, match=r"4:32.*16.*model\.layers\.0\.self_attn\.q_b_proj, 64x16"):
        loop.make_plan(model, parse("4:32"), chain_of("magnitude"))


def test_block_error_is_not_measured_on_padding():
    """A longer window, padded back to the same tokens, reports the same errors."""
    ids, results = tokens(2), []
    for extra in (0, 16):
        longer = torch.cat([ids, torch.full((2, extra), 5)], dim=1)
        mask = torch.arange(T + extra).lt(T).expand(2, -1)
        results.append(jobs.prune(tiny("llama"), "magnitude", "0.5", ids=longer, mask=mask, batch_size=B))
    for a, b in zip(*(r.blocks for r in results), strict=True):
        assert a["relative_error"] == pytest.approx(b["relative_error"], rel=1e-4)
