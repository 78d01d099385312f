"""Refit, swaps and ALPS: against least squares, the paper's formulas and every possible support."""

import itertools
from itertools import combinations, product

import pytest
import reference as ref
import torch
from jobs import chain_of
from problems import layer, statistics_of

from oneshot.calibrate.statistics import Statistics
from oneshot.prune import linalg, solvers
from oneshot.prune.patterns import NM, Unstructured
from oneshot.prune.solvers import Solution, alps, swaps
from oneshot.settings.flags import configured

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "row"), Unstructured(0.5, "matrix"), Unstructured(0.7, 10), NM(2, 4),
            NM(3, 5)]


def prune(method, W, X, pattern, **given):
    """The solution of `method`, flags as in refit__steps=3."""
    flags = {k.replace("__", "."): v for k, v in given.items()}
    chain = [(module, configured(module, flags)) for module in solvers.chain(method)]
    statistics = statistics_of(X, {"outer", "sum", "sum_sq"}, W.dtype)
    return solvers.solve(W, statistics, pattern.with_default_group(chain[0][1].group), chain)


def supports(pattern, C):
    """Every mask of a row of C weights that has the pattern (row group)."""
    if isinstance(pattern, NM):
        per_group = [combinations(range(g, g + pattern.m), pattern.n) for g in range(0, C, pattern.m)]
        chosen = [tuple(itertools.chain.from_iterable(parts)) for parts in product(*per_group)]
    else:
        chosen = combinations(range(C), C - ref.exact_count(C, pattern.sparsity))
    masks = torch.zeros(0, C, dtype=torch.bool)
    return torch.cat([masks, *(torch.zeros(1, C, dtype=torch.bool).index_fill_(1, torch.tensor(list(s)), True)
                               for s in chosen)])


def best_errors(W, G, masks):
    """(R,) the lowest error that each row can have on any of `masks`, values refitted: a direct solve for each."""
    M = masks.double()
    A = G * M.unsqueeze(2) * M.unsqueeze(1) + torch.diag_embed(1 - M)
    V = torch.linalg.solve(A, (M.unsqueeze(1) * (W @ G)).transpose(1, 2)).transpose(1, 2)  # (masks, R, C)
    D = W - V
    return ((D @ G) * D).sum(2).amin(0)


def row_errors(W, W_hat, G):
    D = W - W_hat
    return ((D @ G) * D).sum(1)


