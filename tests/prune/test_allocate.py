"""Allocation: the contract of every method, and the zeros of the uniform plan, met for any wish."""

import dataclasses
import json

import numpy as np
import pytest
from allocating import EXAMPLES, GROUPS, SHARES, assert_met, flat, method, model, same_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import layer, statistics_of

from oneshot.calibrate.statistics import NEEDS
from oneshot.prune import allocate
from oneshot.prune.patterns import NM, Dense, Unstructured, count

UNSTRUCTURED = ["uniform", "arithmetic", "owl", "error"]
SHAPE = st.tuples(st.integers(1, 40), st.integers(1, 300))


# --- the contract -------------------------------------------------------------------------------------------


def test_names():
    assert allocate.names() == sorted([*UNSTRUCTURED, "mix", "sensitivity"])
    with pytest.raises(ValueError, match="--allocate nope: there are arithmetic"):
        allocate.module("nope")


@pytest.mark.parametrize("name", allocate.names())
def test_module(name):
    module, cfg = method(name)
    assert module.__doc__ and module.needs <= NEEDS and bool(module.needs) == hasattr(module, "measure")
    assert cfg == module.Config() and hash(cfg) == hash(module.Config()) and cfg.__dataclass_params__.frozen
    for f in dataclasses.fields(cfg):
        assert f.metadata["help"]
        json.dumps(getattr(cfg, f.name))


@pytest.mark.parametrize("name", UNSTRUCTURED)
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.7, "matrix"), Unstructured(0.6, 16)])
def test_measured_on_a_model(name, pattern):
    """From weights and inputs to a plan: plain values, sound counts, whether or not all linears saw tokens."""
    module, cfg = method(name)
    blocks = model([(8, 40), (8, 40), (16, 24)], [(8, 40), (8, 40), (16, 24)])
    measured = {}
    for b, block in enumerate(blocks):
        if module.needs:
            linears = {}
            for i, (full, linear) in enumerate(block.items()):
                W, X = (t.float() for t in layer(*linear.shape, 90, seed=10 * b + i))
                if i != 1:
                    linears[full] = (lambda W=W: W, statistics_of(X, module.needs))
            measured |= module.measure(linears, pattern, cfg)
    assert set(measured) == ({n for n in flat(blocks) if not n.endswith("1")} if module.needs else set())
    json.dumps(measured)
    plan = module.plan(measured, blocks, pattern, cfg)
    assert_met(plan, blocks, pattern)
    assert (plan == dict.fromkeys(flat(blocks), pattern)) == (name == "uniform")


@pytest.mark.parametrize("name", ["arithmetic", "owl", "error"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Dense()], ids=str)
def test_an_n_of_m_leaves_nothing_to_allocate(name, pattern):
    module, cfg = method(name)
    with pytest.raises(ValueError, match="--allocate: a pattern of"):
        module.plan({}, same_blocks(2), pattern, cfg)


@pytest.mark.parametrize("name, flags", [
    ("arithmetic", {"slope": 1.0}), ("owl", {"spread": -0.1}), ("owl", {"outlier": 0.0}), ("error", {"spread": 2.0}),
    ("error", {"points": 2}), ("error", {"early": 0.0}), ("mix", {"budget": 0.0}), ("mix", {"also": "0.5"}),
    ("mix", {"also": "dense,nope"})])
def test_flags_are_checked(name, flags):
    with pytest.raises(ValueError, match=f"--{name}.{next(iter(flags))}"):
        method(name, **flags)


# --- meeting the target -------------------------------------------------------------------------------------


@settings(EXAMPLES, max_examples=120)
@given(st.data(), st.lists(st.lists(SHAPE, min_size=1, max_size=3), min_size=1, max_size=5), SHARES, GROUPS)
def test_any_wish_meets_the_target(data, shapes, sparsity, group):
    blocks, pattern = model(*shapes), Unstructured(sparsity, group)
    wish = st.floats(-2, 2)
    wanted = {name: data.draw(wish) for name in flat(blocks)}
    lowest, highest = data.draw(st.floats(0, sparsity)), data.draw(st.floats(sparsity, 1))
    assert_met(allocate.meet(wanted, blocks, pattern, lowest, highest), blocks, pattern, lowest, highest)


@pytest.mark.parametrize("group", range(1, 9))
def test_few_rows_and_many_columns_meet_the_target_in_any_group(group):
    """Column groups: a linear's zeros change by its number of blocks, up to 300 here, where all have 13 rows."""
    blocks, pattern, rng = model([(4, 235), (6, 280), (3, 54)]), Unstructured(0.7, group), np.random.default_rng(group)
    for wanted in (rng.uniform(-1, 1, 3) for _ in range(6)):
        for bounds in ((0.0, 1.0), (0.66, 0.71)):
            assert_met(allocate.meet(dict(zip(flat(blocks), wanted, strict=True)), blocks, pattern, *bounds), blocks,
                       pattern, *bounds)


def test_wishes_that_can_be_met_are_not_drawn_together():
    """A real model's proportions: more rows than blocks of columns, so that nothing shrinks."""
    blocks, pattern = model(*[[(64, 64), (172, 64), (64, 172)]] * 4), Unstructured(0.6, 8)
    wanted = dict(zip(flat(blocks), np.random.default_rng(0).uniform(0.5, 0.7, 12), strict=True))
    plan = allocate.meet(wanted, blocks, pattern)
    differences = np.array([plan[n].sparsity - wanted[n] for n in plan])
    assert_met(plan, blocks, pattern)
    assert np.ptp(differences) <= 2 / (64 * 4)


@EXAMPLES
@given(st.lists(st.lists(SHAPE, min_size=1, max_size=3), min_size=1, max_size=4), SHARES, GROUPS, st.floats(-3, 3))
def test_equal_wishes_are_the_uniform_plan(shapes, sparsity, group, wish):
    blocks, pattern = model(*shapes), Unstructured(sparsity, group)
    assert allocate.meet(dict.fromkeys(flat(blocks), wish), blocks, pattern) == dict.fromkeys(flat(blocks), pattern)


def test_the_mean_is_weighted_by_parameters():
    blocks, pattern = model([(100, 100)], [(10, 100)]), Unstructured(0.5, "matrix")
    plan = allocate.meet({"layers.0.0": 0.0, "layers.1.0": 0.22}, blocks, pattern)
    assert [p.sparsity for p in plan.values()] == [0.48, 0.7]


@pytest.mark.parametrize("k, n, sparsity", [(1, 4, 0.3), (44, 64, 0.7), (29, 100, 0.29), (333333, 10**6, 0.333333),
                                            (0, 7, 0.0), (12345678, 45088768, 0.2738083)])
def test_few_decimals(k, n, sparsity):
    p = allocate.rounded(Unstructured(0.999, "matrix"), k, n)
    assert p.sparsity == sparsity and count(sparsity, n) == k
