"""Laws of RIA, DSnoT and ADMM beyond the contract."""

import pytest
import reference as ref
import torch
from problems import layer, statistics_of
from solving import assert_sound, case, run

from oneshot.prune import solvers
from oneshot.prune.linalg import NumericalError
from oneshot.prune.patterns import NM, Unstructured


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
