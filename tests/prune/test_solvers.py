"""The contract and the laws of every solver and refiner there is, and parity with the naive references.

A new file in oneshot/prune/solvers is tested by the first two parts without a line here; its own reference goes
into `REFERENCES` or a test file of its own. A refiner is tested behind Wanda, its law behind every solver.
"""

import dataclasses
import json
from typing import NamedTuple

import pytest
import reference as ref
import torch
from problems import groups, layer, ref_pattern, removed_of, statistics_of, white

from oneshot.calibrate.statistics import NEEDS
from oneshot.prune import solvers
from oneshot.prune.linalg import NumericalError
from oneshot.prune.patterns import NM, Dense, Unstructured

NAMES = solvers.names()
F64 = {"rtol": 1e-8, "atol": 1e-10}


class Case(NamedTuple):
    """A chain to test: [(module, cfg), ...], and what of X it may look at."""

    chain: list
    needs: frozenset
    name: str


def case(method, **flags):
    """The chain `method`, its last part with `flags` in place of the defaults."""
    *before, last = solvers.chain(method)
    chain = [(m, m.Config()) for m in before] + [(last, last.Config(**flags))]
    return Case(chain, frozenset().union(*(m.needs for m, _ in chain)), method)


def cases():
    """Every solver, every refiner behind Wanda, and each of their switches turned over."""
    for method in NAMES["solver"] + [f"wanda+{r}" for r in NAMES["refiner"]]:
        yield pytest.param(case(method), id=method)
        for f in dataclasses.fields(solvers.chain(method)[-1].Config):
            if isinstance(f.default, bool):
                flags = {f.name: not f.default}
                yield pytest.param(case(method, **flags), id=f"{method}[{f.name}={not f.default}]")


every_case = pytest.mark.parametrize("c", list(cases()))
SHAPES = [(1, 1, 3), (5, 20, 60), (3, 40, 7), (2, 300, 350)]  # R, C, T: smallest; ragged; T < C; three blocks
PATTERNS = [Unstructured(0.0), Unstructured(0.29), Unstructured(0.5, "row"), Unstructured(0.5, "matrix"),
            Unstructured(0.7, 7), Unstructured(0.5, 1000), Unstructured(1 - 1e-9), Unstructured(1.0),
            NM(2, 4), NM(1, 4), NM(3, 5), NM(0, 4), NM(4, 4), NM(1, 1), Dense()]
FITTING = [pytest.param(shape, p, id=f"{shape[0]}x{shape[1]}-{p!r}") for shape in SHAPES for p in PATTERNS
           if not isinstance(p, NM) or shape[1] % p.m == 0]
NOTHING_GOES = [Unstructured(0.0), NM(4, 4), Dense()]


def run(c, W, X, pattern, statistics=None):
    """The chain's solution with exactly the Statistics it says it needs, in W's precision."""
    statistics = statistics or statistics_of(X, c.needs, W.dtype)
    return solvers.solve(W, statistics, resolved(c, pattern), c.chain)


def resolved(c, pattern):
    """The pattern with the solver's own comparison group, as the loop hands it over."""
    return pattern.with_default_group(c.chain[0][1].group)


def assert_sound(solution, W, pattern):
    """A well-formed solution with exactly the zeros asked for in every group."""
    W_hat, mask, info = solution.W_hat, solution.mask, solution.info
    assert W_hat.shape == mask.shape == W.shape and W_hat.dtype == W.dtype and mask.dtype == torch.bool
    assert torch.isfinite(W_hat).all() and not W_hat[~mask].any() and pattern.holds(W_hat)
    assert int((~mask).sum()) == pattern.zeros(*W.shape)
    if not isinstance(pattern, Dense):
        for rows, columns in groups(pattern, *W.shape):
            part = mask[rows, columns]
            assert int((~part).sum()) == removed_of(pattern, part.numel())
    json.dumps(info)  # plain values
    assert all(isinstance(w, str) for w in info.get("warnings", []))


# --- the contract -------------------------------------------------------------------------------------------


def test_names_are_the_files():
    assert {"magnitude", "wanda", "sparsegpt"} <= set(NAMES["solver"])
    assert all(found == sorted(found) for found in NAMES.values())
    assert [m.__name__ for m in solvers.chain("wanda")] == ["oneshot.prune.solvers.wanda"]


