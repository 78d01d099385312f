"""The column loop in Triton, under the interpreter, against the plain one."""

import pytest
import torch
from oneshot_kernels import columns
from oneshot_kernels.cpu import column_loop as compiled
from oneshot_kernels.cpu.column_loop import Grid, reference, some_grid
from oneshot_kernels.gpu import column_loop


def problem(b, R, seed=0):
    g = torch.Generator().manual_seed(seed)
    U = torch.randn(b, b, generator=g).triu_(1) / b**0.5 + torch.diag(torch.rand(b, generator=g) + 0.5)
    return torch.randn(b, R, generator=g), U, torch.rand(b, R, generator=g) < 0.5


def both(W, U, mask, nm=None, grid=lambda: None):
    out = []
    for run in (column_loop.solve, reference):
        w, kept, g = W.clone(), mask.clone(), grid()
        run(w, U, kept, nm, g)
        out.append((w, kept, g))
    return out


@pytest.mark.parametrize("b, R", [(1, 1), (4, 16), (13, 5), (28, 65), (128, 20)])
@pytest.mark.parametrize("rounded", [False, True])
def test_given_mask(b, R, rounded):
    W, U, mask = problem(b, R)
    (got, kept, g), (want, _, h) = both(W, U, mask, grid=lambda: some_grid(W) if rounded else None)
    assert torch.equal(kept, mask) and not got[~mask].any()
    assert (got - want).norm() <= 1e-5 * want.norm() and (not rounded or torch.equal(g.codes, h.codes))


@pytest.mark.parametrize("nm", [(2, 4), (1, 2), (3, 4), (4, 8), (4, 4), (16, 32)])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_mask_is_chosen_as_the_reference_chooses(nm, rounded):
    n, m = nm
    W, U, _ = problem(3 * m, 21)
    (got, mask, _), (want, wanted, _) = both(W, U, torch.zeros(3 * m, 21, dtype=torch.bool), nm,
                                             lambda: some_grid(W) if rounded else None)
    assert torch.equal(mask, wanted) and bool((mask.view(3, m, 21).sum(1) == n).all())
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_of_equal_scores_the_right_most_stay():
    W = torch.ones(8, 3)
    (_, mask, _), (_, wanted, _) = both(W, torch.eye(8), torch.zeros(8, 3, dtype=torch.bool), (2, 4))
    assert torch.equal(mask, wanted) and mask[:, 0].tolist() == [False, False, True, True] * 2


def test_ties_between_codes_go_to_the_even_one():
    W = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 100.0]])
    grid = Grid(torch.ones(1, 6), 1, -8, 7, torch.zeros(1, 6, dtype=torch.int8))
    column_loop.solve(W, torch.eye(1), torch.ones(1, 6, dtype=torch.bool), None, grid)
    assert grid.codes.tolist() == [[0, 2, 2, 0, -2, 7]] and W.tolist() == [[0, 2, 2, 0, -2, 7]]


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda W: False)
    W = torch.zeros(128, 4)
    assert columns.available(W) and columns.available(W, (2, 4)) and not columns.available(W, (3, 5))
    assert not columns.available(W.double()) and not columns.available(torch.zeros(512, 4))


def failing(*args):
    raise RuntimeError("Failed to find C compiler")


def off(W, *rest, right=column_loop.solve):
    right(W, *rest)
    W.mul_(1.5)


@pytest.mark.parametrize("solve, said", [(failing, "RuntimeError: Failed to find C compiler"), (off, "relative error")])
def test_a_kernel_that_does_not_compile_or_is_wrong_is_not_used(solve, said, monkeypatch):
    monkeypatch.setattr(column_loop, "solve", solve)
    column_loop.trusted.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=f"column loop FAILED its self-test.*plain torch is: {said}"):
            assert not column_loop.takes(torch.zeros(4, 4))
    finally:
        column_loop.trusted.cache_clear()