# --- refit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_refit_is_least_squares_on_the_mask(method, pattern):
    W, X = layer(5, 40, 300, dead=(3, 17))
    G, before = ref.gram(X), prune(method, W, X, pattern)
    W_hat = prune(f"{method}+refit", W, X, pattern, refit__steps=300, refit__tolerance=0.0).W_hat
    live = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.tensor([3, 17]), False)
    want = ref.refit(W, before.mask, G, before.W_hat, 4 * 2.0**-26 * G.diagonal())  # the price of a move
    torch.testing.assert_close(W_hat[:, live], want[:, live], rtol=1e-7, atol=1e-9)
    assert torch.equal(W_hat[:, ~live], before.W_hat[:, ~live])
    least = ref.layer_error(W, ref.refit(W, before.mask, G), G)
    assert ref.layer_error(W, W_hat, G) <= (1 + 1e-9) * least


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_refit_of_a_singular_gram_stays_near_the_start(dtype, tolerance, sparsity):
    """Seven tokens for 40 inputs: 20 kept weights a row can fit them in many ways, 4 cannot."""
    W, X = (t.to(dtype) for t in layer(5, 40, 7))
    before = prune("wanda", W, X, Unstructured(sparsity))
    W_hat = prune("wanda+refit", W, X, Unstructured(sparsity), refit__steps=100, refit__tolerance=0.0).W_hat
    G = ref.gram(X)
    sizes = G.diagonal()
    want = ref.refit(W, before.mask, G, before.W_hat, 0.03 * (7 * sizes + sizes.median()) / 8)
    torch.testing.assert_close(W_hat.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("C", [64, 128])
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), NM(2, 4)], ids=str)
def test_few_tokens_do_no_harm_on_others(C, pattern):
    """Where the kept weights of a row outnumber the tokens, or nearly: on other tokens what a refiner makes errs no
    more than what it started from (alps: than Wanda), and nothing blows up. float32, the defaults, three layers.
    As many tokens as kept weights is the worst: refit fits their noise, unheld to twice SparseGPT's error."""
    chains = {"wanda+refit": "wanda", "sparsegpt+refit": "sparsegpt", "wanda+swaps": "wanda",
              "wanda+swaps+refit": "wanda", "alps": "wanda"}
    for T, slack in ((1, 1.1), (4, 1.1), (C // 8, 1.1), (C // 4, 1.1), (C // 2, 1.3)):
        errors = dict.fromkeys([*chains, "sparsegpt", "wanda"], 0.0)
        for seed, method in product(range(3), errors):
            W, X = (t.float() for t in layer(8, C, T + 512, seed=seed))
            solution = prune(method, W, X[:T], pattern)
            other = ref.gram(X[T:])
            errors[method] += ref.layer_error(W, solution.W_hat, other) / ref.layer_error(W, 0 * W, other)
            assert solution.W_hat.abs().max() < 10 * W.abs().max()
        for method, start in chains.items():
            assert errors[method] <= slack * errors[start], (T, method)


@pytest.mark.parametrize("method", ["wanda", "wanda+refit", "sparsegpt", "alps"])
def test_few_tokens_are_a_warning_where_values_are_fitted(method):
    W, X = layer(4, 20, 20)
    for x, few in ((X, 0), (X[:19], 1)):
        said = prune(method, W, x, NM(2, 4)).info.get("warnings", [])
        assert ["19 calibration tokens for 20 inputs" in w for w in said] == [True] * (few and method != "wanda")
        assert not prune(method, W, x, Unstructured(0.0)).info.get("warnings")


def test_refit_by_default_is_near_the_optimum():
    for seed in range(5):
        W, X = (t.float() for t in layer(20, 160, 800, seed=seed))
        G = ref.gram(X)
        solution = prune("wanda+refit", W, X, Unstructured(0.7))
        least = ref.layer_error(W, ref.refit(W, solution.mask, G), G)
        assert ref.layer_error(W, solution.W_hat, G) < 1.02 * least


def test_refit_leaves_a_row_that_is_at_its_best():
    """Bit by bit, while the others move."""
    W, X = (t.float() for t in layer(4, 40, 300))
    statistics, mask = statistics_of(X, {"outer"}), torch.rand(4, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    W_hat = W * mask
    W_hat[2] = ref.refit(W, mask, statistics.G)[2].float()
    found, _ = linalg.refit(W, W_hat, mask, statistics, 20, 0.0)
    error = [((W - V).double() @ statistics.G.double() * (W - V).double()).sum(1) for V in (W_hat, found)]
    assert (error[1] <= error[0] * (1 + 1e-6)).all() and (error[1][[0, 1, 3]] < 0.9 * error[0][[0, 1, 3]]).all()


def test_refit_ends_when_a_step_gains_little():
    W, X = layer(20, 160, 800)
    used = [prune("wanda+refit", W, X, NM(2, 4), refit__tolerance=t).info["refit.steps"] for t in (0.5, 1e-2, 1e-3)]
    assert 1 <= used[0] < used[1] < used[2] <= 30
    assert prune("wanda+refit", W, X, NM(2, 4), refit__steps=2, refit__tolerance=0.0).info["refit.steps"] == 2


@pytest.mark.parametrize("solver", ["dsnot", "alps", "sparsegpt"])
def test_no_part_of_a_chain_overwrites_what_another_noted(solver):
    """DSnoT's own swaps, ALPS' own refit steps; a refiner that stands twice in the chain; warnings of all."""
    W, X = layer(6, 40, 39)
    statistics, pattern = statistics_of(X, {"outer", "sum", "sum_sq"}), Unstructured(0.5, "row")
    chain = chain_of(f"{solver}+swaps+refit+swaps+refit")
    alone, info = (solvers.solve(W, statistics, pattern, c).info for c in (chain[:1], chain))
    warnings = info.pop("warnings")
    assert len(warnings) == 1 and alone.pop("warnings", warnings) == warnings
    assert info == alone | {k: v for k, v in info.items() if "." in k}
    assert {k for k in info if "." in k} == {f"{part}{i}.{key}" for i in ("", "2") for part, key in (
        ("swaps", "exchanges"), ("swaps", "rounds"), ("refit", "steps"))}


# --- swaps --------------------------------------------------------------------------------------------------


def test_worth_of_an_exchange_is_the_change_of_the_least_error():
    """The tableau's table against two least-squares problems, for every pair, before and after exchanges."""
    W, X = layer(3, 9, 50)
    G = ref.gram(X)
    statistics = statistics_of(X, {"outer"})
    unit, s, _ = linalg.unit_gram(statistics, torch.float64)
    keep = torch.arange(9).repeat(3, 1) < 4
    start = ref.refit(W, keep, G) * s
    A = swaps.tableau(start, (W * s - start) @ unit, unit.repeat(3, 1, 1), 4, 6e-8)
    order = torch.arange(9).repeat(3, 1)
    for p, u in ((0, 6), (3, 8), (2, 6)):
        table, least = swaps.worth(A, 4), [ref.layer_error(W[i:i + 1], ref.refit(W[i:i + 1], keep[i:i + 1], G), G)
                                           for i in range(3)]
        for i, a, b in product(range(3), range(4), range(5)):
            other = keep[i:i + 1].clone()
            other[0, order[i, a]], other[0, order[i, 4 + b]] = False, True
            change = ref.layer_error(W[i:i + 1], ref.refit(W[i:i + 1], other, G), G) - least[i]
            torch.testing.assert_close(table[i, a, b].item(), change, rtol=1e-4, atol=1e-5)
        at = torch.tensor([p] * 3), torch.tensor([u] * 3)
        swaps.pivot(A, at[0], -1)
        swaps.pivot(A, at[1], 1)
        for matrix in (A, A.transpose(1, 2), order):
            matrix[:, p], matrix[:, u] = matrix[:, u].clone(), matrix[:, p].clone()
        keep = torch.zeros_like(keep).scatter_(1, order[:, :4], True)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), NM(2, 4)], ids=str)