@pytest.mark.parametrize("method", ["", "nope", "dense", "+", "wanda+", "wanda+wanda", "wanda+nope", "Wanda"])
def test_unknown_method(method):
    with pytest.raises(ValueError, match="--method"):
        solvers.chain(method)


@pytest.mark.parametrize("name", NAMES["solver"] + NAMES["refiner"])
def test_module(name):
    kind = "refiner" if name in NAMES["refiner"] else "solver"
    module = solvers.module(name)
    assert module.__doc__ and isinstance(module.needs, frozenset) and module.needs <= NEEDS
    assert hasattr(module, "prune") == (kind == "solver") and hasattr(module, "refine") == (kind == "refiner")
    cfg = module.Config()
    assert cfg == module.Config() and hash(cfg) == hash(module.Config())
    assert cfg.__dataclass_params__.frozen
    for f in dataclasses.fields(cfg):
        assert f.metadata.get("help"), f"{name}.{f.name} has no help"
        json.dumps(getattr(cfg, f.name))
    if kind == "solver":
        assert cfg.group in ("matrix", "row") or cfg.group > 0


@every_case
@pytest.mark.parametrize("shape, pattern", FITTING)
def test_solution_is_sound(c, shape, pattern):
    W, X = layer(*shape)
    assert_sound(run(c, W, X, pattern), W, resolved(c, pattern))
    if pattern in (Unstructured(0.5, "row"), NM(2, 4), NM(3, 5)):
        assert_sound(run(c, W.float(), X.float(), pattern), W.float(), resolved(c, pattern))


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_pure(c, pattern):
    """Arguments and random state untouched, nothing random; a transposed view (Conv1D) will do as well."""
    W, X = layer(6, 40, 90)
    statistics, fresh = statistics_of(X, NEEDS), statistics_of(X, NEEDS)
    W_0, G, state = W.clone(), statistics.G.clone(), torch.get_rng_state()
    first = run(c, W, None, pattern, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(W, W_0) and torch.equal(statistics.G, G) and statistics.n == fresh.n
    for name in ("sum", "sum_sq", "sample"):
        assert torch.equal(getattr(statistics, name), getattr(fresh, name))
    torch.manual_seed(int(state[0]) + 1)
    for again in (run(c, W, None, pattern, statistics), run(c, W.T.contiguous().T, None, pattern, fresh)):
        assert torch.equal(again.mask, first.mask) and torch.equal(again.W_hat, first.W_hat)
        assert again.W_hat.data_ptr() != W.data_ptr()
    torch.set_rng_state(state)


@every_case
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_negative_zero_is_never_stored(c, stored, transposed):
    """Nor for a removed weight, nor for one that was -0.0, nor for one that underflows."""
    from oneshot.models import Weight

    W, X = (t.float() for t in layer(6, 40, 90))
    W[0, :3], W[1] = -0.0, W[1] * 1e-30
    parameter = torch.nn.Parameter((W.T if transposed else W).to(stored).contiguous(), requires_grad=False)
    weight = Weight("x", "x", torch.nn.Identity(), parameter, None, transposed, stored)
    pattern = resolved(c, NM(2, 4))
    weight.set(run(c, weight.get(), X, pattern).W_hat)
    assert pattern.holds(weight.get()) and not (torch.signbit(parameter) & (parameter == 0)).any()


# --- the laws of all ----------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("pattern", NOTHING_GOES, ids=repr)
def test_nothing_removed_is_the_identity(c, pattern):
    W, X = layer(4, 300, 400)
    W_hat = run(c, W, X, pattern).W_hat
    torch.testing.assert_close(W_hat, W, **F64)
    if c.name in ("magnitude", "wanda", "sparsegpt"):
        assert torch.equal(W_hat, W)


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(1.0), NM(0, 4)], ids=repr)
def test_all_removed_is_zero(c, pattern):
    W, X = layer(4, 300, 400)
    solution = run(c, W, X, pattern)
    assert not solution.W_hat.any() and not solution.mask.any()


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7, "matrix"), NM(2, 4)], ids=repr)
def test_order_and_batching_of_tokens_do_not_matter(c, pattern):
    W, X = layer(5, 40, 90)
    whole = run(c, W, X, pattern)
    half = statistics_of(X[50:], c.needs) + statistics_of(X[:50], c.needs)
    for statistics in (statistics_of(X.flip(0), c.needs, batch=11), half):
        other = run(c, W, None, pattern, statistics)
        assert torch.equal(other.mask, whole.mask)
        torch.testing.assert_close(other.W_hat, whole.W_hat, **F64)


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7, "row"), NM(2, 4)], ids=repr)
@pytest.mark.parametrize("dead", [(), (0, 3, 17, 18, 39)], ids=["live", "dead"])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_inputs_does_not_matter(c, pattern, dead, scale):
    """Also with dead inputs: SparseGPT's 1 in their place swamps the damping when activations are small."""
    W, X = layer(5, 40, 90, dead=dead)
    usual, scaled = run(c, W, X, pattern), run(c, W, scale * X, pattern)
    assert torch.equal(usual.mask, scaled.mask)
    torch.testing.assert_close(scaled.W_hat, usual.W_hat, **F64)


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4), NM(3, 5)])
@pytest.mark.parametrize("dead", [(7,), (0, 3, 17, 18, 39), range(40)], ids=["one", "five", "all"])
def test_dead_inputs(c, pattern, dead):
    """Finite and exact, and weights on inputs that are always zero are the first to go."""
    W, X = layer(6, 40, 90, dead=dead)
    W[:, list(dead)] *= 100
    solution = run(c, W, X, pattern)
    assert_sound(solution, W, resolved(c, pattern))
    if c.needs and len(dead) < 40:
        alive = torch.ones(6, 40, dtype=torch.bool)
        alive[:, list(dead)] = False
        for group in groups(resolved(c, pattern), *W.shape):
            kept_dead, removed_live = solution.mask & ~alive, ~solution.mask & alive
            assert not (kept_dead[group].any() and removed_live[group].any())


