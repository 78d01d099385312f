"""Arithmetic, OWL, error and sensitivity: each allocation's own idea."""

import json

import numpy as np
import pytest
import reference as ref
import torch
from allocating import EXAMPLES, GROUPS, SHARES, assert_met, curve, flat, method, model, same_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import layer, statistics_of

from oneshot.prune import allocate
from oneshot.prune.patterns import Unstructured

BLIND_TO_DEPTH = {"owl": {}, "error": {"early": 1.0}}


def test_arithmetic_is_an_arithmetic_progression():
    blocks, pattern = same_blocks(5, [(20, 1000), (7, 1000)]), Unstructured(0.6, "row")
    for slope in (0.2, -0.2):
        plan = method("arithmetic")[0].plan({}, blocks, pattern, method("arithmetic", slope=slope)[1])
        assert_met(plan, blocks, pattern)
        assert [plan[f"layers.{b}.0"].sparsity for b in range(5)] == \
            pytest.approx([0.6 + slope * (b / 4 - 0.5) for b in range(5)], abs=1e-3)


def test_arithmetic_is_cut_at_the_ends():
    """A slope beyond what the sparsity leaves room for: the others take over what the cut ones cannot."""
    blocks, pattern = same_blocks(3, [(10, 100)]), Unstructured(0.9, "matrix")
    plan = method("arithmetic")[0].plan({}, blocks, pattern, method("arithmetic", slope=0.6)[1])
    assert_met(plan, blocks, pattern)
    assert plan["layers.2.0"].sparsity == 0.999  # one weight is left


def outliers(blocks, D):
    return {name: {"outliers": round(d * 10**6), "weights": 10**6}
            for d, block in zip(D, blocks, strict=True) for name in block}


def test_owl_against_its_formula():
    """Equal blocks: the authors' own line, in the keeping shares as they write it."""
    D, spread, s = np.array([0.01, 0.05, 0.02, 0.08]), 0.08, 0.7
    ratio = (D - D.min()) / (D.max() - D.min()) * spread * 2
    want = 1 - (ratio - ratio.mean() + 1 - s)
    blocks, pattern = same_blocks(4, [(20, 1000)]), Unstructured(s, "matrix")
    plan = method("owl")[0].plan(outliers(blocks, D), blocks, pattern, method("owl")[1])
    assert [p.sparsity for p in plan.values()] == pytest.approx(want, abs=1e-4)
    assert_met(plan, blocks, pattern)


def test_owl_measures_the_share_above_the_blocks_mean():
    """Two linears of one block, of very different scale: judged by their common mean."""
    cases = [layer(6, 40, 90), layer(9, 20, 90, seed=1)]
    linears = {str(i): (lambda W=W, f=f: f * W, statistics_of(X, {"sum_sq"}))
               for i, ((W, X), f) in enumerate(zip(cases, (1.0, 5.0), strict=True))}
    scores = [f * ref.wanda_score(W, X) for (W, X), f in zip(cases, (1.0, 5.0), strict=True)]
    mean = torch.cat([S.flatten() for S in scores]).mean()
    for M in (1.0, 2.0, 5.0):
        module, cfg = method("owl", outlier=M)
        assert module.measure(linears, Unstructured(0.5, "row"), cfg) == {
            str(i): {"outliers": int(S.gt(M * mean).sum()), "weights": S.numel()} for i, S in enumerate(scores)}


def test_owl_block_without_tokens_is_like_the_others():
    blocks, pattern = same_blocks(3, [(20, 1000)]), Unstructured(0.5, "matrix")
    measured = outliers(blocks, [0.0, 0.3, 0.1])
    del measured["layers.1.0"]
    plan = method("owl")[0].plan(measured, blocks, pattern, method("owl")[1])
    assert [p.sparsity for p in plan.values()] == pytest.approx([0.58, 0.5, 0.42])


@pytest.mark.parametrize("name", ["owl", "error"])
@pytest.mark.parametrize("n", [1, 3])
def test_equal_measurements_are_the_uniform_plan(name, n):
    """Max = min, and a single block; also when nothing was measured."""
    module, cfg = method(name, **BLIND_TO_DEPTH[name])
    pattern = Unstructured(0.6, "row")
    blocks = same_blocks(n, [(20, 30), (10, 57)])
    measured = outliers(blocks, [0.02] * n) if name == "owl" else dict.fromkeys(flat(blocks), curve(pattern, cfg, 0.4))
    for m in (measured, {}):
        assert module.plan(m, blocks, pattern, cfg) == dict.fromkeys(flat(blocks), pattern)


@pytest.mark.parametrize("name", ["owl", "error"])
@settings(EXAMPLES, max_examples=15)
@given(st.permutations(range(5)), st.integers(0, 100), SHARES, GROUPS)
def test_order_of_the_blocks_does_not_matter(name, order, seed, sparsity, group):
    module, cfg = method(name, **BLIND_TO_DEPTH[name])
    pattern, values = Unstructured(sparsity, group), np.random.default_rng(seed).uniform(0.01, 0.1, 5)
    blocks = model(*[[(20, 40)]] * 5)
    names = list(flat(blocks))

    def plan(values):
        measured = outliers(blocks, values) if name == "owl" else \
            {n: curve(pattern, cfg, v) for n, v in zip(names, values, strict=True)}
        return [p.sparsity for p in module.plan(measured, blocks, pattern, cfg).values()]

    usual = plan(values)
    assert plan(values[list(order)]) == pytest.approx([usual[i] for i in order], abs=1 / 20)  # ties: one weight a group


