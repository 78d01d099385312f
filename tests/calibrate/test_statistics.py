"""Statistics: sums that add, a Gram matrix made in place, against the naive float64 mean."""

import pytest
import reference as ref
import torch
from problems import layer, statistics_of

from oneshot.calibrate.statistics import NEEDS, SAMPLE, Statistics

WIDTHS = [1, 2, 63, 64, 65, 130, 521, 700]  # strips of max(C/8, 64) in `update`, of 512 in `G`
F64 = {"rtol": 1e-12, "atol": 1e-12}


def tokens(T, C, seed=0, dtype=torch.float64):
    return layer(1, C, T, seed=seed)[1].to(dtype)


def assert_same(a, b, **tolerance):
    """Two Statistics say the same of all but the sample."""
    assert a.n == b.n
    for what in ("mean", "mean_sq", "G"):
        torch.testing.assert_close(getattr(a, what), getattr(b, what), **(tolerance or F64))


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_means_are_the_naive_ones(C, dtype, tolerance):
    X = tokens(200, C)
    m = statistics_of(X, NEEDS, dtype, batch=70)
    G = ref.gram(X)
    assert m.n == 200 and m.G.dtype == m.mean.dtype == m.mean_sq.dtype == dtype
    for got, want in ((m.G, G), (m.mean_sq, G.diagonal()), (m.mean, X.mean(0))):
        assert torch.linalg.vector_norm(got - want) <= tolerance * torch.linalg.vector_norm(want)
    assert torch.equal(m.G, m.G.T)


@pytest.mark.parametrize("C", [5, 130])
def test_batches_and_their_order_do_not_matter(C):
    X = tokens(90, C)
    whole = statistics_of(X, NEEDS)
    assert_same(statistics_of(X, NEEDS, batch=7), whole)
    assert_same(statistics_of(X.flip(0), NEEDS, batch=13), whole)
    empty = statistics_of(X, NEEDS)
    empty.update(X[:0])
    assert_same(empty, whole)


def test_update_after_the_gram_was_read():
    X = tokens(90, 130)
    m = statistics_of(X[:20], NEEDS)
    assert torch.equal(m.G, m.G)
    m.update(X[20:])
    assert_same(m, statistics_of(X, NEEDS))


def test_the_input_is_untouched_and_not_held():
    X = tokens(40, 8)
    before = X.clone()
    m = statistics_of(X, NEEDS)
    m.G, m.mean, m.mean_sq, m.relative_error(X[:2], X[1:3])
    assert torch.equal(X, before)
    X.zero_()
    assert_same(m, statistics_of(before, NEEDS))
    assert m.sample.abs().sum() > 0


def test_half_precision_is_summed_in_float32():
    """Squares beyond float16's 65504, and a sum that float16 cannot count."""
    x = torch.full((3000, 2), 300.0, dtype=torch.float16)
    m = statistics_of(x, NEEDS, torch.float32, batch=1000)
    for got, want in ((m.G, 9e4), (m.mean_sq, 9e4), (m.mean, 300)):
        torch.testing.assert_close(got, torch.full_like(got, want))


@pytest.mark.parametrize("needs", [(), ("sum",), ("sum_sq",), ("outer",), ("sample",), ("sum_sq", "sample")])
def test_only_what_is_needed_is_kept(needs):
    m = statistics_of(tokens(30, 6), needs)
    assert {name for name in NEEDS if getattr(m, name) is not None} == set(needs) and m.n == 30


def test_unknown_need():
    with pytest.raises(ValueError, match="median"):
        Statistics(4, {"median"})


def test_mean_sq_comes_from_either_statistic():
    X = tokens(30, 6)
    torch.testing.assert_close(statistics_of(X, {"outer"}).mean_sq, statistics_of(X, {"sum_sq"}).mean_sq, **F64)


def test_no_tokens():
    m = Statistics(3, NEEDS)
    assert m.n == 0 and not m.G.any() and not m.mean.any() and not m.mean_sq.any()
    assert m.relative_error(torch.ones(2, 3), torch.zeros(2, 3)) is None
    m.update(torch.ones(2, 3))
    assert torch.equal(m.G, torch.ones(3, 3))


def test_non_finite_inputs_show():
    """On the diagonal, at the input they came by: what the solvers look at."""
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30):  # 1e30: its square is beyond float32
        X = tokens(30, 70, dtype=torch.float32)
        X[7, 5] = bad
        m = statistics_of(X, NEEDS, batch=10)
        for diagonal in (m.mean_sq, m.G.diagonal()):
            assert (~torch.isfinite(diagonal)).nonzero().flatten().tolist() == [5]


def test_derived_is_computed_once_until_the_statistics_change():
    m, calls = statistics_of(tokens(20, 4), NEEDS), []

    def trace():
        return m.derived("trace", lambda: calls.append(1) or m.G.trace().item())

    first = trace()
    assert trace() == first and len(calls) == 1
    m.update(10 * tokens(20, 4))
    assert trace() > first and len(calls) == 2
    assert m.derived("other", lambda: 7) == 7


# --- the sample ---------------------------------------------------------------------------------------------


def test_the_sample_is_bounded_and_of_real_tokens():
    X = tokens(3000, 3)
    m = statistics_of(X, {"sample"}, batch=100)
    assert m.sample.shape == (SAMPLE, 3)
    known = {tuple(x) for x in X.tolist()}
    taken = [tuple(x) for x in m.sample.tolist()]
    assert all(x in known for x in taken) and len(set(taken)) == SAMPLE
    one = statistics_of(X, {"sample"})  # one large batch does not fill the whole sample, and is seen to its end
    assert 0 < len(one.sample) < SAMPLE and torch.equal(one.sample[-1], X[-1])


def test_relative_error_is_the_outputs_error():
    """Few tokens are all sampled: the error is tr((W-Ŵ) G (W-Ŵ)ᵀ) / tr(W G Wᵀ)."""
    W, X = layer(4, 6, 20)
    W_hat = ref.wanda(W, X, 0.5)[0]
    m = statistics_of(X, {"sample"}, batch=5)
    error, whole = (ref.layer_error(W, other, ref.gram(X)) for other in (W_hat, 0 * W))
    assert m.relative_error(W, W_hat) == pytest.approx(error / whole, rel=1e-10)
    assert m.relative_error(W, W) == 0 and m.relative_error(0 * W, 0 * W) == 0
    assert m.relative_error(W, 0 * W) == pytest.approx(1)