@every_case
@pytest.mark.parametrize("tokens", [1, 2, 39])
def test_fewer_tokens_than_inputs(c, tokens):
    """A singular Gram matrix, in the precision of real runs."""
    W, X = (t.float() for t in layer(6, 40, tokens))
    for pattern in (Unstructured(0.5), NM(2, 4)):
        solution = run(c, W, X, pattern)
        assert_sound(solution, W, resolved(c, pattern))
        assert solution.W_hat.abs().max() < 10 * W.abs().max()


@pytest.mark.parametrize("c", [p for p in cases() if p.values[0].needs & {"outer", "sum_sq"}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
def test_non_finite_inputs_are_refused(c, bad):
    """1e30: its square is beyond float32."""
    W, X = (t.float() for t in layer(6, 40, 90))
    X[17, 5] = bad
    for pattern in (Unstructured(0.5), NM(2, 4)):
        with pytest.raises(NumericalError, match="finite"):
            run(c, W, X, pattern)


@every_case
def test_every_comparison_group_is_honoured(c):
    """Rows and columns of very different size: the group decides where the zeros go."""
    W, X = layer(8, 40, 90)
    W = W * torch.logspace(0, 3, 8, dtype=W.dtype).unsqueeze(1)
    X = X * torch.logspace(0, 2, 40, dtype=W.dtype)
    removed = {}
    for group in ("matrix", "row", 10):
        pattern = Unstructured(0.5, group)
        solution = run(c, W, X, pattern)
        assert_sound(solution, W, pattern)
        removed[group] = ~solution.mask
    assert removed["matrix"].sum(1).unique().numel() > 1
    assert removed["row"].sum(1).unique().numel() == 1
    assert removed[10].sum(1).unique().numel() > 1
    assert removed[10].view(8, 4, 10).sum((0, 2)).tolist() == [40] * 4
    if c.needs:  # or else columns of different size are no different
        assert removed["row"].view(8, 4, 10).sum((0, 2)).unique().numel() > 1


@every_case
def test_the_solvers_own_group_is_the_default(c):
    """Also when it is called without the loop, which names the group for the record."""
    W, X = layer(8, 300, 400)
    named = run(c, W, X, Unstructured(0.5))
    left = solvers.solve(W, statistics_of(X, c.needs), Unstructured(0.5), c.chain)
    assert torch.equal(left.mask, named.mask) and torch.equal(left.W_hat, named.W_hat)


@pytest.mark.parametrize("method", [f"{s}+{r}" for r in NAMES["refiner"] for s in NAMES["solver"]]
                         or [pytest.param("", marks=pytest.mark.skip(reason="there is no refiner yet"))])
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=["f64", "f32"])
def test_refiners_never_add_error(method, dtype, rounding):
    """In every comparison group; fewer tokens than inputs; dead inputs."""
    c, base = case(method), case(method.split("+")[0])
    for shape, dead in (((5, 20, 60), ()), ((3, 40, 7), ()), ((3, 160, 400), (0, 77, 159))):
        W, X = (t.to(dtype) for t in layer(*shape, dead=dead))
        G = ref.gram(X)
        slack = rounding * ref.layer_error(W, 0 * W, G)
        for pattern in (Unstructured(0.5, "matrix"), Unstructured(0.7, "row"), Unstructured(0.5, 16), NM(2, 4),
                        NM(3, 5)):
            before = run(base, W, X, pattern)
            kept = (before.W_hat.clone(), before.mask.clone())
            (refiner, cfg), statistics = c.chain[-1], statistics_of(X, c.needs, dtype)
            after = refiner.refine(W, before, statistics, resolved(c, pattern), cfg)
            assert torch.equal(before.W_hat, kept[0]) and torch.equal(before.mask, kept[1])
            assert_sound(after, W, resolved(c, pattern))
            assert ref.layer_error(W, after.W_hat, G) <= ref.layer_error(W, before.W_hat, G) + slack


# --- parity with tests/reference.py -------------------------------------------------------------------------


def sparsegpt_reference(W, X, pattern, cfg):
    block = pattern.group if isinstance(pattern, Unstructured) else cfg.block_size
    return ref.sparsegpt(W, X, ref_pattern(pattern), cfg.damping, block)


REFERENCES = {
    "magnitude": lambda W, X, pattern, cfg: ref.magnitude(W, ref_pattern(pattern)),
    "wanda": lambda W, X, pattern, cfg: ref.wanda(W, X, ref_pattern(pattern)),
    "sparsegpt": sparsegpt_reference,
    "ria": lambda W, X, pattern, cfg: ref.ria(W, X, ref_pattern(pattern), a=cfg.a),
    "dsnot": lambda W, X, pattern, cfg: ref.dsnot(W, X, ref_pattern(pattern), cycles=cfg.cycles,
                                                  threshold=cfg.threshold),
    "admm": lambda W, X, pattern, cfg: ref.admm(W, X, ref_pattern(pattern), damping=cfg.damping, rho=cfg.rho,
                                                iterations=cfg.iterations, mask_iterations=cfg.mask_iterations),
}
BLOCKS = [case("sparsegpt", block_size=b) for b in (128, 48, 7, 1)]
PARITY = [pytest.param(c, p, id=f"{c.name}{getattr(c.chain[0][1], 'block_size', '')}-{p}")
          for c in [case("magnitude"), case("wanda"), case("ria"), case("dsnot"), case("admm"), *BLOCKS]
          for p in (Unstructured(0.29), Unstructured(0.7), NM(2, 4), NM(3, 5), NM(4, 20))
          if c not in BLOCKS[1:] or isinstance(p, Unstructured)]


def clear_problem(reference, R, C, T, dead):
    """A layer on which no decision is a near-tie: the reference's mask survives errors of 1e-5."""
    for seed in range(50):
        W, X = (t.float() for t in layer(R, C, T, seed=seed, dead=dead))
        W_ref, keep = reference(W, X)
        noise = torch.randn(2, R, C, generator=torch.Generator().manual_seed(seed))
        if all(torch.equal(reference(W * (1 + 1e-5 * n), X)[1], keep) for n in noise):
            return W, X, W_ref, keep
    raise AssertionError("no clear problem in 50")


@pytest.mark.parametrize("c, pattern", PARITY)
@pytest.mark.parametrize("R, C, T, dead", [(1, 20, 30, ()), (4, 60, 200, (0, 31)),
                                           (3, 260, 100, (5, 128, 259)), (2, 140, 400, ())])
def test_parity(c, pattern, R, C, T, dead):
    """One block and several, ragged ones, dead inputs, fewer tokens than columns; in float64 and float32."""
    pattern, cfg = resolved(c, pattern), c.chain[0][1]
    W, X, W_ref, keep = clear_problem(lambda W, X: REFERENCES[c.name](W, X, pattern, cfg), R, C, T, dead)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        solution = run(c, W.to(dtype), X.to(dtype), pattern)
        assert torch.equal(solution.mask, keep)
        assert torch.linalg.vector_norm(solution.W_hat - W_ref) <= tolerance * torch.linalg.vector_norm(W_ref)


# --- laws of the single methods -----------------------------------------------------------------------------

UNSTRUCTURED_AND_NM = [Unstructured(0.5), Unstructured(0.29), NM(2, 4), NM(3, 4)]


@pytest.mark.parametrize("pattern", UNSTRUCTURED_AND_NM, ids=str)
def test_white_inputs_make_wanda_magnitude_per_row(pattern):
    W, X = layer(6, 16, 1)[0], white(16)
    solution = run(case("wanda"), W, X, pattern)
    for i in range(6):
        assert torch.equal(solution.mask[i:i + 1], ref.magnitude(W[i:i + 1], ref_pattern(pattern))[1])
    assert torch.equal(solution.W_hat[solution.mask], W[solution.mask])


@pytest.mark.parametrize("pattern", UNSTRUCTURED_AND_NM, ids=str)
@pytest.mark.parametrize("block", [4, 16, 128])
def test_white_inputs_make_sparsegpt_magnitude_per_block(pattern, block):
    """Nothing can be made good: kept weights stay. Ties, too, are broken as in magnitude."""
    for W in (layer(6, 16, 1)[0], torch.ones(6, 16, dtype=torch.float64)):
        solution = run(case("sparsegpt", block_size=block), W, white(16), pattern)
        for j in range(0, 16, block):
            part = slice(j, j + block)
            assert torch.equal(solution.mask[:, part], ref.magnitude(W[:, part], ref_pattern(pattern))[1])
        assert torch.equal(solution.W_hat, ref.masked(W, solution.mask))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.7, "row"), NM(2, 4)], ids=str)
