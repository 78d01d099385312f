"""The contract and the laws of every solver and refiner there is, and parity with the naive references.

A new file in oneshot/prune/solvers is tested by the first two parts without a line here; its own reference goes
into `REFERENCES` or a test file of its own. A refiner is tested behind Wanda, its law behind every solver.
"""

import dataclasses
import json

import pytest
import reference as ref
import torch
from problems import groups, layer, statistics_of
from solving import assert_sound, case, resolved, run, seen

from oneshot.calibrate.statistics import NEEDS
from oneshot.prune import solvers
from oneshot.prune.linalg import NumericalError
from oneshot.prune.patterns import NM, Columns, Dense, Unstructured

NAMES = solvers.names()
F64 = {"rtol": 1e-8, "atol": 1e-10}
CG = {"rtol": 1e-5, "atol": 1e-6}  # thirty steps of conjugate gradients over few columns magnify rounding


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
            NM(2, 4), NM(1, 4), NM(3, 5), NM(0, 4), NM(4, 4), NM(1, 1), Columns(7, 20), Columns(3, 5, 4), Columns(0, 2),
            Columns(1, 1), Dense()]
FITTING = [pytest.param(shape, p, id=f"{shape[0]}x{shape[1]}-{p!r}") for shape in SHAPES for p in PATTERNS
           if not shape[1] % (p.m if isinstance(p, NM) else p.count * p.size if isinstance(p, Columns) else 1)]
NOTHING_GOES = [Unstructured(0.0), NM(4, 4), Columns(20, 20), Columns(2, 2, 5), Dense()]


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
@pytest.mark.parametrize("pattern", [Unstructured(1.0), NM(0, 4), Columns(0, 50, 2)], ids=repr)
def test_all_removed_is_zero(c, pattern):
    W, X = layer(4, 300, 400)
    solution = run(c, W, X, pattern)
    assert not solution.W_hat.any() and not solution.mask.any()


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7, "matrix"), NM(2, 4),
                                     Columns(3, 5, 2)], ids=repr)
def test_order_and_batching_of_tokens_do_not_matter(c, pattern):
    W, X = layer(5, 40, 90)
    whole = run(c, W, X, pattern)
    other = run(c, W, None, pattern, statistics_of(X.flip(0), c.needs, batch=11))
    assert torch.equal(other.mask, whole.mask)
    torch.testing.assert_close(other.W_hat, whole.W_hat, **(CG if isinstance(pattern, Columns) else F64))


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7, "row"), NM(2, 4), Columns(3, 5, 2)], ids=repr)
@pytest.mark.parametrize("dead", [(), (0, 3, 17, 18, 39)], ids=["live", "dead"])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_inputs_does_not_matter(c, pattern, dead, scale):
    """Also with dead inputs: SparseGPT's 1 in their place swamps the damping when activations are small."""
    W, X = layer(5, 40, 90, dead=dead)
    usual, scaled = run(c, W, X, pattern), run(c, W, scale * X, pattern)
    assert torch.equal(usual.mask, scaled.mask)
    torch.testing.assert_close(scaled.W_hat, usual.W_hat, **(CG if isinstance(pattern, Columns) else F64))


@every_case
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4), NM(3, 5), Columns(9, 20)])
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
    left = solvers.solve(W, seen(statistics_of(X, c.needs), W, c.needs), Unstructured(0.5), c.chain)
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
                        NM(3, 5), Columns(3, 5, 4)):
            before = run(base, W, X, pattern)
            kept = (before.W_hat.clone(), before.mask.clone())
            (refiner, cfg), statistics = c.chain[-1], statistics_of(X, c.needs, dtype)
            after = refiner.refine(W, before, statistics, resolved(c, pattern), cfg)
            assert torch.equal(before.W_hat, kept[0]) and torch.equal(before.mask, kept[1])
            assert_sound(after, W, resolved(c, pattern))
            assert ref.layer_error(W, after.W_hat, G) <= ref.layer_error(W, before.W_hat, G) + slack