def test_swaps_leave_no_exchange_that_pays(pattern):
    """From a mask at random, all columns candidates: what is left is a local optimum, by direct solves."""
    W, X = layer(6, 12, 60)
    G, statistics = ref.gram(X), statistics_of(X, {"outer"})
    mask = pattern.keep(torch.rand(6, 12, generator=torch.Generator().manual_seed(0)))
    solution = swaps.refine(W, Solution(W * mask, mask), statistics, pattern, swaps.Config(depth=1))
    assert solution.info["exchanges"] > 6
    for i in range(6):
        keep, w = solution.mask[i:i + 1], W[i:i + 1]
        least = ref.layer_error(w, ref.refit(w, keep, G), G)
        for p, u in product(range(12), range(12)):
            if keep[0, p] and not keep[0, u] and (not isinstance(pattern, NM) or p // 4 == u // 4):
                other = keep.clone()
                other[0, p], other[0, u] = False, True
                assert ref.layer_error(w, ref.refit(w, other, G), G) >= least * (1 - 1e-6)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), NM(2, 4)], ids=str)
def test_swaps_by_default_leave_no_exchange_that_pays_in_rows_of_64(pattern):
    """Values of all kept weights refitted for every single exchange, by direct solves."""
    W, X = layer(4, 64, 300)
    G, solution = ref.gram(X), prune("wanda+swaps", W, X, pattern, swaps__rounds=30)
    assert solution.info["swaps.exchanges"] > 4
    for w, keep in zip(W.split(1), solution.mask.split(1), strict=True):
        pairs = [(p, u) for p, u in product(keep[0].nonzero().flatten(), (~keep[0]).nonzero().flatten())
                 if not isinstance(pattern, NM) or p // 4 == u // 4]
        others = keep.repeat(len(pairs), 1)
        for other, (p, u) in zip(others, pairs, strict=True):
            other[p], other[u] = False, True
        assert best_errors(w, G, others).item() >= best_errors(w, G, keep).item() * (1 - 1e-6)


@pytest.mark.parametrize("solver", solvers.names()["solver"])
@pytest.mark.parametrize("pattern, C", [(Unstructured(0.5, "row"), 10), (Unstructured(0.7, "row"), 10), (NM(2, 4), 8)],
                         ids=str)
def test_swaps_and_refit_come_near_the_best_of_all_supports(solver, pattern, C):
    """60 layers of 3 rows: error over the least possible one, of each row and of the layer. The issue's 20 % at worst
    hold for layers, and with more beginnings for each row; by default the worst row is at 25 %. Without swaps most are
    far from it."""
    masks, rows, layers, before, thorough = supports(pattern, C), [], [], [], []
    for seed in range(60):
        W, X = layer(3, C, 5 * C, seed=seed)
        G = ref.gram(X)
        least = best_errors(W, G, masks)
        error = row_errors(W, prune(f"{solver}+swaps+refit", W, X, pattern).W_hat, G)
        rows.append(error / least)
        layers.append(error.sum() / least.sum())
        if (error > 1.001 * least).any():
            W_hat = prune(f"{solver}+swaps+refit", W, X, pattern, swaps__beginnings=8).W_hat
            thorough.append(row_errors(W, W_hat, G) / least)
        if solver in ("magnitude", "wanda"):
            before.append(ref.layer_error(W, prune(f"{solver}+refit", W, X, pattern).W_hat, G) / least.sum())
    rows, layers = torch.cat(rows), torch.stack(layers)
    assert rows.min() > 1 - 1e-6 and rows.median() < 1.001
    assert rows.max() < 1.26 and (rows > 1.2).sum() <= 2, f"{rows.max():.4f}"
    assert layers.max() < 1.2, f"{layers.max():.4f}"
    assert not thorough or torch.cat(thorough).max() < 1.02, f"{torch.cat(thorough).max():.4f}"
    assert not before or max(before) > 1.5


def test_supports_are_all_there():
    assert len(supports(NM(2, 4), 8)) == 36 and len(supports(Unstructured(0.7, "row"), 10)) == 120
    W, X = layer(2, 7, 30)
    G = ref.gram(X)
    found = best_errors(W, G, supports(Unstructured(0.5, "row"), 7))
    for w, error in zip(W, found, strict=True):
        assert error.item() == pytest.approx(ref.best_mask_bruteforce(w, G, 4)[2], rel=1e-8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_swaps_with_few_candidates_still_lower_the_error(pattern):
    """More columns than candidates, in float32, behind a solver that knows little."""
    W, X = (t.float() for t in layer(16, 160, 800))
    G = ref.gram(X)
    errors = [ref.layer_error(W, prune(m, W, X, pattern, **given).W_hat, G)
              for m, given in (("magnitude+refit", {}), ("magnitude+swaps+refit", {"swaps__candidates": 8}),
                               ("magnitude+swaps+refit", {"swaps__rounds": 30}))]
    assert errors[1] < 0.9 * errors[0] and errors[2] < errors[1]


def test_swaps_row_by_row_in_chunks(monkeypatch):
    """A layer too large for one chunk of tableaux gives the same as a small one."""
    W, X = layer(7, 40, 100)
    whole = prune("wanda+swaps", W, X, NM(2, 4))
    monkeypatch.setattr(swaps, "CHUNK", 2 * 65**2)
    parts = prune("wanda+swaps", W, X, NM(2, 4))
    assert torch.equal(parts.mask, whole.mask) and parts.info["swaps.exchanges"] == whole.info["swaps.exchanges"]
    torch.testing.assert_close(parts.W_hat, whole.W_hat, rtol=1e-9, atol=1e-11)


def test_swaps_bring_back_no_dead_input():
    """A kept weight on one goes, when the row has a live one to take."""
    W, X = layer(4, 20, 90, dead=(0, 7))
    mask = torch.arange(20).repeat(4, 1) < 10
    solution = swaps.refine(W, Solution(W * mask, mask), statistics_of(X, {"outer"}), Unstructured(0.5, "row"),
                            swaps.Config())
    assert not solution.mask[:, [0, 7]].any()
    assert (solution.mask.sum(1) == 10).all()


# --- ALPS ---------------------------------------------------------------------------------------------------


def paper_admm(W, G, pattern, cfg):
    """The paper's own form of the steps, with its multiplier V and W G, on this program's schedule of ρ; float64."""
    s = G.diagonal().sqrt()
    G, W = G / s / s.unsqueeze(1), W * s
    rho, mask = cfg.rho, pattern.keep(W.abs())
    D, V = W * mask, torch.zeros_like(W)
    kept = int(mask.sum())
    for step in range(cfg.steps):
        B = (W @ G - V + rho * D) @ torch.linalg.inv(G + rho * torch.eye(len(G), dtype=G.dtype))
        before, mask = mask, pattern.keep((B + V / rho).abs())
        D = (B + V / rho) * mask
        V = V + rho * (B - D)
        if step and int((before != mask).sum()) <= 2 * cfg.rest * kept:
            break
        rho *= cfg.growth
    return D / s, mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_alps_is_the_papers_iteration(pattern):
    W, X = layer(6, 40, 200)
    pattern, cfg = pattern.with_default_group("matrix"), alps.Config(refit_steps=0)
    D, mask = paper_admm(W, ref.gram(X), pattern, cfg)
    solution = alps.prune(W, statistics_of(X, {"outer"}), pattern, cfg)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.W_hat, D, rtol=1e-7, atol=1e-9)
    assert solution.info["steps"] > 3


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=str)
@pytest.mark.parametrize("R, C, T, share", [(16, 64, 320, 0.02), (24, 96, 480, 0.02), (24, 96, 200, 0.03)])
def test_alps_errs_as_the_published_algorithm(pattern, R, C, T, share):
    """Our schedule of ρ, Cholesky steps, earlier end and few CG steps in float32, against the paper's in float64. With
    hardly more tokens than inputs its slower schedule finds masks up to 2.5 % better."""
    for seed in range(2):
        W, X = layer(R, C, T, seed=seed)
        G = ref.gram(X)
        ours = prune("alps", W.float(), X.float(), pattern).W_hat
        published = ref.alps(W, X, (pattern.n, pattern.m) if isinstance(pattern, NM) else pattern.sparsity)[0]
        assert ref.layer_error(W, ours, G) == pytest.approx(ref.layer_error(W, published, G), rel=share)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=str)
