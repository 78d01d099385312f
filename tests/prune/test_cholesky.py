"""prune/cholesky.py against LAPACK in float64: factors and solutions of every width, and what has no factor."""

import pytest
import torch

from oneshot.prune import cholesky
from oneshot.runtime import products

WIDTHS = [1, 5, 127, 128, 129, 300, 513]


def gram(C, seed=0, dtype=torch.float32):
    """A Gram matrix of unit diagonal with one strong direction, and 0.1 on its diagonal more."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * C + 1, C, generator=draw) + 3 * torch.randn(2 * C + 1, 1, generator=draw)
    G = (x.T @ x).double()
    size = G.diagonal().sqrt()
    return (G / size / size[:, None] + 0.1 * torch.eye(C)).to(dtype)


def off(found, want):
    return ((found.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("C", WIDTHS)
def test_factors_and_solutions_are_as_precise_as_lapacks(C):
    """At most twice its error, also by the products of the commands."""
    A, B = gram(C), torch.randn(7, C, generator=torch.Generator().manual_seed(1))
    L = torch.linalg.cholesky(A.double())
    want = torch.cholesky_solve(B.double().T, L).T
    plain = torch.linalg.cholesky(A)
    for way in (products.float32, torch.no_grad):
        with way():
            found = cholesky.factor(A)
            X = found.solve(B)
        assert torch.equal(found.L, found.L.tril()) and X.shape == B.shape and X.is_contiguous()
        assert off(found.L, L) <= 2 * off(plain, L) + 1e-7
        assert off(X, want) <= 2 * off(torch.cholesky_solve(B.T, plain).T, want) + 1e-6


@pytest.mark.parametrize("C", WIDTHS)
def test_in_float64_it_is_exact_to_float64(C):
    A, B = gram(C, dtype=torch.float64), torch.randn(3, C, dtype=torch.float64)
    found = cholesky.factor(A)
    assert off(found.L @ found.L.T, A) < 1e-14 and off(found.solve(B) @ A, B) < 1e-11


def test_only_the_lower_triangle_is_read_and_nothing_is_changed():
    A, B = gram(200), torch.randn(4, 400)[:, ::2]
    spoilt = A.tril() + torch.full_like(A, 9.0).triu(1)
    before = spoilt.clone(), B.clone()
    found = cholesky.factor(spoilt)
    assert torch.equal(found.L, cholesky.factor(A).L)
    assert torch.equal(found.solve(B), found.solve(B.contiguous()))
    assert torch.equal(spoilt, before[0]) and torch.equal(B, before[1])


@pytest.mark.parametrize("decades", [3, 5])
def test_badly_scaled_and_nearly_singular_ones_have_the_factor_that_lapack_finds(decades):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(700, 300, generator=draw) * torch.logspace(0, -decades / 2, 300) * (
        torch.randn(300, generator=draw).exp())
    A = (x.T @ x).double()
    A.diagonal().add_(1e-3 * A.diagonal().mean())
    A = A.float()
    found = cholesky.factor(A)
    back = found.L.double() @ found.L.double().T
    plain = torch.linalg.cholesky(A).double()
    assert off(back, A.double()) <= 4 * off(plain @ plain.T, A.double()) + 1e-7


@pytest.mark.parametrize("place", [0, 100, 128, 299])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_what_is_not_positive_definite_has_no_factor(place, value):
    A = gram(300)
    A[place, place] = value
    assert cholesky.factor(A) is None
    A = gram(300)
    A[299, 5] = float("nan")
    assert cholesky.factor(A) is None
