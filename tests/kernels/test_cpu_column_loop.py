"""The compiled column loop against the plain one: every variant this CPU runs, strange shapes, ties, threads, grids."""

import ctypes

import pytest
import torch
import variants
from oneshot_kernels.cpu import column_loop, library
from oneshot_kernels.cpu.column_loop import Grid, current, current_reference, reference, solve
from variants import needs_compiler

pytestmark = needs_compiler


@pytest.fixture(params=variants.NAMES)
def variant(request, monkeypatch):
    """`solve` runs this variant."""
    variants.use(column_loop, "column_loop", request.param, monkeypatch)


def problem(b, R, dtype=torch.float32, seed=0):
    """(W, U, mask) of well-conditioned random numbers."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(b, R, generator=g, dtype=torch.float64)
    U = torch.randn(b, b, generator=g, dtype=torch.float64).triu_(1) / b**0.5
    U += torch.diag(torch.rand(b, generator=g, dtype=torch.float64) + 0.5)
    return W.to(dtype), U.to(dtype), torch.rand(b, R, generator=g) < 0.5


def both(W, U, mask, nm=None, grid=lambda: None):
    """((Ŵ, mask, grid) compiled, the same by the reference)."""
    out = []
    for run in (solve, reference):
        w, kept, g = W.clone(), mask.clone(), grid()
        run(w, U, kept, nm, g)
        out.append((w, kept, g))
    return out


SHAPES = [(1, 1), (3, 5), (4, 16), (12, 63), (24, 64), (28, 65), (60, 131), (128, 200)]


@pytest.mark.parametrize("b, R", SHAPES)
def test_given_mask(variant, b, R):
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        W, U, mask = problem(b, R, dtype)
        (got, kept, _), (want, _, _) = both(W, U, mask)
        assert torch.equal(kept, mask) and not got[~mask].any()
        assert (got - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("nm", [(2, 4), (1, 2), (1, 4), (3, 4), (1, 1), (2, 3), (3, 5), (4, 8), (2, 12), (16, 32),
                                (4, 4)])
def test_the_mask_is_chosen_as_the_reference_chooses(variant, nm):
    n, m = nm
    for R in (1, 70, 131):
        W, U, _ = problem(3 * m, R, torch.float64)
        (got, mask, _), (want, wanted, _) = both(W, U, torch.zeros(3 * m, R, dtype=torch.bool), nm)
        assert torch.equal(mask, wanted) and bool((mask.view(3, m, R).sum(1) == n).all())
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("nm", [(2, 4), (3, 5), (4, 8)])
def test_of_equal_scores_the_right_ones_stay(variant, nm):
    """Small whole numbers and a power of two: float32 is exact, so that ties are ties."""
    m = nm[1]
    W = torch.randint(-2, 3, (4 * m, 150), generator=torch.Generator().manual_seed(1)).float()
    U = torch.eye(4 * m) * 2 + torch.eye(4 * m).roll(1, 1).triu(1)
    (got, mask, _), (want, wanted, _) = both(W, U, torch.zeros(4 * m, 150, dtype=torch.bool), nm)
    assert torch.equal(mask, wanted) and torch.equal(got, want)
    assert bool((mask.view(4, m, 150).sum(1) == nm[0]).all())


def test_errs_at_most_twice_as_much_as_torch(variant):
    W, U, mask = problem(128, 300)
    truth = W.double()
    reference(truth, U.double(), mask)
    (got, _, _), (plain, _, _) = both(W, U, mask)
    assert (got - truth).norm() <= 2 * (plain - truth).norm()


def test_any_number_of_threads_gives_the_same_bits(variant, monkeypatch):
    W, U, mask = problem(64, 1000)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        w, kept = W.clone(), mask.clone()
        solve(w, U, kept, (2, 4))
        found.append((w, kept))
    assert all(torch.equal(w, found[0][0]) and torch.equal(k, found[0][1]) for w, k in found)


@pytest.mark.parametrize("low, limit", [(-127, 127), (-7, 7), (-8, 7), (-2, 1)])
@pytest.mark.parametrize("width", [40, 16])
@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_kept_weights_go_to_the_grid_and_the_rest_compensates(variant, nm, width, low, limit):
    W, U, mask = problem(40, 90, torch.float64)
    scale = torch.stack([part.abs().amax(0) / limit for part in W.split(width)])

    def grid():
        return Grid(scale, width, low, limit, torch.full((40, 90), 99, dtype=torch.int8))
    (got, kept, ours), (want, wanted, theirs) = both(W, U, mask, nm, grid)
    assert torch.equal(kept, wanted) and torch.equal(ours.codes, theirs.codes) and torch.equal(got, want)
    assert not ours.codes[~kept].any() and (ours.codes.min(), ours.codes.max()) == (low, limit)
    assert torch.equal(got, ours.codes * scale.repeat_interleave(width, 0)[:40])
    nearest = W.clone()
    reference(nearest, torch.eye(40, dtype=torch.float64), kept, None, grid())  # U = 1: rounding without compensation
    V = torch.linalg.inv(U)
    assert ((W - got).T @ V).norm() < ((W - nearest).T @ V).norm()


def test_halves_are_rounded_to_even_as_torch_does(variant):
    W = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0, 6.5]).repeat(1, 1)
    grid = Grid(torch.ones(1, 8), 1, -8, 7, torch.empty(1, 8, dtype=torch.int8))
    solve(W, torch.ones(1, 1), torch.ones(1, 8, dtype=torch.bool), None, grid)
    assert grid.codes.tolist() == [[0, 2, 2, 0, -2, 7, -8, 6]]


@pytest.mark.parametrize("change, says", [
    (lambda a: a | {"W": a["W"].T}, "W must be contiguous"), (lambda a: a | {"W": a["W"].half()}, "float32 or float64"),
    (lambda a: a | {"U": a["U"][:3]}, "U must be"), (lambda a: a | {"mask": a["mask"].int()}, "mask must be"),
    (lambda a: a | {"nm": (2, 5)}, "2:5 does not fit 8"), (lambda a: a | {"nm": (5, 4)}, "5:4 does not fit"),
    (lambda a: a | {"grid": Grid(torch.zeros(1, 6), 8, -8, 7, torch.empty(8, 6, dtype=torch.int8))}, "not zero"),
    (lambda a: a | {"grid": Grid(torch.ones(2, 6), 8, -8, 7, torch.empty(8, 6, dtype=torch.int8))}, "scale must be"),
])
def test_what_does_not_fit_is_refused(change, says):
    W, U, mask = problem(8, 6)
    with pytest.raises(ValueError, match=says):
        solve(**change({"W": W, "U": U, "mask": mask}))


def blocks(b, R, first, dtype=torch.float32):
    """(E, V, before, out) of a block of b columns behind `first` others; V is a part of a larger matrix."""
    W, U, _ = problem(first + b, R, torch.float64)
    V = torch.zeros(first + b + 3, first + b + 3, dtype=torch.float64)
    V[2:-1, 2:-1] = U
    before = W[first:].flip(0)
    return W.to(dtype), V.to(dtype)[2:-1, 2:-1], before.to(dtype).contiguous(), torch.empty(b, R, dtype=dtype)


@pytest.mark.parametrize("first", [0, 1, 95, 96, 200])
@pytest.mark.parametrize("b, R", [*SHAPES, (130, 70), (129, 7)])
def test_columns_before_a_block(variant, b, R, first):
    """With and without what comes from further left; U is zero below its diagonal, nothing given is changed."""
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        E, V, added, out = blocks(b, R, first, dtype)
        for before in (None, added):
            want, given = torch.empty_like(out), [t.clone() for t in (E, V, added)]
            U, wanted = current(E, V, before, out), current_reference(E, V, before, want)
            assert (out - want).norm() <= limit * want.norm() and (U - wanted).norm() <= limit * wanted.norm()
            assert not U.tril(-1).any() and all(torch.equal(a, c) for a, c in zip(given, (E, V, added), strict=True))


def test_columns_before_a_block_err_at_most_twice_as_much_as_torch(variant):
    E, V, before, out = blocks(128, 300, 256)
    truth, plain = torch.empty_like(out, dtype=torch.float64), torch.empty_like(out)
    current_reference(E.double(), V.double(), before.double(), truth)
    current_reference(E, V, before, plain)
    current(E, V, before, out)
    assert (out - truth).norm() <= 2 * (plain - truth).norm()


def test_columns_before_a_block_have_the_same_bits_by_any_number_of_threads(variant, monkeypatch):
    E, V, before, out = blocks(64, 1000, 100)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        found.append((current(E, V, before, out), out.clone()))
    assert all(torch.equal(U, found[0][0]) and torch.equal(w, found[0][1]) for U, w in found)


@pytest.mark.parametrize("change, says", [
    (lambda E, V, before, out: (E.T, V, before, out), "E must be contiguous"),
    (lambda E, V, before, out: (E, V.T, before, out), "V must be"),
    (lambda E, V, before, out: (E, V[1:], before, out), "V must be"),
    (lambda E, V, before, out: (E, V.double(), before, out), "V must be"),
    (lambda E, V, before, out: (E, V, before[1:], out), "before must be"),
    (lambda E, V, before, out: (E, V, None, torch.empty(30, 6)), "out must be"),
    (lambda E, V, before, out: (E.half(), V.half(), before.half(), out.half()), "float32 or float64")])
def test_a_block_that_does_not_fit_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        current(*change(*blocks(8, 6, 4)))


def test_the_self_test_finds_a_wrong_library(variant):
    right = column_loop._library()
    assert column_loop._self_test(right) is None

    for part in ("column_loop_float32", "column_loop_float32_current", "column_loop_float64_current"):
        class Wrong:
            def __getattr__(self, name, part=part):
                def call(W, *rest):
                    failed = getattr(right, name)(W, *rest)
                    if name == part:
                        ctypes.cast(W, ctypes.POINTER(ctypes.c_int32))[5] ^= 1 << 30
                    return failed
                return call
        assert "relative error" in column_loop._self_test(Wrong())