def test_alps_beats_sparsegpt_on_correlated_inputs(pattern, seed):
    """Its mask as well as its values: SparseGPT's are refitted, too."""
    W, X = (t.float() for t in layer(32, 160, 800, seed=seed))
    G = ref.gram(X)
    ours, refitted, theirs = (ref.layer_error(W, prune(m, W, X, pattern).W_hat, G)
                              for m in ("alps", "sparsegpt+refit", "sparsegpt"))
    assert ours < 0.8 * theirs and ours < 0.95 * refitted


def test_alps_slower_growth_is_no_worse():
    W, X = (t.float() for t in layer(32, 160, 800))
    G = ref.gram(X)
    fast, slow = (prune("alps", W, X, NM(2, 4), alps__growth=g) for g in (2.0, 1.05))
    assert fast.info["steps"] < slow.info["steps"]
    assert ref.layer_error(W, slow.W_hat, G) < ref.layer_error(W, fast.W_hat, G)


def test_alps_refuses_what_is_no_gram_matrix():
    statistics = statistics_of(torch.eye(2), {"outer"})
    statistics.G.copy_(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))
    with pytest.raises(linalg.NumericalError, match="not positive definite"):
        alps.prune(torch.randn(3, 2), statistics, Unstructured(0.5), alps.Config())