def test_on_strongly_correlated_inputs_more_knowledge_is_less_error(pattern, seed):
    W, X = layer(16, 160, 800, seed=seed)
    errors = [ref.layer_error(W, run(case(m), W, X, pattern).W_hat, ref.gram(X))
              for m in ("sparsegpt", "wanda", "magnitude")]
    assert errors[0] < 0.7 * errors[1] and errors[1] < 0.9 * errors[2]


@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("block", [5, 128])
def test_sparsegpt_with_a_mask_chosen_at_once(group, block):
    """Groups across all columns: the mask from the dense scores, then the best values from left to right."""
    W, X = layer(4, 13, 40)
    solution = run(case("sparsegpt", block_size=block), W, X, Unstructured(0.5, group))
    _, G = ref.dead_then_damped(W, ref.gram(X), 0.01)
    score = torch.stack([W[:, j] ** 2 / torch.linalg.inv(G[j:, j:])[0, 0] for j in range(13)], dim=1)
    keep = ref.remove_lowest(score, 26)
    if group == "row":
        keep = torch.stack([ref.remove_lowest(s, 6) for s in score])
    assert torch.equal(solution.mask, keep)
    best = W.clone()
    for j in range(13):  # columns up to j are settled; the rest take their best values, by a direct solve
        error = (best[:, j] * keep[:, j] - best[:, j]).unsqueeze(1)
        best[:, j] *= keep[:, j]
        best[:, j + 1:] -= torch.linalg.solve(G[j + 1:, j + 1:], G[j + 1:, j:j + 1] @ error.T).T
    torch.testing.assert_close(solution.W_hat, best, **F64)


