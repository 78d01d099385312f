"""Columns scaled before rounding: the same function in every family, the least error of what is tried, the command."""

import shutil

import families
import jobs
import pytest
import tiny
import torch
from rounding import command, the_record
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM

from oneshot import models
from oneshot.calibrate import Statistics
from oneshot.checkpoint import verify
from oneshot.prune import loop
from oneshot.prune.options import Options
from oneshot.prune.patterns import Dense
from oneshot.prune.solvers import Solution
from oneshot.quantise import gptq, grids, mixed, rtn, scaling, walk

GRID = grids.parse("int3:8")
ALL = mixed.Grids(GRID)
SITES = {  # {family: the linears of block 1 whose inputs can be scaled}
    "llama": {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"},
    "llama-tied-bias": {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "opt": {"self_attn.q_proj", "fc1", "fc2"},  # ReLU; groups.py does not know its out_proj
    "gpt2": {"attn.c_attn", "mlp.c_fc"},  # GELU
    "gemma2": {"self_attn.o_proj", "mlp.down_proj"},  # its norms add 1 to their weights
    "mixtral": {"self_attn.q_proj", "self_attn.o_proj", *(f"mlp.experts.down_proj.{e}" for e in range(4))},
    "gpt_neox": {"attention.query_key_value", "mlp.dense_h_to_4h"},
    "gpt_oss": {"self_attn.q_proj", "self_attn.o_proj"},  # its experts add 1 to up
}


def scaled(model, base=2.0):
    """What `scale` reports of every block, where each site is scaled by factors of base^-4 to base^4."""
    found, ids = [], jobs.tokens()
    options = Options(batch_size=4, progress=False, device="cpu")
    with torch.no_grad(), models.experts_one_by_one(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "best", lambda site, *_: (1.0, 1.0, torch.tensor([
            base ** ((5 * i) % 9 - 4) for i in range(int(site.channel.max()) + 1)])))
        activations = loop.start(model, ids, None, options)
        for block in models.walk(model, "cpu"):
            block.changed = True
            found.append(scaling.scale(block, activations, options, method=rtn, cfg=rtn.Config(), grids=ALL)["scaling"])
            loop.calibrate.replay(block.module, activations, block.number)
    return found


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if n not in ("xlm", "rwkv")])
def test_a_scaled_model_computes_the_same_bits(name):
    """Whatever the family: a site that cannot be scaled without a trace is left alone."""
    model, ids = families.tiny(name).eval(), jobs.tokens(3)
    with torch.no_grad():
        before, weights = model(ids).logits, {k: t.clone() for k, t in model.state_dict().items()}
        found = scaled(model)
        assert torch.equal(model(ids).logits, before)
    changed = {k for k, t in model.state_dict().items() if not torch.equal(t, weights[k])}
    assert bool(changed) == any(found)
    if name in SITES:
        assert set(found[1]) == SITES[name]
    for key in changed:  # whole powers of two, and every zero is still one
        ratio = model.state_dict()[key] / weights[key]
        ratio = ratio[weights[key] != 0]
        assert torch.equal(ratio.log2().round().exp2(), ratio)


