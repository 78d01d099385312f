"""The smaller model against the larger one with zeros, in every family; saved, loaded without oneshot, generating."""

import json

import families
import jobs
import pytest
import torch
from alone import alone
from cutting import cut_of, logits, zeroed
from families import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from oneshot import models
from oneshot.calibrate import activations
from oneshot.models import groups, smaller
from oneshot.prune.options import Options
from oneshot.runtime.proof import ProofError
from oneshot.structured import Cut, cut_model, mixture, origin, slices
from oneshot.structured import cut as cuts

FAMILIES = [name for name in families.FAMILIES if name not in families.REFUSED]
NO_HEADS = ("opt", "opt-350m", "gpt2", "gpt_neox", "gpt_neox-serial", "openai-gpt", "gptj", "bloom", "falcon",
            "falcon-new", "falcon-alibi", "mpt", "modernbert", "cohere2", "gemma3n", "gemma4", "gemma4_moe")
NO_NEURONS = ("openai-gpt", "bloom", "mpt", "gemma3n")
REFUSES = ("modernbert", "jamba", "bamba", "gemma3n", "gemma4", "gemma4_moe")  # their config fixes which layer is what
ALLOWED = {("modernbert", 1)}


@pytest.mark.parametrize("name", FAMILIES)
def test_cutting_zero_units_changes_no_logit(name):
    model = tiny(name)
    cut = cut_of(model)
    if not cut.kept:
        pytest.skip("nothing that its config could say")
    zeroed(model, cut)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    made, _ = cut_model(model, cut)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    left = sum(p.numel() for p in models.blocks(made)[1].parameters())
    assert left == cuts.parameters(model, cut) < cuts.whole(model)
    torch.testing.assert_close(logits(made, jobs.tokens(3)), logits(model, jobs.tokens(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_cannot_lose_is_refused_by_name(name):
    model = tiny(name)
    known = cuts.kinds(model)
    assert (groups.HEADS in known) == (name not in NO_HEADS)
    assert (groups.NEURONS in known or groups.EXPERTS in known) == (name not in NO_NEURONS)
    widths = {width.kind: width for _, width in cuts.consumers(model)}
    for kind in widths.keys() - known.keys():
        cut = Cut(kept=((kind, max(1, widths[kind].count // 2)),))
        with pytest.raises(ValueError, match="--shrink") as caught:
            cut_model(zeroed(model, cut), cut)
        assert model.config.model_type in str(caught.value) or kind in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dropped", [0, 1])
def test_a_block_less_is_the_model_without_it(name, dropped):
    """Or it is refused, because the other block would behave otherwise in its new place."""
    model, ids = tiny(name), jobs.tokens(3)
    try:
        made, _ = cut_model(model, Cut((dropped,)))
    except ValueError as error:
        assert str(error).startswith("--shrink") and name in REFUSES, str(error)
        return
    assert name not in REFUSES or (name, dropped) in ALLOWED
    _, block_list = models.blocks(model)
    returns = activations.returned(model, ids, torch.device("cpu"))
    block_list[dropped] = activations.Stub(block_list[dropped], None, returns=returns)
    wanted = logits(model, ids)
    torch.testing.assert_close(logits(made, ids), wanted, rtol=1e-4, atol=1e-5)
    assert len(models.blocks(made)[1]) == len(block_list) - 1



@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "gpt_oss", "qwen3_next", "mixtral"])
def test_query_heads_go_in_every_group_alike(name):
    model = tiny(name)
    cut = cut_of(model, {groups.QUERIES})
    made, report = cut_model(zeroed(model, cut), cut)
    assert made.config.num_attention_heads == 2 == made.config.num_key_value_heads and made.config.head_dim == 8
    assert len(next(iter(report.units.values()))) == 2
    assert sum(p.numel() for p in models.blocks(made)[1].parameters()) == cuts.parameters(model, cut)
    torch.testing.assert_close(logits(made, jobs.tokens(3)), logits(model, jobs.tokens(3)), rtol=1e-4, atol=1e-5)
    both = Cut((), ((groups.HEADS, 1), (groups.QUERIES, 1)))
    with pytest.raises(ValueError, match="not both at once"):
        cuts.patterns(model, both)


def test_a_model_cut_by_hand():
    """Rows and columns written out for one Llama block, indices chosen here."""
    model = tiny("llama-tied-bias")
    cut = Cut((1,), ((groups.NEURONS, 46), (groups.HEADS, 1)))
    block = models.blocks(model)[1][0]
    block.mlp.down_proj.weight.data[:, [3, 40]] = 0
    block.self_attn.o_proj.weight.data[:, :16] = 0
    made, report = cut_model(model, cut)
    stays = [i for i in range(48) if i not in (3, 40)]
    new = models.blocks(made)[1][0]
    for name in ("gate_proj", "up_proj"):
        assert torch.equal(getattr(new.mlp, name).weight, getattr(block.mlp, name).weight[stays])
        assert torch.equal(getattr(new.mlp, name).bias, getattr(block.mlp, name).bias[stays])
    assert torch.equal(new.mlp.down_proj.weight, block.mlp.down_proj.weight[:, stays])
    assert torch.equal(new.mlp.down_proj.bias, block.mlp.down_proj.bias)
    assert torch.equal(new.self_attn.q_proj.weight, block.self_attn.q_proj.weight[16:])
    assert torch.equal(new.self_attn.k_proj.weight, block.self_attn.k_proj.weight[8:])
    assert torch.equal(new.self_attn.o_proj.weight, block.self_attn.o_proj.weight[:, 16:])
    assert made.config.head_dim == 8 and made.config.num_attention_heads == 2 and made.config.num_hidden_layers == 1
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert report.keep == [0] and report.units["model.layers.0.self_attn.o_proj"].tolist() == [1]


def test_what_is_not_zero_is_never_cut():
    with pytest.raises(ProofError, match="units are zero"):
        cut_model(tiny("llama"), Cut(kept=((groups.NEURONS, 47),)))


def test_layers_that_are_left_keep_their_types():
    model = tiny("qwen2")
    made, _ = cut_model(model, Cut((0,)))
    assert made.config.layer_types == ["full_attention"] and made.model.layers[0].self_attn.layer_idx == 0
    assert made.model.layers[0].self_attn.sliding_window is None


def six_heads(kind="llama", **more):
    config = AutoConfig.for_model(kind, **families.COMMON | {
        "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8} | more)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_head_counts_that_llama_refuses_become_mistral_bit_for_bit():
    model = six_heads(hidden_size=50, num_attention_heads=10, num_key_value_heads=5)
    cut = Cut(kept=((groups.HEADS, 2),))  # four heads do not divide 50
    zeroed(model, cut)
    made, report = cut_model(model, cut)
    assert made.config.model_type == "mistral" and made.config.sliding_window is None and "Mistral" in report.notes[0]
    torch.testing.assert_close(logits(made, jobs.tokens(3)), logits(model, jobs.tokens(3)), rtol=1e-4, atol=1e-5)
    same = six_heads()
    as_mistral = AutoModelForCausalLM.from_config(smaller.as_mistral(same.config.to_dict())).eval()
    as_mistral.load_state_dict(same.state_dict())
    assert torch.equal(logits(as_mistral, jobs.tokens(3)), logits(same, jobs.tokens(3)))


@pytest.mark.parametrize("kind, more", [("gemma2", {}), ("llama", {"attention_bias": True})])
def test_head_counts_that_no_config_takes_are_refused(kind, more):
    model = six_heads(kind, **{"hidden_size": 50, "num_attention_heads": 10, "num_key_value_heads": 5} | more)
    cut = Cut(kept=((groups.HEADS, 2),))
    with pytest.raises(ValueError, match=f"--shrink: a {kind} model: its config refuses what would be left"):
        cut_model(zeroed(model, cut), cut)


LOADS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 10).unsqueeze(0)
    with torch.no_grad():
        cached = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True, eos_token_id=None)
        for _ in range(12):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        agree = (cached[:, :ids.shape[1]] == ids).all().item()
    found[folder] = [agree, logits.double().abs().sum().item()]
assert not any(name.startswith("oneshot") for name in sys.modules)
print(json.dumps(found))
"""


def test_saved_loaded_without_oneshot_generates_with_its_cache(tmp_path):
    """Every family, fewer units and where it allows it a block less: one process that cannot import oneshot."""
    wanted = {}
    for name in FAMILIES:
        model = tiny(name)
        kept = cut_of(model).kept
        dropped = () if name in REFUSES else (0,)
        if not kept and not dropped:
            continue
        made, _ = cut_model(zeroed(model, Cut(dropped, kept)), Cut(dropped, kept))
        made.save_pretrained(tmp_path / name)
        wanted[str(tmp_path / name)] = made
    assert {name for name in FAMILIES if str(tmp_path / name) not in wanted} == {"gemma3n"}, "nothing of it can go"
    done = alone(LOADS, *wanted, cwd=tmp_path)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, made in wanted.items():
        agree, total = found[folder]
        ids = torch.arange(3, 10).unsqueeze(0)
        for _ in range(12):
            out = logits(made, ids)
            ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
        assert agree or "openai" in folder, folder
        assert total == pytest.approx(out.double().abs().sum().item(), rel=1e-4), folder


MIXTURES = [name for name in families.MOE if name not in ("deepseek_v3", "gemma4_moe")]


@pytest.mark.parametrize("name", MIXTURES)
def test_fewer_experts_are_the_model_whose_router_never_chooses_the_others(name, monkeypatch):
    """deepseek_v3 and gemma4 choose by scores that -inf does not forbid: shapes only, below."""
    model, ids = tiny(name), jobs.tokens(3)
    chosen = {cuts.pool_key(block, pool): torch.tensor([0, 2, 3]) for block in models.walk(model)
              for pool in groups.pools(block.module)}
    made = slices.without_experts(model, chosen)
    routers = {id(p) for key, p in model.named_parameters() if p.ndim == 2 and p.shape[0] == 4
               and key.split(".")[-2] in groups.ROUTERS}
    real = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        out = real(x, weight, bias)
        return out.index_fill(-1, torch.tensor([1]), -torch.inf) if id(weight) in routers else out
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    wanted = logits(model, ids)
    monkeypatch.undo()
    assert routers
    torch.testing.assert_close(logits(made, ids), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", families.MOE)
def test_experts_and_their_neurons_go_together(name, tmp_path):
    model = tiny(name)
    chosen = {cuts.pool_key(block, pool): torch.tensor([1, 3]) for block in models.walk(model)
              for pool in groups.pools(block.module)}
    if name == "deepseek_v3":  # two groups of two
        with pytest.raises(ValueError, match="2 groups, at least two in each"):
            slices.without_experts(model, chosen)
        return
    made = slices.without_experts(model, chosen)
    cut = cut_of(made)
    both, report = cut_model(zeroed(made, cut), cut)
    units = mixture.before({**report.units, **chosen})
    assert any(".down_proj.3" in key for key in units) or groups.EXPERTS not in dict(cut.kept)
    said = origin.describe(model, both, report.keep, units, trained=False)
    assert not origin.faults(model, both, said) and not origin.shape_faults(both, said)
    with torch.no_grad():
        both.save_pretrained(tmp_path)
        back = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(back.eval(), jobs.tokens(2)), logits(both, jobs.tokens(2)))


def test_no_fewer_experts_than_each_token_uses():
    model = tiny("mixtral")
    chosen = {cuts.pool_key(block, pool): torch.tensor([1]) for block in models.walk(model)
              for pool in groups.pools(block.module)}
    with pytest.raises(ValueError, match="uses 2 experts for each token"):
        slices.without_experts(model, chosen)


def test_experts_that_nobody_asks_go_first():
    model = tiny("mixtral")
    for block in models.blocks(model)[1]:
        block.mlp.experts.down_proj.data[2] *= 1e-3
    found = mixture.choose(model, jobs.tokens(8), None, Options(batch_size=4, device="cpu", progress=False), 3)
    assert len(found) == 2 and all(kept.tolist() == [0, 1, 3] for kept in found.values())
    with pytest.raises(ValueError, match="--experts 4"):
        mixture.choose(model, jobs.tokens(4), None, Options(device="cpu", progress=False), 4)
    with pytest.raises(ValueError, match="no mixture"):
        mixture.choose(tiny("llama"), jobs.tokens(4), None, Options(device="cpu", progress=False), 1)