def test_sparsegpt_nm_does_not_depend_on_the_block():
    W, X = layer(4, 120, 300)
    for pattern in (NM(2, 4), NM(3, 5), NM(7, 24)):
        usual = run(case("sparsegpt"), W, X, pattern)
        for block in (1, 7, 16, 1000):
            other = run(case("sparsegpt", block_size=block), W, X, pattern)
            assert torch.equal(other.mask, usual.mask)
            torch.testing.assert_close(other.W_hat, usual.W_hat, **F64)


def test_sparsegpt_block_is_the_group_unless_named():
    W, X = layer(4, 40, 90)
    named = run(case("sparsegpt"), W, X, Unstructured(0.5, 16))
    own = run(case("sparsegpt", block_size=16), W, X, Unstructured(0.5))
    assert torch.equal(named.mask, own.mask) and torch.equal(named.W_hat, own.W_hat)


def test_sparsegpt_singular_gram_says_so_for_every_linear_that_shares_it():
    statistics = statistics_of(torch.ones(9, 8), {"outer"})
    W = layer(4, 8, 1)[0].float()
    for _ in range(2):
        info = run(case("sparsegpt", damping=0.0), W, None, NM(2, 4), statistics).info
        assert info["damping"] == 0.01 and "damping raised from 0 to 0.01" in info.pop("warnings")[0]
    assert run(case("sparsegpt"), W, None, NM(2, 4), statistics).info == {"damping": 0.01, "warnings": []}