@pytest.mark.parametrize("clip", [None, 8.0])
def test_values_that_only_other_tokens_would_clip_are_not_scaled(clip, monkeypatch):
    """OLMo's clip_qkv, far above all values here; halved or doubled they would not show it."""
    monkeypatch.setitem(families.FAMILIES, "olmo", ("olmo", {"clip_qkv": clip}))
    found = scaled(families.tiny("olmo").eval())
    assert found[0].keys() == {"mlp.down_proj"} | (set() if clip else {"self_attn.o_proj"})


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn.v_proj", "self_attn.v_proj.bias", "mlp.down_proj"])
@pytest.mark.parametrize("also", ["layers.1", "norm"])
def test_what_is_held_elsewhere_as_well_is_not_scaled(part, also):
    """By another block, or as the last norm's weight or bias; all other sites are."""
    model, ids = families.tiny("llama-tied-bias").eval(), jobs.tokens(3)
    layers, (owner, _, last) = model.model.layers, part.rpartition(".")
    held = layers[0].get_submodule(owner).__getattr__(last)
    if also == "layers.1":
        setattr(layers[1].get_submodule(owner), last, held)
    elif part == "input_layernorm":
        model.model.norm = held
    else:
        model.extra = held
    with torch.no_grad():
        for block in layers:
            block.self_attn.v_proj.bias.normal_()
        before = model(ids).logits
        found = scaled(model)
        assert torch.equal(model(ids).logits, before)
    gone = {"input_layernorm": {"self_attn.q_proj"}, "mlp.down_proj": {"mlp.down_proj"}}.get(part, {"self_attn.o_proj"})
    gone |= {"self_attn.q_proj"} if part == "self_attn.v_proj" else set()
    assert set(found[0]) == SITES["llama-tied-bias"] - gone


