"""`taylor` and `gradient` against their formulas in float64, for single weights and for whole columns."""

import pytest
import reference
import torch
from solving import case

from oneshot.calibrate.statistics import Gradient, Statistics
from oneshot.prune import solvers
from oneshot.prune.patterns import NM, Columns, Unstructured

R, C, BATCHES = 6, 24, 5
SCORES = {"taylor": reference.taylor_score, "gradient": reference.gradient_score}
PATTERNS = {
    "row": (Unstructured(0.5, "row"), lambda s: torch.stack([reference.remove_lowest(row, C // 2) for row in s])),
    "matrix": (Unstructured(0.25, "matrix"), lambda s: reference.remove_lowest(s, R * C // 4)),
    "2:4": (NM(2, 4), lambda s: reference.keep_n_of_m(s, 2, 4)),
    "columns": (Columns(10, 24), lambda s: reference.keep_columns(s, 10, 24, 1)),
    "units": (Columns(2, 4, 6), lambda s: reference.keep_columns(s, 2, 4, 6)),
    "segments": (Columns(1, 3, 4), lambda s: reference.keep_columns(s, 1, 3, 4)),
}


def problem(seed, dtype):
    """(W, the gradients of the batches, what a solver sees of them). The gradients differ in sign and size, so that
    neither score is the other, nor magnitude."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(R, C, generator=gen).to(dtype)
    gradients = [torch.randn(R, C, generator=gen).to(dtype) * scale for scale in (0.1, 3.0, 1.0, 0.5, 2.0)]
    seen = Gradient(sum(gradients) / BATCHES, sum(g.square() for g in gradients) / BATCHES)
    return W, gradients, Statistics(C, set()).with_gradient(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("method", SCORES)
def test_what_stays_has_the_highest_score(method, name, dtype):
    pattern, keep = PATTERNS[name]
    for seed in range(3):
        W, gradients, statistics = problem(seed, dtype)
        solution = solvers.solve(W, statistics, pattern, case(method).chain)
        wanted = keep(SCORES[method](W, gradients))
        assert torch.equal(solution.mask, wanted)
        assert torch.equal(solution.W_hat, reference.masked(W, wanted))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_two_and_magnitude_choose_differently(name):
    """Or the law above would say nothing of which score it is."""
    keep, chosen = PATTERNS[name][1], set()
    scores = [*SCORES.values(), lambda W, gradients: W.square()]
    for score in scores:
        masks = [keep(score(W, gradients)) for W, gradients, _ in (problem(s, torch.float64) for s in range(3))]
        chosen.add(tuple(torch.cat(masks).flatten().tolist()))
    assert len(chosen) == len(scores)


def test_columns_add_absolute_values():
    """Terms of opposite sign do not cancel: a column that matters in two rows is not taken for one that matters in
    none."""
    W = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
    statistics = Statistics(2, set()).with_gradient(Gradient(torch.ones(2, 2), torch.ones(2, 2)))
    for method in SCORES:
        assert solvers.solve(W, statistics, Columns(1, 2), case(method).chain).mask.tolist() == [[True, False]] * 2
