"""Every model family against its own forward: replay, weights, statistics, pruning, saving.

The references here know nothing of `oneshot`: the plain model runs as transformers runs it, with hooks.
"""

import types

import families
import jobs
import pytest
import torch
from families import MOE, NOT_REACHED, T, tiny
from jobs import BYTE, chain_of, weights_in
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from oneshot import calibrate, models
from oneshot.calibrate.collect import Collector, Limits
from oneshot.measure.losses import token_losses
from oneshot.measure.perplexity import perplexity
from oneshot.models.experts import EXPERTS_IMPLEMENTATION, layout
from oneshot.prune import loop
from oneshot.prune.patterns import NM, parse
from oneshot.prune.solvers import magnitude

FAMILIES = [n for n in families.FAMILIES if n not in families.REFUSED]
ALL = frozenset({"sum", "sum_sq", "outer"})
B = 2  # windows a batch; five windows make three batches, the last one short
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tokens(n=5):
    return jobs.tokens(n, seed=1)


def padding(n=5):
    """bool (n, T): batches with left padding, right padding, both, and none."""
    mask = torch.ones(n, T, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, 15:] = False
    mask[4, :3] = False
    return mask


def batches(ids, mask, size=B):
    """The arguments of the model itself, batch by batch."""
    for i in range(0, len(ids), size):
        inputs = {"input_ids": ids[i : i + size], "use_cache": False}
        yield inputs if mask is None else inputs | {"attention_mask": mask[i : i + size].long()}


def prune(model, method, pattern, mask=None, **options):
    return jobs.prune(model, method, pattern, ids=tokens(), mask=mask, **{"batch_size": B} | options)


# replay and perplexity --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", families.REFUSED)
def test_model_that_works_between_its_blocks_is_refused(name):
    model = tiny(name)
    block_list = models.blocks(model)[1]
    before = [*block_list]
    with pytest.raises(ValueError, match=f"--model: {type(model).__name__} cannot be run block by block: "):
        calibrate.capture(model, tokens(), batch_size=B)
    assert [*block_list] == before


# weights ----------------------------------------------------------------------------------------------------


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


# statistics -------------------------------------------------------------------------------------------------


def independent_inputs(model, ids, mask, size=B):
    """[{weight's name: [x (tokens, C), one a batch]} for every block], padding dropped, on the plain model."""
    _, block_list = models.blocks(model)
    seen, handles, real = [{} for _ in block_list], [], []

    def keep(b, name, x, rows=None):
        x = x.reshape(-1, x.shape[-1])
        where = real[-1] if rows is None else real[-1][rows]
        seen[b].setdefault(name, []).append(x[where])

    def experts(b, name, module, args, kwargs):
        if "Llama4" in type(module).__name__:  # every expert is fed all tokens, those of others as zeros
            for e, x in enumerate(args[0].view(module.num_experts, -1, args[0].shape[-1])):
                rows = x.any(-1).nonzero()[:, 0]
                gate, up = (x[rows] @ module.gate_up_proj[e]).chunk(2, dim=-1)
                keep(b, f"{name}.gate_up_proj.{e}", x[rows], rows)
                keep(b, f"{name}.down_proj.{e}", up * module.act_fn(gate), rows)
            return
        x, chosen = [*args, *kwargs.values()][:2]
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        for e in range(module.num_experts):
            rows = (chosen == e).any(-1).nonzero()[:, 0]
            if len(rows):
                keep(b, f"{name}.{up_name}.{e}", x[rows], rows)
                keep(b, f"{name}.down_proj.{e}", gated(module, up_name, e, x[rows]), rows)

    for b, block in enumerate(block_list):
        for name, m in block.named_modules():
            if isinstance(m, (nn.Linear, Conv1D)):
                handles.append(m.register_forward_pre_hook(lambda _, a, b=b, name=name: keep(b, name, a[0])))
            elif models.is_experts(m):
                handles.append(m.register_forward_pre_hook(
                    lambda m, a, k, b=b, name=name: experts(b, name, m, a, k), with_kwargs=True))
    for inputs in batches(ids, mask, size):
        ones = torch.ones_like(inputs["input_ids"])
        real.append(inputs.get("attention_mask", ones).reshape(-1).bool())
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def gated(module, up_name, e, x):
    """What expert e's down projection is fed, written out for the layouts there are."""
    weight = getattr(module, up_name)[e]
    y = x @ (weight if module.is_transposed else weight.T)
    if not module.is_transposed:
        gate, up = y.chunk(2, dim=-1)
        return module.act_fn(gate) * up
    y = y + module.gate_up_proj_bias[e]  # GPT-OSS: gate and up take turns, and are clamped
    gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def collected(model, ids, mask, size=B, **limits):
    """[[(statistics, deferred names) per pass] for every block], the model staying dense."""
    out = []
    with models.experts_one_by_one(model):
        activations = calibrate.capture(model, ids, mask, batch_size=size)
        for b, block in enumerate(models.blocks(model)[1]):
            remaining, passes = weights_in(block), []
            while remaining:
                statistics, remaining, _ = calibrate.collect(block, activations, b, remaining, ALL,
                                                             limits=Limits(**limits))
                passes.append((statistics, [v.name for v in remaining]))
                assert len(passes) < 40
            out.append(passes)
            calibrate.replay(block, activations, b)
    return out