def test_alps_in_float64_says_so():
    """1 + 2⁻³⁰ is 1 in float32, which leaves no second pivot, and more than 1 in float64."""
    L, notes = alps.factor(torch.ones(2, 2), 2.0**-30)
    assert L.dtype == torch.float64 and notes == ["factored in float64: float32 failed"]
    L, notes = alps.factor(torch.ones(2, 2), 0.1)
    assert L.dtype == torch.float32 and notes == []


def test_alps_factors_a_gram_matrix_once_for_all_it_feeds(monkeypatch):
    """Second linear, second pattern: the factors are there, the weights are those of a problem solved alone."""
    gen, made, real = torch.Generator().manual_seed(0), [], torch.linalg.cholesky_ex
    x, W = torch.randn(64, 16, generator=gen), torch.randn(2, 8, 16, generator=gen)

    def alone(W, pattern):
        statistics = Statistics(16, frozenset({"outer"}))
        statistics.update(x)
        return alps.prune(W, statistics, pattern, alps.Config()).W_hat
    want = [alone(w, p) for w in W for p in (Unstructured(0.5), Unstructured(0.7))]
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda A: made.append(A.shape) or real(A))
    statistics = Statistics(16, frozenset({"outer"}))
    statistics.update(x)
    steps, got = [], []
    for w in W:
        for pattern in (Unstructured(0.5), Unstructured(0.7)):
            solution = alps.prune(w, statistics, pattern, alps.Config())
            steps.append(solution.info["steps"])
            got.append(solution.W_hat)
    assert len(made) == max(steps) < sum(steps)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    made.clear()
    monkeypatch.setattr(alps, "SHARED", 3 * 4 * 16 * 16)  # room for three factors
    statistics._derived.clear()
    for w in W:
        alps.prune(w, statistics, Unstructured(0.5), alps.Config())
    assert len(made) == steps[0] + steps[2] - 3


@pytest.mark.parametrize("flag, value", [
    ("refit.steps", -1), ("refit.tolerance", float("nan")), ("swaps.candidates", 1), ("swaps.depth", 0),
    ("swaps.beginnings", 0), ("swaps.rounds", -1), ("alps.rho", 0.0), ("alps.growth", 1.0), ("alps.steps", 0),
    ("alps.rest", -0.1), ("alps.refit_steps", -1)])
def test_flags_are_checked(flag, value):
    part, name = flag.split(".")
    with pytest.raises(ValueError, match=f"--{flag} "):
        solvers.module(part).Config(**{name: value})