@pytest.mark.parametrize("name", ["llama-tied-bias", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_any_factors_only_rounding_is_lost(name, dtype):
    """At most twice what rounding all weights a little differently costs: of 8 (bfloat16) or 24 bits."""
    model, ids = families.tiny(name).to(dtype).eval(), jobs.tokens(3)
    plain, nudged = families.tiny(name).to(dtype).float().eval(), families.tiny(name).to(dtype).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nudged.parameters():
            p.mul_(1 + torch.finfo(dtype).eps * (torch.rand(p.shape, generator=generator) - 0.5))
        assert any(scaled(model, base=1.37))
        wanted = plain(ids).logits
        error, unit = ((other(ids).logits - wanted).norm() for other in (model.float(), nudged))
    assert 0 < error < 2 * unit


def test_columns_get_the_factor_that_a_stored_norm_really_has():
    """Also where the norm is in memory as it is stored: the factor is not rounded to its dtype."""
    block = jobs.first_walked(families.tiny("llama"))
    norm = block.module.input_layernorm.weight
    for resident in (torch.float32, torch.bfloat16):
        norm.data = torch.linspace(0.7, 1.9, 32).bfloat16().to(resident)
        before, old = norm.data.double(), block.weights[0].get().double()
        site = scaling.Site((block.weights[0],), torch.arange(32), ((norm, torch.bfloat16, torch.arange(32)),))
        assert site.apply(1.37 ** (torch.arange(32) % 5 - 2))
        factors = before / norm.data.double()
        torch.testing.assert_close(block.weights[0].get().double(), old * factors, rtol=1e-6, atol=0)


def test_the_record_names_the_sites_that_cannot_be_scaled():
    """GPT-2's GELU lies between c_fc and its c_proj."""
    model = families.tiny("gpt2")
    job = walk.rounding({w.name: Dense() for w in models.all_weights(model)}, Options(
        batch_size=4, progress=False, device="cpu"), rtn, rtn.Config(), mixed.Grids(GRID), scales=True)
    assert [block["not_scaled"] for block in loop.prune_model(model, jobs.tokens(), None, job).blocks] == [
        ["mlp.c_proj"]] * 2


def test_values_that_a_dtype_cannot_hold_are_not_scaled():
    """float16 ends at 65504: a norm of 60000 cannot be made larger, and nothing is half done."""
    model = families.tiny("llama").half().float()
    block = jobs.first_walked(model)
    norm = block.module.input_layernorm.weight
    norm.data.fill_(60000.0)
    site = scaling.Site((block.weights[0],), torch.arange(32), ((norm, torch.float16, torch.arange(32)),))
    before = block.weights[0].get().clone()
    assert not site.apply(torch.full((32,), 0.5)) and torch.equal(block.weights[0].get(), before)
    assert site.apply(torch.full((32,), 2.0)) and torch.equal(block.weights[0].get(), 2 * before)
    assert torch.equal(norm, torch.full((32,), 30000.0))
    block.weights[0].parameter.data[0, 0] = 1e-7  # where float16 has one bit left
    assert site.apply(torch.full((32,), 1.7))


@pytest.mark.parametrize("method", [rtn, gptq])
def test_the_least_error_of_all_that_is_tried(method):
    """Against every strength computed by itself in float64."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 16, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 16, dtype=torch.float64)
    W = torch.randn(8, 16, generator=generator)
    statistics = Statistics(16, {"outer"}, dtype=torch.float64)
    statistics.update(X)
    linear = torch.nn.Linear(16, 8, bias=False)
    linear.weight.data = W
    weight = models.Weight("a", "a", linear, linear.weight, None, False, torch.float32)
    site = scaling.Site((weight,), torch.arange(16), ())
    strength, error, factors = scaling.best(site, statistics, method, method.Config(), ALL)
    wanted, sizes = {}, X.square().mean(0).sqrt()
    for s in scaling.STRENGTHS:
        by = (sizes / sizes.median()) ** s
        own = Statistics(16, {"outer"}, dtype=torch.float64)
        own.update(X / by)
        V = W * by.float()
        W_hat = method.quantise(V, Solution(V, V != 0), own, GRID, method.Config()).W_hat
        wanted[s] = (((W_hat / by - W) @ X.T).square().sum() / 200).item()
    assert strength == min(wanted, key=wanted.get) > 0
    assert error == pytest.approx(wanted[strength] / wanted[0.0], rel=1e-3) and error < 1
    assert torch.allclose(factors, (sizes / sizes.median()) ** strength)


@pytest.mark.parametrize("dead", [3, 12, 16])
def test_channels_without_inputs_are_not_scaled(dead, monkeypatch):
    """They may have some elsewhere: 1/256 of a column would be rounded to zero; nor do they move the median."""
    monkeypatch.setattr(scaling, "STRENGTHS", (0.5,))
    X = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 16)
    X[:, :dead] = 0.0
    linear, statistics = torch.nn.Linear(16, 8, bias=False), Statistics(16, {"outer"})
    statistics.update(X)
    weight = models.Weight("a", "a", linear, linear.weight, None, False, torch.float32)
    _, _, factors = scaling.best(scaling.Site((weight,), torch.arange(16), ()), statistics, rtn, rtn.Config(), ALL)
    sizes = X[:, dead:].square().mean(0).sqrt()
    wanted = (sizes / sizes.median()).sqrt() if dead < 16 else torch.ones(0)
    assert torch.allclose(factors, torch.cat([torch.ones(dead), wanted]))


def test_heads_of_one_group_share_the_factors_of_their_values():
    """4 query heads, 2 KV heads of 8: columns of o_proj that read one value of v_proj have one factor."""
    model = families.tiny("llama")
    found = next(s for s in scaling.of_producers(jobs.first_walked(model)) if s.producer.linear.endswith("v_proj"))
    assert found.channel.tolist() == [8 * (c // 16) + c % 8 for c in range(32)]
    assert found.rows.tolist() == list(range(16))


def test_the_budget_for_gram_matrices_changes_nothing():
    found = []
    for budget in (None, jobs.BYTE):
        model = families.tiny("llama")
        options = Options(batch_size=4, progress=False, device="cpu", **({"gram_budget": budget} if budget else {}))
        plan = {w.name: Dense() for w in models.all_weights(model)}
        job = walk.rounding(plan, options, rtn, rtn.Config(), ALL, scales=True)
        result = loop.prune_model(model, jobs.tokens(), None, job)
        found.append(([block["scaling"] for block in result.blocks], model.state_dict()))
    assert found[0][0] == found[1][0] and any(found[0][0])
    assert all(torch.equal(t, found[1][1][k]) for k, t in found[0][1].items())


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven(place, tmp_path_factory):  # noqa: F811
    """A model, some of whose channels are far larger than others."""
    def louder(tensors):
        for name, t in tensors.items():
            if name.endswith("layernorm.weight"):
                t[::5] *= 12
    folder = tmp_path_factory.mktemp("uneven") / "model"
    shutil.copytree(place / "model", folder)
    tiny.change_weights(folder, louder)
    return folder


@pytest.fixture(scope="module")
def saved(place, uneven, tmp_path_factory):  # noqa: F811
    at = tmp_path_factory.mktemp("scaled")
    with tiny.no_pictures():
        assert command(place, "--scale-columns", model=uneven, save=at / "whole", results=at / "runs") == 0
    return at / "whole"


def test_record_and_proof(saved, capsys):
    record = the_record(saved.parent / "runs")
    assert record["settings"]["scale_columns"] is True
    found = [block["rounding"]["scaling"] for block in record["blocks"]]
    assert any(found) and all(own["strength"] > 0 and own["error"] < 1 for block in found for own in block.values())
    assert verify.main([str(saved)]) == 0
    assert "2:4 int4:32" in capsys.readouterr().out


def test_what_is_not_rounded_is_not_scaled(saved, place, uneven, tmp_path):  # noqa: F811
    """Nor what reads the same input, nor its norm; other sites are, each linear by its own grid."""
    text = "int4:32,*.q_proj=none,*.down_proj=none,*.gate_proj=int3:16"
    for name, more in {"plain": {"quantise": None}, "own": {"quantise": text}}.items():
        words = ["--scale-columns"] if name == "own" else []
        assert command(place, *words, model=uneven, save=tmp_path / name, results=tmp_path / f"{name}.r", **more) == 0
    plain, own = tiny.weights(tmp_path / "plain"), tiny.weights(tmp_path / "own")
    for name, t in own.items():
        if any(part in name for part in ("q_proj", "down_proj", "input_layernorm")):
            assert torch.equal(t, plain[name]), name
    assert any(not torch.equal(t, plain[name]) for name, t in own.items() if "post_attention_layernorm" in name)
    scaled = [set(block["rounding"]["scaling"]) for block in the_record(tmp_path / "own.r")["blocks"]]
    assert set().union(*scaled) <= {"self_attn.o_proj", "mlp.gate_proj"} and any("mlp.gate_proj" in s for s in scaled)
    assert verify.main([str(tmp_path / "own"), "--quiet"]) == 0


def test_killed_and_continued_it_is_bit_identical(saved, place, uneven, tmp_path):  # noqa: F811
    for after in (1, 3):  # while pruning, while rounding
        folder = tmp_path / str(after)
        with tiny.interrupted(after):
            assert command(place, "--scale-columns", model=uneven, save=folder, results=tmp_path / "r") != 0
        assert command(place, "--scale-columns", model=uneven, save=folder, results=tmp_path / "r") == 0
        for name, t in tiny.weights(saved).items():
            assert torch.equal(t, tiny.weights(folder)[name]), name


def test_packed_it_computes_the_same(place, uneven, tmp_path):  # noqa: F811
    for form in ("dense", "packed"):
        assert command(place, "--scale-columns", model=uneven, quantise="int4:64", format=form, save=tmp_path / form,
                       results=tmp_path / "r") == 0
    assert verify.main([str(tmp_path / "packed")]) == 0
    dense, packed = (AutoModelForCausalLM.from_pretrained(tmp_path / form) for form in ("dense", "packed"))
    with torch.no_grad():
        logits = [model(jobs.tokens(2) % 32).logits for model in (dense, packed)]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("changed", [{"quantise": None}, {"quantiser": "joint"}])
def test_without_rounding_behind_it_is_refused(place, tmp_path, changed, capsys):  # noqa: F811
    assert command(place, "--scale-columns", save=tmp_path / "x", results=tmp_path / "r", **changed) == 2
    assert "--scale-columns: scales before rounding" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_where_nothing_is_gained_a_warning_says_so(place, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(scaling, "STRENGTHS", (0.0,))
    assert command(place, "--scale-columns", results=tmp_path / "r") == 0
    assert any("--scale-columns: changed nothing" in w for w in the_record(tmp_path / "r")["warnings"])