def merged(passes):
    """Statistics of all passes by name; no linear is collected twice."""
    assert len({n for m, _ in passes for n in m}) == sum(len(m) for m, _ in passes)
    return {n: m for statistics, _ in passes for n, m in statistics.items()}


def assert_statistics(statistics, x):
    """Statistics are those of the rows x (T, C), summed in float64."""
    x = x.double()
    assert statistics.n == len(x)
    torch.testing.assert_close(statistics.sum.double(), x.sum(0), **CLOSE)
    torch.testing.assert_close(statistics.mean_sq.double(), x.square().mean(0), **CLOSE)
    torch.testing.assert_close(statistics.G.double(), x.T @ x / max(len(x), 1), **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_the_plain_model(name):
    model, ids, mask = tiny(name), tokens(), padding()
    every = zip(collected(model, ids, mask), independent_inputs(model, ids, mask), strict=True)
    for b, (passes, seen) in enumerate(every):
        (statistics, deferred), = passes
        weights = {v.name: v for v in weights_in(models.blocks(model)[1][b])}
        seen = {n: torch.cat(parts) for n, parts in seen.items() if n in weights}
        assert not deferred and set(statistics) == set(seen)
        idle = {n for n, v in weights.items() if v.expert is not None} | families.UNSEEN.get(name, set())
        assert set(weights) - set(seen) <= idle
        for n, x in seen.items():
            assert_statistics(statistics[n], x)
        dense = [n for n in seen if weights[n].expert is None]
        for n in dense:
            twins = {m for m in dense if seen[m].shape == seen[n].shape and torch.equal(seen[m], seen[n])}
            assert twins == {m for m in dense if statistics[m] is statistics[n]}, n


@pytest.mark.parametrize("name", FAMILIES)
def test_passes_batches_and_order_do_not_matter(name):
    """A budget of one Gram, one stage at a time, other batch sizes and another order: the same Statistics."""
    model, ids, mask = tiny(name), tokens(), padding()
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = collected(model, ids, mask)
    others = [collected(model, ids, mask, budget=1), collected(model, ids, mask, one_stage=True),
              collected(model, ids[order], mask[order], size=5)]
    for other in others:
        for (expected, _), passes in zip((p[0] for p in whole), other, strict=True):
            got = merged(passes)
            assert set(got) == set(expected)
            for n, m in got.items():
                assert m.n == expected[n].n
                torch.testing.assert_close(m.G, expected[n].G, **CLOSE)
                torch.testing.assert_close(m.sum, expected[n].sum, **CLOSE)
    for passes in others[0]:
        assert all(len({id(m) for m in statistics.values()}) == 1 for statistics, _ in passes)


@pytest.mark.parametrize(("name", "stages"), [
    ("llama", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]),
    ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ("mixtral", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj",
                 "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
])
def test_stages_follow_the_data(name, stages):
    model = tiny(name)
    for b, passes in enumerate(collected(model, tokens(), None, one_stage=True)):
        kinds = {v.name: v.kind for v in weights_in(models.blocks(model)[1][b])}
        assert [{kinds[n] for n in statistics} for statistics, _ in passes] == [set(s.split()) for s in stages]


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


# pruning ----------------------------------------------------------------------------------------------------


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


def test_expert_with_nothing_but_padding_is_idle():
    model, ids = tiny("gpt_oss"), tokens()
    mask = torch.zeros(5, T, dtype=torch.bool)
    mask[:, :2] = True
    seen = independent_inputs(model, ids, mask)
    for passes, inputs in zip(collected(model, ids, mask), seen, strict=True):
        for n, m in merged(passes).items():
            assert m.n == sum(map(len, inputs[n]))


def test_experts_that_idled_together_share_nothing_later():
    """Empty tensors may share an address, which elsewhere says that two linears are fed by the same tensor."""
    weights = [v for v in weights_in(models.blocks(tiny("mixtral"))[1][0]) if v.kind == "mlp.experts.down_proj"]
    one, other = weights[:2]
    collector = Collector(weights, frozenset({"outer"}), torch.device("cpu"), Limits())
    C = one.shape[1]
    for batch in ([torch.empty(0, C)] * 2, [torch.ones(3, C), 2 * torch.ones(5, C)]):
        collector.start(None, len(batch[0]))
        for weight, x in zip((one, other), batch, strict=True):
            collector.see(weight, x)
    assert [collector.statistics[v.name].n for v in (one, other)] == [3, 5]


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


# errors -----------------------------------------------------------------------------------------------------


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