def test_sparsegpt_counts_dead_inputs_and_clears_their_weights():
    W, X = layer(4, 40, 90, dead=(3, 4))
    for pattern in (Unstructured(0.0), NM(2, 4)):
        solution = run(case("sparsegpt"), W, X, pattern)
        assert solution.info["dead_inputs"] == 2 and not solution.W_hat[:, 3:5].any()


@pytest.mark.parametrize("flags", [{"damping": -0.1}, {"damping": float("nan")}, {"block_size": 0}], ids=str)
def test_sparsegpt_flags_are_checked(flags):
    with pytest.raises(ValueError, match=f"--sparsegpt.{next(iter(flags))}"):
        case("sparsegpt", **flags)


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.7])
def test_wanda_variant_is_one_share_for_all_rows(sparsity):
    """The reference's mask at the alpha found, and nearly the one its own bisection (to 0.1 %) finds."""
    W, X = layer(40, 100, 300)
    solution = run(case("wanda", use_variant=True), W, X, Unstructured(sparsity))
    alpha = solution.info["alpha"]
    assert torch.equal(solution.mask, ref.variant_keep(ref.wanda_score(W, X), alpha * (1 + 1e-12)))
    assert int((~solution.mask).sum()) == ref.exact_count(4000, sparsity)
    assert (solution.mask != ref.wanda_variant(W, X, sparsity)[1]).sum() <= 4
    assert solution.mask.sum(1).unique().numel() > 1


def test_wanda_variant_leaves_nm_alone():
    W, X = layer(6, 40, 90)
    assert torch.equal(run(case("wanda", use_variant=True), W, X, NM(2, 4)).mask,
                       run(case("wanda"), W, X, NM(2, 4)).mask)


@pytest.mark.parametrize("method, flags", [
    ("ria", {"a": -1.0}), ("dsnot", {"start": "nope"}), ("dsnot", {"cycles": -1}), ("dsnot", {"threshold": -0.1}),
    ("admm", {"damping": -0.1}), ("admm", {"rho": 0.0}), ("admm", {"mask_iterations": 21}),
    ("admm", {"mask_iterations": 0})], ids=str)
def test_flags_of_the_others_are_checked(method, flags):
    with pytest.raises(ValueError, match=f"--{method}.{next(iter(flags)).replace('_', '-')}"):
        case(method, **flags)


def test_ria_without_data_is_magnitude_where_rows_and_columns_weigh_the_same():
    W = torch.tensor([[4.0, 1.0, 2.0], [1.0, 2.0, 4.0], [2.0, 4.0, 1.0]]) * torch.tensor([1.0, -1.0, 1.0])
    X = torch.tensor([[1.0, 100.0, 1.0]])
    assert torch.equal(run(case("ria", a=0.0), W, X, Unstructured(0.34)).mask, W.abs() > 1)
    assert not torch.equal(run(case("ria"), W, X, Unstructured(0.34)).mask, W.abs() > 1)


def test_ria_spares_a_faint_row_that_has_its_own_inputs():
    """By magnitude the second row would go whole; rows and columns of zeros are no trouble."""
    W = torch.tensor([[3.0, 4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.03, 0.05, 0.0], [0.0] * 5])
    mask = run(case("ria"), W, torch.ones(1, 5), Unstructured(13 / 15 + 1e-9)).mask
    assert mask.nonzero().tolist() == [[0, 1], [1, 3]]


def expected_errors(W, X, mask):
    """|E[(W - Ŵ) x]| of each output."""
    return (ref.masked(W, ~mask) @ X.mean(0)).abs()


@pytest.mark.parametrize("start", ["wanda", "magnitude"])
@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), Unstructured(0.6, "matrix"), Unstructured(0.6, 13),
                                     NM(2, 4), NM(3, 5)], ids=repr)
