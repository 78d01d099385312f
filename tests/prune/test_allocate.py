"""How much of each linear goes: the zeros of the uniform plan, and each method's own idea."""

import dataclasses
import json
from itertools import product

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import layer, statistics_of

from oneshot.calibrate.statistics import NEEDS
from oneshot.prune import allocate
from oneshot.prune.patterns import NM, Dense, Unstructured, count

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
UNSTRUCTURED = ["uniform", "arithmetic", "owl", "error"]
GROUPS = st.sampled_from(["matrix", "row", *range(1, 9)])
SHARES = st.sampled_from([0.0, 0.05, 0.29, 0.5, 0.6, 0.7, 0.95])
BLIND_TO_DEPTH = {"owl": {}, "error": {"early": 1.0}}
SHAPE = st.tuples(st.integers(1, 40), st.integers(1, 300))


def model(*shapes_of_blocks):
    """blocks [{name: Linear}] from lists of shapes, of weights of two bytes."""
    return [{f"layers.{b}.{i}": allocate.Linear(*shape, 2) for i, shape in enumerate(shapes)}
            for b, shapes in enumerate(shapes_of_blocks)]


def same_blocks(n, shapes=((20, 30), (10, 50))):
    return model(*[shapes] * n)


def flat(blocks):
    return {name: linear.shape for block in blocks for name, linear in block.items()}


def zeros(plan, blocks):
    return sum(plan[name].zeros(*shape) for name, shape in flat(blocks).items())


def method(name, **flags):
    module = allocate.module(name)
    return module, module.Config(**flags)


def curve(pattern, cfg, size):
    """A measured curve: error = size * s², on the grid that the method itself takes."""
    grid = np.linspace(*allocate.module("error").bounds(pattern, cfg), cfg.points).round(6).tolist()
    return {"sparsity": grid, "error": [size * s * s for s in grid]}


def assert_met(plan, blocks, pattern, lowest=0.0, highest=1.0):
    """The zeros of the uniform plan within one weight a row, sparsities within bounds and readable."""
    uniform = dict.fromkeys(flat(blocks), pattern)
    rows = sum(R for R, _ in flat(blocks).values())
    assert list(plan) == list(flat(blocks))
    assert abs(zeros(plan, blocks) - zeros(uniform, blocks)) <= rows
    if pattern.group == "matrix":
        assert zeros(plan, blocks) == zeros(uniform, blocks)
    for name, p in plan.items():
        n = allocate.group_size(pattern, *flat(blocks)[name])
        assert 0 <= p.sparsity < 1 and p.group == pattern.group
        assert lowest - 1 / n < p.sparsity <= highest + 1 / n
        if p != pattern:  # one decimal less would say another count
            digits = len(repr(p.sparsity).partition(".")[2])
            k = count(p.sparsity, n)
            assert all(count(q / 10 ** (digits - 1), n) != k for q in range(10 ** (digits - 1) + 1)) or digits <= 1


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


# --- the methods --------------------------------------------------------------------------------------------


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


# --- mixing patterns under a budget -------------------------------------------------------------------------


def mixed(blocks, errors, **flags):
    """The plan for 2:4 and what else the flags name, from one error for each candidate of each linear."""
    module, cfg = method("mix", **flags)
    measured = {name: {str(p): e for p, e in zip(module.candidates(NM(2, 4), cfg), es, strict=True)}
                for name, es in zip(flat(blocks), errors, strict=True)}
    return module.plan(measured, blocks, NM(2, 4), cfg)


def spent(plan, blocks):
    return sum(plan[n].bytes(*linear.shape, linear.itemsize) for block in blocks for n, linear in block.items())


def dense_bytes(blocks):
    return sum(linear.R * linear.C * linear.itemsize for block in blocks for linear in block.values())


