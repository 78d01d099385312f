"""The damped factor of a Gram matrix: what it is, and what happens when it cannot be had."""

import pytest
import reference as ref
import torch
from problems import layer, statistics_of

from oneshot.prune import linalg
from oneshot.prune.linalg import NumericalError, upper_factor

NEEDS = {"outer"}


def gram_of(G):
    """Statistics (of one token) whose G is the given matrix."""
    m = statistics_of(torch.zeros(1, len(G), dtype=G.dtype), NEEDS)
    m.outer.copy_(G)
    return m


@pytest.mark.parametrize("C, T, dead", [(1, 3, ()), (9, 40, ()), (70, 200, (0, 5, 69)), (40, 7, (3,))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_factor_of_the_damped_gram(C, T, dead, dtype, tolerance):
    W, X = layer(1, C, T, dead=dead)
    m = statistics_of(X, NEEDS, dtype)
    G = m.G.clone()
    V, found, info = upper_factor(m, 0.01, dtype)
    want = ref.dead_then_damped(W, ref.gram(X), 0.01)[1]
    assert V.dtype == dtype and torch.equal(V, V.triu()) and (V.diagonal() > 0).all()
    error = torch.linalg.vector_norm(V.double() @ V.double().T - want)
    assert error <= tolerance * torch.linalg.vector_norm(want)
    assert found.nonzero().flatten().tolist() == sorted(dead)
    assert info == {"damping": 0.01, "warnings": []} | ({"dead_inputs": len(dead)} if dead else {})
    assert torch.equal(m.G, G)


@pytest.mark.parametrize("asked, used", [(0.0, 0.01), (1e-9, 1e-7), (0.5, 0.5)])
def test_a_singular_gram_raises_the_damping_and_says_so(asked, used):
    """All inputs are one and the same: of the second 1 - 1 = 0 is left; 1 + 1e-9 is 1 in float32."""
    m = statistics_of(torch.ones(4, 6, dtype=torch.float32), NEEDS)
    V, _, info = upper_factor(m, asked, torch.float32)
    assert info["damping"] == pytest.approx(used)
    said = [f"damping raised from {asked:g} to {used:g}" in w for w in info["warnings"]]
    assert said == [True] * (used != asked)
    torch.testing.assert_close(V @ V.T, m.G + used * torch.eye(6))


def test_damping_ladder():
    for asked, ladder in ((0.01, [0.01, 0.1, 1]), (0.0, [0, 0.01, 0.1, 1]), (0.05, [0.05, 0.5, 1]), (3, [3])):
        assert linalg.damping_ladder(asked) == pytest.approx(ladder)


def test_float64_is_the_last_resort_and_says_so():
    """Squares of 1e40 are beyond float32, their root is not."""
    X = layer(1, 6, 40)[1]
    V, _, info = upper_factor(statistics_of(1e20 * X, NEEDS), 0.01, torch.float32)
    assert V.dtype == torch.float32 and torch.isfinite(V).all()
    assert info["damping"] == 0.01 and info["warnings"] == ["factored in float64: float32 failed"]
    want = upper_factor(statistics_of(X, NEEDS), 0.01, torch.float64)[0]
    torch.testing.assert_close(V.double(), 1e20 * want, rtol=1e-6, atol=0)
    one = statistics_of(1e20 * X[:, :1], NEEDS)  # 1 x 1: to LAPACK the root of Inf is no failure
    V, _, info = upper_factor(one, 0.01, torch.float32)
    assert torch.isfinite(V).all() and info["warnings"]


def test_an_indefinite_gram_is_refused():
    with pytest.raises(NumericalError, match="not positive definite even with damping 1 in float64"):
        upper_factor(gram_of(torch.tensor([[1.0, 9.0], [9.0, 1.0]])), 0.01, torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_gram_is_refused(bad):
    X = torch.ones(4, 6)
    X[1, 2] = bad
    with pytest.raises(NumericalError, match="not finite"):
        upper_factor(statistics_of(X, NEEDS), 0.01, torch.float32)
    assert issubclass(NumericalError, ValueError)


def test_all_inputs_dead():
    V, dead, info = upper_factor(statistics_of(torch.zeros(4, 6), NEEDS), 0.01, torch.float32)
    assert dead.all() and info["dead_inputs"] == 6 and torch.isfinite(V).all() and (V.diagonal() > 0).all()


def test_factored_once_but_each_caller_has_its_own_info():
    """Linears fed by the same tensor share the factor; the loop takes the warnings out of each one's info."""
    m = statistics_of(torch.ones(4, 6), NEEDS)
    V, _, info = upper_factor(m, 0.0, torch.float32)
    assert info.pop("warnings").pop()
    again, _, info = upper_factor(m, 0.0, torch.float32)
    assert again is V and len(info["warnings"]) == 1
    other, _, info = upper_factor(m, 0.1, torch.float32)
    assert other is not V and info["damping"] == 0.1
    m.update(torch.eye(6))
    assert upper_factor(m, 0.0, torch.float32)[0] is not V