def test_dsnot_lowers_every_rows_expected_error(start, pattern):
    """From its start mask, with each group's count kept; never by growing weights of inputs that are always zero."""
    W, X = layer(12, 40, 300, dead=(3, 30))
    begin = run(case(start), W, X, pattern).mask
    solution = run(case("dsnot", start=start), W, X, pattern)
    assert_sound(solution, W, pattern)
    before, after = expected_errors(W, X, begin), expected_errors(W, X, solution.mask)
    assert (after <= before).all() and after.sum() < 0.5 * before.sum()
    assert solution.info["swaps"] == int((solution.mask & ~begin).sum()) == int((begin & ~solution.mask).sum()) > 0
    assert torch.equal(solution.mask[:, [3, 30]], begin[:, [3, 30]])
    if pattern != Unstructured(0.6, 13):
        assert torch.equal(solution.mask.sum(1), begin.sum(1))
    assert torch.equal(run(case("dsnot", start=start, cycles=0), W, X, pattern).mask, begin)


def test_dsnot_stops_at_the_threshold():
    W, X = layer(12, 40, 300)
    pattern = Unstructured(0.6, "row")
    swaps = [run(case("dsnot", threshold=t), W, X, pattern).info["swaps"] for t in (0.0, 0.3, 0.9, 1.0)]
    assert swaps == sorted(swaps, reverse=True) and swaps[0] > swaps[2] > 0 == swaps[3]


def test_dsnot_with_inputs_that_never_vary():
    """Var(x) = 0: the largest contribution returns first, and nothing is infinite."""
    W = layer(6, 40, 1)[0]
    assert_sound(run(case("dsnot"), W, torch.full((9, 40), 0.1, dtype=W.dtype), Unstructured(0.5, "row")), W,
                 Unstructured(0.5, "row"))


@pytest.mark.parametrize("pattern", [Unstructured(0.7, "row"), Unstructured(0.7, "matrix"), NM(2, 4), NM(4, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_admm_is_better_than_sparsegpt_on_strongly_correlated_inputs(pattern, seed):
    W, X = layer(16, 160, 800, seed=seed)
    errors = [ref.layer_error(W, run(case(m), W, X, pattern).W_hat, ref.gram(X)) for m in ("admm", "sparsegpt")]
    assert errors[0] < errors[1]


def test_admm_on_a_fixed_mask_tends_to_the_least_squares_values():
    """The mask chosen at once, little damping, many iterations: the best values on that support."""
    W, X = layer(5, 24, 300)
    solution = run(case("admm", damping=0.0, iterations=3000, mask_iterations=1), W, X, NM(2, 4))
    assert torch.equal(solution.mask, ref.wanda(W, X, (2, 4))[1])
    best = ref.refit(W, solution.mask, ref.gram(X))
    torch.testing.assert_close(solution.W_hat, best, rtol=1e-6, atol=1e-8)


def test_admm_goes_down_the_cubic_schedule():
    """Also in N:M: on the way each group's best are safe, the lowest of all others go, and at the end none is left."""
    module, score = solvers.module("admm"), torch.rand(10, 40, generator=torch.Generator().manual_seed(0))
    for pattern in (Unstructured(0.7, "matrix"), NM(2, 4), NM(4, 8)):
        removed = [int((~module.gradual(pattern, score, t / 15)).sum()) for t in range(1, 16)]
        assert removed == [int(400 * pattern.sparsity * (1 - (1 - t / 15) ** 3) + 1e-9) for t in range(1, 16)]
        half = module.gradual(pattern, score, 7 / 15)
        assert (half | ~pattern.keep(score)).all()
        assert torch.equal(module.gradual(pattern, score, 1.0), pattern.keep(score))


def test_admm_singular_gram_says_so():
    """Indefinite by rounding: damping is raised up to 1 and the record says so; beyond that it is refused."""
    statistics = statistics_of(torch.zeros(1, 2), {"outer"})
    for corner, used in ((1.05, 0.1), (1.5, 1.0), (9.0, None)):
        statistics.outer.copy_(torch.tensor([[1.0, corner], [corner, 1.0]]))
        statistics._derived.clear()
        c = case("admm", rho=0.2)
        if used is None:
            with pytest.raises(NumericalError, match="not positive definite"):
                run(c, torch.ones(3, 2), None, NM(1, 2), statistics)
            continue
        info = run(c, torch.ones(3, 2), None, NM(1, 2), statistics).info
        assert info["damping"] == used and any("raised" in w for w in info["warnings"]) == (used != 0.1)


def test_admm_keeps_the_dense_weights_of_dead_inputs_that_stay():
    W, X = layer(4, 40, 90, dead=(3, 4))
    solution = run(case("admm"), W, X, Unstructured(0.0))
    assert solution.info["dead_inputs"] == 2 and torch.equal(solution.W_hat[:, 3:5], W[:, 3:5])
