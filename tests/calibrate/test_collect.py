"""Collected statistics are those of the plain model's inputs, in every family, however many passes it takes."""

import families
import pytest
import torch
from families import T, tiny
from jobs import weights_in
from plainly import CLOSE, FAMILIES, B, independent_inputs, padding, tokens

from oneshot import calibrate, models
from oneshot.calibrate.collect import Collector, Limits

ALL = frozenset({"sum", "sum_sq", "outer"})


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


def test_after_the_first_batch_nothing_is_computed_behind_the_last_linears_input():
    """down_proj itself runs for the output of the first batch alone; three batches are collected all the same."""
    model, ids = tiny("llama"), tokens()
    block, ran = models.blocks(model)[1][0], []
    block.mlp.down_proj.register_forward_hook(lambda *_: ran.append(1))
    activations = calibrate.capture(model, ids, None, batch_size=B)
    ran.clear()
    with torch.no_grad():
        plain = calibrate.forward(block, activations, 0, 0)
    ran.clear()
    statistics, _, first = calibrate.collect(block, activations, 0, weights_in(block), ALL)
    assert len(ran) == 1 and len(activations) == 3 and torch.equal(first, plain)
    assert {s.n for s in statistics.values()} == {ids.numel()}
