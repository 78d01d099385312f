"""Swaps: against least squares for every pair, and every possible support."""

import itertools
from itertools import combinations, product

import pytest
import reference as ref
import torch
from problems import layer, statistics_of
from solving import solved

from oneshot.prune import linalg, solvers
from oneshot.prune.patterns import NM, Unstructured
from oneshot.prune.solvers import Solution, swaps

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "row"), Unstructured(0.5, "matrix"), Unstructured(0.7, 10), NM(2, 4),
            NM(3, 5)]


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
    G, solution = ref.gram(X), solved("wanda+swaps", W, X, pattern, swaps__rounds=30)
    assert solution.info["swaps.exchanges"] > 4
    for w, keep in zip(W.split(1), solution.mask.split(1), strict=True):
        pairs = [(p, u) for p, u in product(keep[0].nonzero().flatten(), (~keep[0]).nonzero().flatten())
                 if not isinstance(pattern, NM) or p // 4 == u // 4]
        others = keep.repeat(len(pairs), 1)
        for other, (p, u) in zip(others, pairs, strict=True):
            other[p], other[u] = False, True
        assert best_errors(w, G, others).item() >= best_errors(w, G, keep).item() * (1 - 1e-6)


@pytest.mark.parametrize("solver", [name for name in solvers.names()["solver"]
                                    if "gradient" not in solvers.module(name).needs])
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
        error = row_errors(W, solved(f"{solver}+swaps+refit", W, X, pattern).W_hat, G)
        rows.append(error / least)
        layers.append(error.sum() / least.sum())
        if (error > 1.001 * least).any():
            W_hat = solved(f"{solver}+swaps+refit", W, X, pattern, swaps__beginnings=8).W_hat
            thorough.append(row_errors(W, W_hat, G) / least)
        if solver in ("magnitude", "wanda"):
            before.append(ref.layer_error(W, solved(f"{solver}+refit", W, X, pattern).W_hat, G) / least.sum())
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
    errors = [ref.layer_error(W, solved(m, W, X, pattern, **given).W_hat, G)
              for m, given in (("magnitude+refit", {}), ("magnitude+swaps+refit", {"swaps__candidates": 8}),
                               ("magnitude+swaps+refit", {"swaps__rounds": 30}))]
    assert errors[1] < 0.9 * errors[0] and errors[2] < errors[1]


def test_swaps_row_by_row_in_chunks(monkeypatch):
    """A layer too large for one chunk of tableaux gives the same as a small one."""
    W, X = layer(7, 40, 100)
    whole = solved("wanda+swaps", W, X, NM(2, 4))
    monkeypatch.setattr(swaps, "CHUNK", 2 * 65**2)
    parts = solved("wanda+swaps", W, X, NM(2, 4))
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