def test_more_outliers_and_steeper_errors_lose_less():
    blocks, pattern, values = same_blocks(4, [(30, 100)]), Unstructured(0.6, "matrix"), [0.3, 0.34, 0.32, 0.36]
    module, cfg = method("owl")
    for plan in (module.plan(outliers(blocks, values), blocks, pattern, cfg),
                 error_plan(blocks, pattern, values, spread=0.2)):
        assert sorted(plan, key=lambda n: plan[n].sparsity) == [f"layers.{b}.0" for b in (3, 1, 2, 0)]


def error_plan(blocks, pattern, values, **flags):
    module, cfg = method("error", **{"early": 1.0, **flags})
    measured = {name: curve(pattern, cfg, v) for name, v in zip(flat(blocks), values, strict=True)}
    return module.plan(measured, blocks, pattern, cfg)


def test_error_equalises_the_marginal_error():
    """Errors a s²: at the optimum a_l s_l is one number for all that are not at a bound, whatever their sizes."""
    blocks = model([(30, 400), (10, 300)], [(20, 900), (50, 70)], [(40, 100)])
    values, pattern = np.array([0.3, 0.32, 0.28, 0.35, 2.0]), Unstructured(0.6, "matrix")
    plan = error_plan(blocks, pattern, values, spread=0.25)
    assert_met(plan, blocks, pattern, 0.35, 0.85)
    s = np.array([p.sparsity for p in plan.values()])
    assert s[-1] < 0.37  # as far down as the curve is known
    np.testing.assert_allclose(values[:4] * s[:4], (values[:4] * s[:4]).mean(), rtol=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_error_beats_the_uniform_plan_on_its_own_objective(seed):
    """Convex curves of any shape: Σ n e(s) is never above the uniform plan's."""
    rng = np.random.default_rng(seed)
    blocks, pattern = model(*[[(int(r), int(c))] for r, c in rng.integers(10, 60, (6, 2))]), Unstructured(0.5, "matrix")
    module, cfg = method("error", spread=0.2, early=1.0)
    grid = curve(pattern, cfg, 1.0)["sparsity"]
    scale, power = rng.uniform(0.1, 1, 6), rng.uniform(1.5, 4, 6)
    measured = {n: {"sparsity": grid, "error": [a * s**p for s in grid]}
                for n, a, p in zip(flat(blocks), scale, power, strict=True)}
    plan = module.plan(measured, blocks, pattern, cfg)
    assert_met(plan, blocks, pattern, *module.bounds(pattern, cfg))
    s, n = np.array([p.sparsity for p in plan.values()]), np.array([R * C for R, C in flat(blocks).values()])
    assert (n * scale * s**power).sum() < (n * scale * 0.5**power).sum()


def test_error_counts_more_in_early_blocks():
    blocks, pattern = same_blocks(3, [(30, 100)]), Unstructured(0.6, "matrix")
    plan = error_plan(blocks, pattern, [0.3] * 3, early=1.5, spread=0.2)
    s = [p.sparsity for p in plan.values()]
    assert s[0] < s[1] < s[2] and 1.5 * s[0] == pytest.approx(s[2], rel=1e-2)


def test_error_of_a_curve_that_is_not_convex():
    """A bump is passed over: only the hull counts, and its slopes rise."""
    s, e = [0.3, 0.4, 0.5, 0.6, 0.7], [0.0, 0.3, 0.2, 0.5, 1.0]
    middles, slopes = allocate.module("error").convex_slopes(s, e)
    np.testing.assert_allclose(middles, [0.3, 0.35, 0.45, 0.55, 0.65, 0.7])
    np.testing.assert_allclose(slopes, [1.0, 1.0, 1.0, 3.0, 5.0, 6.0])


def test_error_curve_is_the_reference_error():
    """On the tokens of the sample, by Wanda's mask in the pattern's group."""
    W, X = layer(6, 40, 90)
    module, cfg = method("error", points=3, spread=0.1)
    statistics = statistics_of(X, module.needs)
    measured = module.measure({"x": (lambda: W, statistics)}, Unstructured(0.5, "row"), cfg)["x"]
    assert measured["sparsity"] == [0.4, 0.5, 0.6]
    G = ref.gram(statistics.sample)
    want = [ref.layer_error(W, ref.wanda(W, X, s)[0], G) / ref.layer_error(W, 0 * W, G) for s in (0.4, 0.5, 0.6)]
    assert measured["error"] == pytest.approx(want)


@pytest.mark.parametrize("group", ["matrix", "row", 1, 3])
def test_the_law_holds_for_sensitivity_too(tmp_path, group):
    """Ranks: equal measurements are not the pattern everywhere, its zeros are met all the same."""
    blocks, pattern = model([(4, 235), (6, 280)], [(3, 54)]), Unstructured(0.7, group)
    rows = [{"name": n, "loss_increase": 0.1 * R * C, "weights": R * C} for n, (R, C) in flat(blocks).items()]
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"sensitivity": rows, "model": {"fingerprint": "x"}}))
    module, cfg = method("sensitivity", record=str(file))
    plan = module.plan({}, blocks, pattern, cfg)
    assert_met(plan, blocks, pattern)
    spread = group != 1  # steps of 235, 280 and 54 weights: no other plan near this one comes within 13
    assert (plan != dict.fromkeys(flat(blocks), pattern)) == spread