def test_mix_leaves_the_most_sensitive_dense():
    blocks = same_blocks(4, [(16, 64)])
    plan = mixed(blocks, [(0.2, 0.0), (0.9, 0.0), (0.1, 0.0), (0.5, 0.0)], budget=0.8)
    assert [str(p) for p in plan.values()] == ["2:4", "dense", "2:4", "dense"]
    assert spent(plan, blocks) == dense_bytes(blocks) * (2 + 2 * 0.5625) / 4


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.57, 0.7, 0.9, 1.0])
def test_mix_is_within_budget_and_near_the_best(seed, budget):
    """Against all choices: what is lost to the best is at most one step of one linear, the greedy's known bound."""
    rng = np.random.default_rng(seed)
    blocks = model(*[[(int(r) * 4, int(c) * 8)] for r, c in rng.integers(1, 6, (5, 2))])
    errors = np.sort(rng.uniform(0, 1, (5, 3)), axis=1)[:, ::-1]
    errors[:, 2] = 0
    flags = {"also": "6:8,dense", "budget": budget}
    plan = mixed(blocks, errors.tolist(), **flags)
    module, cfg = method("mix", **flags)
    possible, shapes = module.candidates(NM(2, 4), cfg), list(flat(blocks).values())
    n = [R * C for R, C in shapes]

    def error(choice):
        return sum(n[i] * errors[i][p] for i, p in enumerate(choice))

    limit = budget * dense_bytes(blocks)
    within = [c for c in product(range(3), repeat=5)
              if sum(possible[p].bytes(*shapes[i], 2) for i, p in enumerate(c)) <= limit]
    got = [possible.index(p) for p in plan.values()]
    assert spent(plan, blocks) <= limit and tuple(got) in within
    assert error(got) - min(map(error, within)) <= max(n[i] * errors[i][0] for i in range(5))
    if budget == 1.0:
        assert got == [2] * 5


def test_mix_on_a_model():
    """Measured; a width that 4 does not divide can only stay dense, the reference's errors otherwise."""
    module, cfg = method("mix", budget=0.8, also="4:8,dense")
    blocks = model([(6, 40), (6, 40)], [(9, 30)])
    problems = {name: layer(*shape, 90, seed=i) for i, (name, shape) in enumerate(flat(blocks).items())}
    linears = {name: (lambda W=W: W, statistics_of(X, module.needs)) for name, (W, X) in problems.items()}
    measured = module.measure(linears, NM(2, 4), cfg)
    json.dumps(measured)
    W, X = problems["layers.0.0"]
    G = ref.gram(linears["layers.0.0"][1].sample)
    for text, pattern in (("2:4", (2, 4)), ("4:8", (4, 8)), ("dense", 0.0)):
        want = ref.layer_error(W, ref.wanda(W, X, pattern)[0], G) / ref.layer_error(W, 0 * W, G)
        assert measured["layers.0.0"][text] == pytest.approx(want, abs=1e-12)
    assert measured["layers.1.0"] == {"dense": 0.0}
    plan = module.plan(measured, blocks, NM(2, 4), cfg)
    assert isinstance(plan["layers.1.0"], Dense) and spent(plan, blocks) <= 0.8 * dense_bytes(blocks)


def test_mix_counts_each_linear_in_its_own_dtype():
    """2:4 keeps 0.5625 of 16 bits a weight, 0.53125 of 32; a linear of four bytes weighs twice one of two."""
    blocks = [{"a": allocate.Linear(16, 64, 4), "b": allocate.Linear(16, 64, 2)}]
    errors = [(0.3, 0.0), (0.2, 0.0)]
    assert [str(p) for p in mixed(blocks, errors, budget=0.7).values()] == ["2:4", "dense"]
    limit = (0.53125 * 2 + 0.5625) / 3
    assert [str(p) for p in mixed(blocks, errors, budget=limit + 1e-6).values()] == ["2:4", "2:4"]
    with pytest.raises(ValueError, match=r"--mix.budget 0.54: the smallest choice of patterns takes 0.5417"):
        mixed(blocks, errors, budget=0.54)


def test_mix_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"--mix.budget 0.5: the smallest choice of patterns takes 0.5625"):
        mixed(same_blocks(2, [(16, 64)]), [(0.2, 0.0)] * 2, budget=0.5)
    module, cfg = method("mix", also="4:8")
    with pytest.raises(ValueError, match=r"--mix.also 4:8: layers.0.0 \(3x30\) can have none"):
        module.plan({}, model([(3, 30)]), NM(2, 4), cfg)


def test_mix_never_takes_more_bytes_for_more_error():
    """4:8 takes fewer bytes than 2:4 in the format of the kernels, and loses less: 2:4 is then never chosen."""
    plan = mixed(same_blocks(3, [(16, 64)]), [(0.3, 0.2, 0.0)] * 3, also="4:8,dense", budget=0.71)
    assert {str(p) for p in plan.values()} == {"4:8", "dense"}
