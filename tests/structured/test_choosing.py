"""Order of blocks, budgets, mixtures, spread widths, origins: each against what is slow and plain."""

import copy
import itertools
from dataclasses import replace

import families
import jobs
import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div
from transformers import AutoConfig, AutoModelForCausalLM

from oneshot import calibrate, heal, models
from oneshot.models import groups
from oneshot.prune import loop
from oneshot.prune.options import Options
from oneshot.structured import Cut, budget, cut, cut_model, depth, origin, spread

OPTIONS = Options(batch_size=4, device="cpu", progress=False)


def deep(layers=5, seed=0):
    """A random Llama of several layers."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **families.COMMON | {"num_hidden_layers": layers})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.7 * p.shape[-1] ** -0.5)
    return model


def kl_of(dense, ids, dropped):
    """KL(dense ‖ model without the blocks), by plain forwards of the sliced model."""
    made, _ = cut_model(dense, Cut(tuple(sorted(dropped))))
    p, q = (m(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (dense, made))
    return float(kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())


def test_greedy_order_is_the_naive_one():
    model, ids = deep(), jobs.tokens(6)
    rows = depth.by_kl(model, loop.start(model, ids, None, OPTIONS), 3)
    gone = []
    for row in rows:
        kls = {b: kl_of(model, ids, [*gone, b]) for b in range(5) if b not in gone}
        assert row["block"] == min(kls, key=kls.get)
        assert row["kl"] == pytest.approx(kls[row["block"]], rel=1e-4)
        gone.append(row["block"])


def test_influence_is_shortgpts():
    model, ids = deep(), jobs.tokens(6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 10:] = False
    hidden = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True).hidden_states
    last = []
    handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: last.append(out))
    model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    handle.remove()
    states = [*hidden[:-1], last[0]]
    wanted = [1 - float(cosine_similarity(a, b, dim=-1)[mask].mean()) for a, b in itertools.pairwise(states)]
    rows = depth.by_influence(model, loop.start(model, ids, mask, OPTIONS), 4)
    assert [row["block"] for row in rows] == sorted(range(5), key=lambda b: wanted[b])[:4]
    for row in rows:
        assert row["influence"] == pytest.approx(wanted[row["block"]], abs=1e-5)


def test_fixed_and_refused_blocks_never_go():
    model, ids = deep(), jobs.tokens(4)
    start = loop.start(model, ids, None, OPTIONS)
    rows = depth.by_kl(model, start, 5, fixed=(0, 1), allowed=lambda gone: 2 not in gone)
    assert {row["block"] for row in rows} == {3, 4}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe", "llama-tied-bias", "gemma2", "phi3", "gpt_oss"])
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_cuts_meet_the_budget_closely(name, share):
    model = families.tiny(name)
    sizes, whole = budget.Sizes.of(model), cut.whole(model)
    own = budget.Budget(share * whole, sizes.left)
    mixtures = budget.Mixtures(model, own, [1])
    found = [mixtures.at(d, h) for d in range(2) for h in range(len(mixtures.heads))]
    found = [c for c in found if c]
    assert found
    for c in found:
        assert sizes.left(c) == cut.parameters(model, c) <= share * whole
        known = cut.kinds(model)
        bigger = [(kind, n + own.step(known[kind].count, kind)) for kind, n in c.kept
                  if kind not in (groups.HEADS, groups.QUERIES)]
        if bigger:
            more = Cut(c.dropped, tuple((k, dict(bigger).get(k, n)) for k, n in c.kept))
            assert sizes.left(more) > share * whole or c.dropped


def test_multiples_and_what_must_stay():
    model = families.tiny("llama")
    whole = cut.whole(model)
    own = budget.Budget(0.7 * whole, budget.Sizes.of(model).left, frozenset({groups.HEADS, groups.QUERIES}), 4)
    mixtures = budget.Mixtures(model, own, [])
    assert len(mixtures.heads) == 1 and dict(mixtures.at(0, 0).kept)[groups.NEURONS] % 4 == 0
    assert mixtures.at(1, 0) is None and mixtures.at(0, 1) is None
    tight = budget.Budget(0.01 * whole, budget.Sizes.of(model).left)
    assert budget.neurons_for(model, tight, []) is None


def spread_of(model, ids, share, free=(groups.NEURONS, groups.HEADS)):
    """The spread of a model, which stays as it is."""
    own = budget.Budget(share * cut.whole(model), lambda c: cut.parameters(model, c))
    before = {name: p.clone() for name, p in model.named_parameters()}
    increases, prices = spread.curves(model, ids, None, OPTIONS, Cut(), own)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert increases.keys() == prices.keys() and all(v >= 0 for values in increases.values() for v in values)
    found = spread.spread(model, own, Cut(), spread.by_price(model, own, increases, prices), free)
    assert cut.parameters(model, found) <= own.target
    return dict(found.own)


def test_spread_takes_where_the_least_is_lost():
    """One layer's neurons matter little, and another's KV groups: they lose most."""
    model, ids = deep(3), jobs.tokens(12)
    model.model.layers[1].mlp.down_proj.weight.data[:, 16:] *= 1e-3
    model.model.layers[2].self_attn.o_proj.weight.data *= 1e-3
    left = spread_of(model, ids, 0.8)
    neurons, heads = ([left.get(f"model.layers.{n}.{part}") for n in range(3)]
                      for part in ("mlp.down_proj", "self_attn.o_proj"))
    assert neurons[1] < min(neurons[0], neurons[2]) and heads == [2, 2, 1]
    assert spread_of(model, ids, 0.85, {groups.NEURONS}).keys() == {f"model.layers.{n}.mlp.down_proj" for n in range(3)}


def test_spread_leaves_what_a_cut_says():
    """Dropped blocks and parts that go as a whole stay so; fewer query heads leave the KV groups."""
    model = deep(4)
    own = budget.Budget(0.6 * cut.whole(model), lambda c: cut.parameters(model, c),
                        own=(("model.layers.3.mlp.down_proj", 0),))
    start = Cut((1,), ((groups.QUERIES, 1),), own.own)
    costs = spread.by_price(model, own, *spread.curves(model, jobs.tokens(4), None, OPTIONS, start, own))
    names = {f"model.layers.{n}.{part}" for n in (0, 2, 3) for part in ("mlp.down_proj", "self_attn.o_proj")}
    assert costs.keys() == names - {"model.layers.3.mlp.down_proj"}
    found = spread.spread(model, own, start, costs, {groups.NEURONS, groups.HEADS})
    assert found.dropped == (1,) and found.kept == start.kept and dict(found.own)["model.layers.3.mlp.down_proj"] == 0
    assert not any("o_proj" in name for name, _ in found.own) and cut.parameters(model, found) <= own.target


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "gpt2", "gpt_neox", "qwen2"])
def test_spread_takes_no_more_than_it_must(name):
    """One chunk fewer, the last that went, leaves too many parameters; what is given stays as it is."""
    model = families.tiny(name)
    first, (width, _) = next(iter(spread.layers(model, budget.Budget(0.0, float)).items()))
    for given in ((), ((first, width.count - 1),)):
        start = Cut((), (), given)
        own = budget.Budget(0.9 * cut.parameters(model, start), lambda c: cut.parameters(model, c), own=given)
        there = spread.layers(model, own)
        costs = {key: [1.0 + chunk for chunk in range((width.count - 1) // spread.step(width, own))]
                 for key, (width, _) in there.items()}
        found = dict(spread.spread(model, own, start, costs, {groups.NEURONS, groups.HEADS}).own)
        left = cut.parameters(model, Cut((), (), tuple(found.items())))
        sizes = [size for key, (width, size) in there.items() if found[key] < width.count and key not in dict(given)]
        assert left <= own.target < left + max(sizes) and found | dict(given) == found


def test_a_curve_has_one_increase_a_chunk():
    """Of 528 neurons 49 chunks of 8 may go; as a share of 1 / 49 in floats a chunk was 7. Of two KV groups one may."""
    config = AutoConfig.for_model("llama", **families.COMMON | {"intermediate_size": 528})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    own = budget.Budget(0.0, lambda c: cut.parameters(model, c))
    increases, _ = spread.curves(model, jobs.tokens(12), None, OPTIONS, Cut(), own)
    chunks = {name.rpartition(".")[2]: len(values) for name, values in increases.items()}
    assert chunks == {"down_proj": 49, "o_proj": 1}


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "mixtral"])
def test_a_price_is_the_kl_of_plain_forwards(name, monkeypatch):
    """Without half of what may go of one layer, its error increases by the first half of its curve."""
    model, ids, halves = families.tiny(name), jobs.tokens(12), []
    real = spread.curve

    def seen(*given):
        found = real(*given)
        halves.append(found[1])
        return found
    monkeypatch.setattr(spread, "curve", seen)
    own = budget.Budget(0.0, lambda c: cut.parameters(model, c))
    increases, prices = spread.curves(model, ids, None, OPTIONS, Cut(), own)
    assert increases and len(increases) == len(halves)
    for weight, half in zip([w for w in models.all_weights(model) if w.name in increases], halves, strict=True):
        changed = copy.deepcopy(model)
        next(w for w in models.all_weights(changed) if w.name == weight.name).set(half)
        p, q = (m(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (model, changed))
        lost = float(kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())
        whole = sum(increases[weight.name][:(len(increases[weight.name]) + 1) // 2])
        assert whole > 0 and prices[weight.name] == pytest.approx(lost / whole, rel=1e-3)


def test_flaps_own_widths_are_the_papers():
    """The lowest standardised scores of all layers go: the threshold of the authors' code, found by sorting."""
    model, ids = deep(3), jobs.tokens(12)
    model.model.layers[1].mlp.down_proj.weight.data[:, :24] *= 0.2
    own = budget.Budget(0.75 * cut.whole(model), lambda c: cut.parameters(model, c))
    seen = {}
    for layer in model.model.layers:
        for module in (layer.mlp.down_proj, layer.self_attn.o_proj):
            module.register_forward_hook(lambda m, x, out: seen.__setitem__(m, x[0].flatten(0, -2)))
    model(input_ids=ids, use_cache=False)
    costs = {}
    for n, layer in enumerate(model.model.layers):
        for part, module, size in (("mlp.down_proj", layer.mlp.down_proj, 1),
                                   ("self_attn.o_proj", layer.self_attn.o_proj, 16)):
            wifv = seen[module].var(0, unbiased=False) * module.weight.square().sum(0)
            wifv = wifv if size == 1 else wifv.square()
            z = ((wifv - wifv.mean()) / wifv.std()).view(-1, size).mean(1)
            costs[f"model.layers.{n}.{part}"] = z
    found = spread.standardised(model, ids, None, OPTIONS, own)
    assert found.keys() == costs.keys()
    for name, z in costs.items():
        chunk = (len(z) - 1) // len(found[name])
        wanted = z.sort().values[:len(found[name]) * chunk].view(-1, chunk).mean(1)
        torch.testing.assert_close(torch.tensor(found[name]), wanted, rtol=1e-3, atol=1e-4)
    left = dict(spread.spread(model, own, Cut(), found, {groups.NEURONS, groups.HEADS}).own)
    gone = {name: (len(z) - left[name]) * len(found[name]) // (len(z) - 1) for name, z in costs.items()}
    assert max(cost for name in found for cost in found[name][:gone[name]]) <= min(
        found[name][gone[name]] for name in found if gone[name] < len(found[name]))


def test_origin_tells_original_from_changed():
    model = families.tiny("llama")
    c = Cut((0,), ((groups.NEURONS, 40),))
    with torch.no_grad():
        changed = families.tiny("llama")
        changed.model.layers[1].mlp.down_proj.weight[:, 5:13] = 0
        changed.model.layers[1].mlp.down_proj.weight[:, :5] += 1
        made, report = cut_model(changed, c)
    said = origin.describe(model, made, report.keep, report.units, trained=False)
    states = {name: entry["state"] for name, entry in said["tensors"].items()}
    assert states.pop("model.layers.0.mlp.down_proj.weight") == "refit" and set(states.values()) == {"original"}
    assert said["tensors"]["model.layers.0.mlp.up_proj.weight"]["from"] == "model.layers.1.mlp.up_proj.weight"
    assert said["units"] == {"model.layers.1.mlp.down_proj": "0-4,13-47"} and not origin.faults(model, made, said)
    assert not origin.shape_faults(made, said)
    made.model.layers[0].mlp.up_proj.weight.data[3, 3] += 1
    assert [name for name, _ in origin.faults(model, made, said)] == ["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("numbers", [[], [0], [0, 1, 2], [1, 3, 4, 9]])
def test_spans_are_read_back(numbers):
    assert origin.numbers(origin.spans(torch.tensor(numbers, dtype=torch.long))).tolist() == numbers


@pytest.mark.parametrize("text", ["3,1", "1-1-1", "x", "2,2"])
def test_spans_of_nothing_are_refused(text):
    with pytest.raises(ValueError):
        origin.numbers(text)


def test_walk_aims_behind_the_dropped_blocks():
    """The dense model's activations pass through a dropped block together with the one before it."""
    model, ids, seen = deep(4), jobs.tokens(8), {}

    class Look(heal.Heal):
        def after_block(self, block, activations, targets):
            seen[block.number] = [t.clone() for t in targets]
    states = []
    handles = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in model.model.layers]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    job = jobs.job_of(model, "magnitude", healers=[Look(None)])
    loop.prune_model(model, ids, None, replace(job, plan={}, dropped=frozenset({1, 2}), staged=True))
    assert set(seen) == {0, 3}
    torch.testing.assert_close(torch.cat(seen[0]), states[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(seen[3]), states[3], rtol=1e-5, atol=1e-5)


def test_tokens_count_by_the_norm_of_the_dense_output():
    """Statistics of a weighing job: G of inputs over the norm of what the dense block gives, of mean square 1."""
    model, ids = deep(2), jobs.tokens(4)
    activations = loop.start(model, ids, None, OPTIONS)
    block = next(models.walk(model, "cpu"))
    after = activations.fork()
    calibrate.replay(block.module, after, 0)
    activations.scales = loop.scales(activations, after)
    weight = next(w for w in block.weights if w.linear == "mlp.down_proj")
    statistics, _, _ = calibrate.collect(block.module, activations, 0, [weight], {"outer"})
    seen = []
    handle = block.module.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    calibrate.forward(block.module, activations, 0, 0)
    handle.remove()
    norms = after.hidden[0].flatten(0, 1).norm(dim=1, keepdim=True)
    x = seen[0] / norms / (1 / norms.square()).mean().sqrt()
    torch.testing.assert_close(statistics[weight.name].G, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
