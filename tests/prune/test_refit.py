"""Refit: least squares on the mask; what few tokens do to what is fitted; a chain's notes; flags of all refiners."""

from itertools import product

import pytest
import reference as ref
import torch
from jobs import chain_of
from problems import layer, statistics_of
from solving import solved

from oneshot.prune import linalg, solvers
from oneshot.prune.patterns import NM, Unstructured

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "row"), Unstructured(0.5, "matrix"), Unstructured(0.7, 10), NM(2, 4),
            NM(3, 5)]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_refit_is_least_squares_on_the_mask(method, pattern):
    W, X = layer(5, 40, 300, dead=(3, 17))
    G, before = ref.gram(X), solved(method, W, X, pattern)
    W_hat = solved(f"{method}+refit", W, X, pattern, refit__steps=300, refit__tolerance=0.0).W_hat
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
    before = solved("wanda", W, X, Unstructured(sparsity))
    W_hat = solved("wanda+refit", W, X, Unstructured(sparsity), refit__steps=100, refit__tolerance=0.0).W_hat
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
            solution = solved(method, W, X[:T], pattern)
            other = ref.gram(X[T:])
            errors[method] += ref.layer_error(W, solution.W_hat, other) / ref.layer_error(W, 0 * W, other)
            assert solution.W_hat.abs().max() < 10 * W.abs().max()
        for method, start in chains.items():
            assert errors[method] <= slack * errors[start], (T, method)


@pytest.mark.parametrize("method", ["wanda", "wanda+refit", "sparsegpt", "alps"])
def test_few_tokens_are_a_warning_where_values_are_fitted(method):
    W, X = layer(4, 20, 20)
    for x, few in ((X, 0), (X[:19], 1)):
        said = solved(method, W, x, NM(2, 4)).info.get("warnings", [])
        assert ["19 calibration tokens for 20 inputs" in w for w in said] == [True] * (few and method != "wanda")
        assert not solved(method, W, x, Unstructured(0.0)).info.get("warnings")


def test_refit_by_default_is_near_the_optimum():
    for seed in range(5):
        W, X = (t.float() for t in layer(20, 160, 800, seed=seed))
        G = ref.gram(X)
        solution = solved("wanda+refit", W, X, Unstructured(0.7))
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
    used = [solved("wanda+refit", W, X, NM(2, 4), refit__tolerance=t).info["refit.steps"] for t in (0.5, 1e-2, 1e-3)]
    assert 1 <= used[0] < used[1] < used[2] <= 30
    assert solved("wanda+refit", W, X, NM(2, 4), refit__steps=2, refit__tolerance=0.0).info["refit.steps"] == 2


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


@pytest.mark.parametrize("flag, value", [
    ("refit.steps", -1), ("refit.tolerance", float("nan")), ("swaps.candidates", 1), ("swaps.depth", 0),
    ("swaps.beginnings", 0), ("swaps.rounds", -1), ("alps.rho", 0.0), ("alps.growth", 1.0), ("alps.steps", 0),
    ("alps.rest", -0.1), ("alps.refit_steps", -1)])
def test_flags_are_checked(flag, value):
    part, name = flag.split(".")
    with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')} "):
        solvers.module(part).Config(**{name: value})
