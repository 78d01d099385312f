"""Plans of `oneshot fit`: costs are those of the models, losses those of plain torch, the best is the best of all."""

import copy
import itertools
import json
import random
from pathlib import Path

import families
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oneshot import models
from oneshot.data.windows import Tokens
from oneshot.models import groups
from oneshot.pipeline import forms
from oneshot.pipeline.fit import candidates, choice, plans, rounds
from oneshot.pipeline.fit.plans import Candidates, Costs, Plan
from oneshot.pipeline.fit.steps import State, Steps, kept_sparse
from oneshot.quantise import grids, rtn
from oneshot.structured import slices

HEADS, NEURONS = groups.HEADS, groups.NEURONS


def llama(blocks=4, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model("mistral", **families.COMMON | {"num_hidden_layers": blocks, "sliding_window": None})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            p.normal_(std=1.5 * p.shape[-1] ** -0.5)
    return model


TABLE = {"units": {HEADS: 2, NEURONS: 48}, "parts": {kind: {
    "rest": 3.0, "block": 2.0, "saved": {HEADS: {"1": 0.5}, NEURONS: {"24": 0.8, "12": 1.0}},
    "forms": {"2:4": 0.6, "int8": 0.9, "2:4 int8": 1.1}, "head": {"int8": 0.7}}
    for kind in ("prefill", "decode1", "decode8")}}
PLANS = [Plan(), Plan(drop=(1,)), Plan((0, 2), ((HEADS, 1),)), Plan((3,), (), ((NEURONS, 24),), (0, 2)),
         Plan(grids=((0, "int8"), (1, "int8"), (2, "int4"))),
         Plan((1,), ((HEADS, 1),), ((NEURONS, 24),), (0, 1, 2), ((0, "int8"), (2, "int4"))), Plan(output="int8")]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_costs_are_those_of_the_smaller_model(plan):
    model = llama()
    costs = Costs(model, TABLE).of(plan)
    made = slices.first_units(model, plan.cut)
    left = len(models.blocks(made)[1])
    assert costs["parameters"] == pytest.approx(sum(p.numel() for p in models.blocks(made)[1].parameters()))
    named = {b: forms.named(b in plan.sparse, dict(plan.grids).get(b)) for b in range(left)}
    assert costs["bytes"] == pytest.approx(forms.stored(forms.linears(made), named), rel=0.03)  # norms, scales
    kept = dict(plan.cut.kept)
    block = 2.0 - (0.5 if HEADS in kept else 0) - (0.8 if NEURONS in kept else 0)
    gained = sum(TABLE["parts"]["decode1"]["forms"].get(form, 0.0) for form in named.values()) * block / 2
    assert costs["latency"] == pytest.approx(3 + left * block - gained - (0.7 if plan.output else 0))
    assert Plan.of(plan.plain()) == plan


def made_up(draw, blocks=4, start=(2,)):
    """Candidates by chance."""
    return Candidates([((), 0.0), ((2,), draw.random())], [((), 0.0), (((HEADS, 1),), draw.random())],
                      [((), 0.0), (((NEURONS, 36),), draw.random())],
                      {b: draw.random() for b in range(blocks) if b not in start},
                      {key: {b: factor * draw.random() for b in range(blocks)} for key, factor in (("int8", 0.3),
                                                                                                   ("int4", 0.8))},
                      {"int8": draw.random()})


def test_candidates_are_what_their_json_gives():
    found = made_up(random.Random(0))
    found.influence = {0: 0.5, 3: 0.25}
    assert Candidates.of(json.loads(json.dumps(found.plain()))) == found != Candidates()


@pytest.mark.parametrize("seed", range(6))
def test_the_best_plan_is_as_good_as_trying_all(seed):
    """Every cut with every form of every block, and of the output head."""
    draw = random.Random(seed)
    model = llama()
    costs, found, start = Costs(model, TABLE), made_up(draw), Plan(sparse=(2,))
    whole = costs.of(Plan())
    limits = {kind: draw.uniform(0.3, 0.7) * whole[kind] for kind in draw.sample(["latency", "bytes", "parameters"], 2)}
    if "parameters" in limits:
        limits["parameters"] = draw.uniform(0.6, 0.95) * whole["parameters"]
    least = None
    for (drop, a), (heads, b), (widths, c) in itertools.product(found.drops, found.heads, found.widths):
        plan = Plan(drop, heads, widths)
        each = [[(costs.block(plan, n, share, forms.named(is24, key)),
                  (found.sparse[n] if is24 and n != 2 else 0.0) + (found.grids[key][n] if key else 0.0))
                 for is24 in ((True,) if n == 2 else (False, True)) for key in (None, "int8", "int4")]
                for n, share in costs.blocks(plan)]
        for output, *chosen in itertools.product((None, "int8"), *each):
            rest = costs.rest(Plan(output=output))
            if all(rest.get(kind, 0.0) + sum(cost[kind] for cost, _ in chosen) <= limit * (1 + 1e-9)
                   for kind, limit in limits.items()):
                loss = a + b + c + sum(loss for _, loss in chosen) + (found.output[output] if output else 0.0)
                least = loss if least is None else min(least, loss)
    best = plans.best(costs, found, start, limits)
    assert (best is None) == (least is None)
    if best:
        assert best[1] == pytest.approx(least) and candidates.within(costs, best[0], limits)
        part = plans.changed(best[0], start, found)
        other = plans.best(costs, found, start, limits, frozenset({part}))
        assert other is None or (other[1] >= best[1] - 1e-12 and other[0] != best[0])


@pytest.mark.parametrize("most", [4000, 5])
@pytest.mark.parametrize("seed", range(8))
def test_no_grid_for_all_blocks_is_better_than_one_for_each(seed, most, monkeypatch):
    """Also where the choice is not exact; and where rounding must stay as it is, it does."""
    monkeypatch.setattr(choice, "MOST", most)
    draw = random.Random(seed)
    model = llama(12)
    costs, found = Costs(model, TABLE), made_up(draw, 12)
    limits = {kind: draw.uniform(0.3, 0.9) * costs.of(Plan())[kind] for kind in draw.choice([["bytes"], ["latency"], [
        "bytes", "latency"]])}
    best = plans.best(costs, found, Plan(), limits)
    for key in (None, "int8", "int4"):
        grids = candidates.everywhere(costs, key)
        if candidates.within(costs, Plan(grids=grids), limits):
            assert best[1] <= sum(found.grids[key].values() if key else [0.0]) + 1e-12
        start = Plan(grids=grids)
        kept = plans.best(costs, found, start, limits, frozenset({"grids"}))
        assert kept is None or (set(dict(kept[0].grids).values()) <= {key} and kept[1] >= best[1] - 1e-12)


def test_plans_that_are_close_are_measured_as_a_whole(monkeypatch):
    """Foretold, a block costs least; as a whole, neurons do. What is foretold to lose far more is not measured."""
    model = llama()
    costs = Costs(model)
    found = Candidates([((), 0.0), ((2,), 0.3)], [((), 0.0), (((HEADS, 1),), 9.0)], [((), 0.0), (((NEURONS, 8),), 0.5)],
                       {}, {"int8": dict.fromkeys(range(4), 0.025)})
    limits = {"parameters": 0.76 * costs.of(Plan())["parameters"]}
    close = plans.alternatives(costs, found, Plan(), limits)
    assert close == [(Plan(drop=(2,)), 0.3), (Plan(widths=((NEURONS, 8),)), 0.5)]

    class Whole:
        def whole(self, model, plan):
            return 0.45 if plan.drop else 0.35
    own = rounds.Fit(None, None, None, {}, None)
    monkeypatch.setattr(rounds.Fit, "looks", Whole())
    assert own.least(model, found, close) == (Plan(widths=((NEURONS, 8),)), 0.35)
    grids = tuple((b, "int8") for b in range(3))
    rounded = [(Plan(drop=(2,), grids=grids), 0.4), (Plan(widths=((NEURONS, 8),)), 0.5)]
    assert own.least(model, found, rounded)[1] == pytest.approx(0.35) and own.least(model, found, close[:1])[1] == 0.3
    assert plans.uncut(rounded[0][0], found, 0.4) == pytest.approx(0.1)


def test_blocks_that_are_24_keep_their_places_when_others_go():
    state = State("a", "a", (1, 3))
    assert kept_sparse(state, Plan(drop=(0, 2))) == (0, 1) and kept_sparse(state, Plan(drop=(3,))) == (1,)
    assert kept_sparse(State("a", "a"), Plan(drop=(3,))) == ()


# ---------------------------------------------------------------- losses

@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """(Looks, the dense model, the ids that it looks at)."""
    place = tiny.make(tmp_path_factory.mktemp("place"))
    words = ("--calibration", str(place / "calibration.txt"), "--nsamples", "8", "--seqlen", "16", "--device", "cpu",
             "--no-progress")
    own = Steps(words, str(place / "model"), "model.layers", "obs", (), Path(place / "out"))
    model, ids = llama(), (torch.arange(128) * 7919 % 64).view(8, 16)
    return candidates.Looks(own.cutting, own.sparsening, model, Tokens(ids, None, "", "")), model, ids


@torch.no_grad()
def naive(dense, model, ids):
    """KL(dense ‖ model), nats a token, float64."""
    p, q = (m(ids).logits.double().log_softmax(-1) for m in (dense, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def only_block(model, other, b):
    """A copy of a model with one block of another."""
    made = copy.deepcopy(model)
    made.model.layers[b] = other.model.layers[b]
    return made


def test_losses_are_the_kl_of_each_part_alone(looks):
    own, model, ids = looks
    before, limits = copy.deepcopy(model.state_dict()), {"parameters": 1.0, "bytes": 1.0}
    costs = Costs(model)
    found = own.at(model, costs, Plan(), {kind: 0.6 * costs.of(Plan())[kind] for kind in limits},
                   frozenset({"shrink", "2:4", "int8", "int4"}))
    assert own.base(model) == pytest.approx(0, abs=1e-6) and not found.output  # it gains nothing of these
    for drop, loss in found.drops[1:]:
        cut = slices.first_units(model, Plan(drop).cut)
        assert loss == pytest.approx(naive(model, cut, ids), rel=1e-3)
    for grid in ("int8", "int4"):
        rounded = copy.deepcopy(model)
        rtn.quantise_model(rounded, grids.parse(forms.GRIDS[grid]))
        assert sum(found.grids[grid].values()) == pytest.approx(naive(model, rounded, ids), rel=1e-2, abs=1e-7)
        alone = {b: naive(model, only_block(model, rounded, b), ids) for b in range(4)}
        for b, loss in found.grids[grid].items():
            assert loss / sum(found.grids[grid].values()) == pytest.approx(alone[b] / sum(alone.values()), rel=0.02)
    assert set(found.sparse) == set(range(4)) == set(found.influence) and min(found.sparse.values()) > 0
    assert found.widths[1:] and [kept for kept, _ in found.heads] == [(), ((HEADS, 1),), ((groups.QUERIES, 1),)]
    left = [dict(kept).get(NEURONS, 48) for kept, _ in found.widths]
    assert left == sorted(left, reverse=True) and all(n % 4 == 0 for n in left)
    both = Plan((0,), found.heads[1][0], found.widths[-1][0])  # more than its parts, and the block is really gone
    assert own.whole(model, Plan(drop=found.drops[1][0])) == pytest.approx(found.drops[1][1], rel=1e-3)
    assert own.whole(model, both) > max(found.heads[1][1], found.widths[-1][1])
    losses = [loss for _, loss in found.widths]
    assert losses == sorted(losses)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_gains_nothing_is_not_measured_and_widths_stay_once_a_block_is_24(looks):
    own, model, _ = looks
    costs = Costs(model)
    found = own.at(model, costs, Plan(sparse=(0,)), {"parameters": 0.6 * costs.of(Plan())["parameters"]},
                   frozenset({"shrink", "2:4", "int8", "int4"}))
    assert not found.sparse and not found.grids and len(found.widths) == len(found.heads) == 1
    assert found.drops[1:]


def test_a_block_alone_in_24_is_what_pruning_it_gives(looks):
    """The naive way: all linears solved on the dense model's inputs, one block's put into a copy."""
    own, model, ids = looks
    found = own.in_24(model, Plan(sparse=(1,)))
    assert set(found) == {0, 2, 3}
    from oneshot.pipeline.plan import make_plan, pruning_job
    from oneshot.prune import shared_inputs

    job = pruning_job(own.sparse, make_plan(own.sparse, model))
    [(_, new)] = shared_inputs.prune_shared(model, own.ids, own.mask, [job])
    for b, kl in found.items():
        other = copy.deepcopy(model)
        for weight in models.all_weights(other):
            if weight.name.startswith(f"model.layers.{b}."):
                weight.set(new[weight.name])
        assert kl == pytest.approx(naive(model, other, ids), rel=1e-3)


def test_no_more_blocks_are_tried_than_a_round_can_need(looks):
    """Alone, three of four blocks must go for a quarter of the bytes; with int4 none has to, so a third is tried."""
    own, model, _ = looks
    costs = Costs(model)
    limits = {"bytes": 0.25 * costs.of(Plan())["bytes"]}
    assert len(own.drops(model, costs, limits, frozenset({"shrink"}))) == 3
    assert len(own.drops(model, costs, limits, frozenset({"shrink", "int4"}))) == 1


def test_a_step_takes_nothing_that_the_whole_way_leaves():
    """Alone, the step would take neurons; the way wants fewer query heads, one block, and no more neurons than 36."""
    found = Candidates([((), 0.0), ((2,), 0.1), ((2, 0), 0.5)],
                       [((), 0.0), (((HEADS, 1),), 0.1), (((groups.QUERIES, 1),), 0.4)],
                       [((), 0.0), (((NEURONS, 44),), 0.01), (((NEURONS, 36),), 0.02), (((NEURONS, 24),), 0.03)],
                       {0: 0.1}, {"int8": {0: 0.1}, "int4": {0: 0.2}})
    way = plans.way_of(Plan((2,), ((groups.QUERIES, 1),), ((NEURONS, 36),), (0, 1), ((1, "int4"),)))
    on = plans.towards(found, way, 0, Plan())
    assert [d for d, _ in on.drops] == [(), (2,)] and [h for h, _ in on.heads] == [(), ((groups.QUERIES, 1),)]
    assert [w for w, _ in on.widths] == [(), ((NEURONS, 44),), ((NEURONS, 36),)]
    assert set(on.grids) == {"int4"} and on.sparse == found.sparse
    assert [d for d, _ in plans.towards(found, way, 1, Plan(grids=((0, "int8"),))).drops] == [()]
    assert "int8" in plans.towards(found, way, 1, Plan(grids=((0, "int8"),))).grids
    way["sparse"] = False
    assert not plans.towards(found, way, 0, Plan()).sparse
    assert plans.towards(found, way, 0, Plan(sparse=(1,))).sparse == found.sparse
