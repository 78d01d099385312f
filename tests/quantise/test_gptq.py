"""GPTQ and the joint pass against naive float64 references, and the laws of every quantiser."""

import json

import pytest
import reference_rounding as ref
import torch
from oneshot_kernels.cpu import column_loop
from problems import layer, statistics_of

from oneshot import quantise
from oneshot.prune.linalg import NumericalError
from oneshot.prune.patterns import NM, Dense, Unstructured
from oneshot.prune.solvers import Solution, sparsegpt
from oneshot.quantise import gptq, grids, joint, rtn
from oneshot.quantise.grids import Integers

F64 = {"rtol": 1e-8, "atol": 1e-10}


@pytest.fixture(params=["compiled", "torch"])
def loop(request, monkeypatch):
    """The column loop in C++ (where there is a compiler), and in torch."""
    if request.param == "torch":
        monkeypatch.setattr(column_loop, "available", lambda W: False)


def problem(R=6, C=96, T=300, seed=0, dead=(), pattern=None):
    """(W with its zeros, the kept ones, X)."""
    W, X = layer(R, C, T, seed=seed, dead=dead)
    kept = torch.ones_like(W, dtype=torch.bool) if pattern is None else pattern.keep(W.abs())
    return W * kept, kept, X


def rounded(name, W, kept, X, grid, **flags):
    module = quantise.module(name)
    statistics = statistics_of(X, {"outer"}, W.dtype) if module.needs else None
    return module.quantise(W, Solution(W, kept), statistics, grid, module.Config(**flags))


@pytest.mark.parametrize("pattern", [None, NM(2, 4), Unstructured(0.6, "row")], ids=str)
@pytest.mark.parametrize("text", ["int4:32", "int3:row", "int8", "int2:64"])
def test_gptq_is_the_papers(loop, text, pattern):
    grid = grids.parse(text)
    W, kept, X = problem(pattern=pattern, dead=(7,))
    got = sparsegpt.sweep(W, statistics_of(X, {"outer"}), Dense(), sparsegpt.Config(), kept, grid)
    want, _ = ref.gptq(W, X, kept, grid.bits, grid.width(96))
    torch.testing.assert_close(got.W_hat, want, **F64)
    plain = rounded("rtn", W, kept, X, grid).W_hat
    torch.testing.assert_close(plain, ref.rtn(W, kept, grid.bits, grid.width(96)), **F64)


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
@pytest.mark.parametrize("text", ["int4:32", "int3:row", "int4:64"])
def test_by_size_it_is_the_papers_on_sorted_columns(loop, text, pattern):
    """200 columns are two blocks; the scales are those of the columns' own groups."""
    grid = grids.parse(text)
    W, kept, X = problem(4, 200, 500, seed=3, pattern=pattern, dead=(7, 150))
    cfg = gptq.Config(search=False)
    got = gptq.by_size(W, Solution(W, kept), statistics_of(X, {"outer"}), grid, cfg)
    width, order = grid.width(200), X.square().mean(0).argsort(descending=True, stable=True)
    scales = torch.tensor([[ref.scale_of(row[j:j + width], grid.bits) for j in range(0, 200, width)] for row in W])
    each = scales.double().repeat_interleave(width, 1)[:, :200]
    want, _ = ref.gptq(W[:, order], X[:, order], kept[:, order], grid.bits, given=each[:, order])
    assert torch.equal(got.scales, scales.double())
    torch.testing.assert_close(got.W_hat[:, order], want, **F64)


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("text", ["int4:32", "int3:row", "int8", "int2:64"])
def test_the_joint_pass_is_the_papers(loop, text, n, m):
    """Groups of 32 in blocks of 128 columns, 200 columns in all: a block's later groups begin with changed weights."""
    grid = grids.parse(text)
    W, _, X = problem(4, 200, 500, seed=2, dead=(9,))
    got = sparsegpt.sweep(W, statistics_of(X, {"outer"}), NM(n, m), sparsegpt.Config(), grid=grid)
    want, keep = ref.gptq(W, X, None, grid.bits, grid.width(200), pattern=(n, m))
    assert torch.equal(got.mask, keep)
    torch.testing.assert_close(got.W_hat, want, **F64)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.7, "row"), Unstructured(0.5, 48)],
                         ids=repr)
def test_on_a_fine_grid_the_joint_result_is_the_pruned_one(loop, pattern):
    """With room above: what compensation adds to a group's largest weight is cut off on other grids."""
    class Fine(Integers):
        def scales(self, W):
            return torch.cat([8 * part.abs().amax(1, keepdim=True) / self.high for part in self.groups(W)], 1)

    W, _, X = problem(5, 200, 500, seed=1)
    statistics = statistics_of(X, {"outer"})
    plain = sparsegpt.prune(W, statistics, pattern, sparsegpt.Config())
    for group in (128, 32, None):
        found = joint.prune(W, statistics, pattern, sparsegpt.Config(), Fine(22, group))
        assert torch.equal(found.mask, plain.mask)
        assert (found.W_hat - plain.W_hat).norm() <= 1e-4 * plain.W_hat.norm()
    near = joint.prune(W, statistics, pattern, sparsegpt.Config(), grids.parse("int16"))
    assert (near.mask != plain.mask).float().mean() <= 0.01
    assert (near.W_hat - plain.W_hat).norm() <= 0.05 * plain.W_hat.norm()


@pytest.mark.parametrize("name", quantise.names())
@pytest.mark.parametrize("pattern", [None, NM(2, 4), Unstructured(0.5), Unstructured(0.9, "row")], ids=str)
@pytest.mark.parametrize("text", ["int8:row", "int4:64", "int4", "int2:32", "q8_0", "q4_0"])
def test_what_every_quantiser_keeps_to(name, text, pattern):
    grid = grids.parse(text)
    W, kept, X = problem(pattern=pattern, dead=(3,), seed=4)
    before, mask = W.clone(), kept.clone()
    found = rounded(name, W, kept, X, grid)
    assert torch.equal(W, before) and torch.equal(kept, mask) and torch.equal(found.mask, kept)
    assert not found.W_hat[~kept].any() and found.W_hat.dtype == W.dtype
    assert found.scales.shape == (6, -(-96 // grid.width(96))) and torch.equal(found.scales.half().to(W), found.scales)
    codes = grid.round(found.W_hat, found.scales)
    assert torch.equal(grid.value(codes, found.scales), found.W_hat)  # on the grid, and read back from it
    assert codes.min() >= grid.low and codes.max() <= grid.high
    json.dumps(found.info)
    again = rounded(name, W, kept, X, grid)
    assert torch.equal(again.W_hat, found.W_hat)


@pytest.mark.parametrize("pattern", [None, NM(2, 4), Unstructured(0.8)], ids=str)
@pytest.mark.parametrize("T", [40, 400])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_never_worse_than_rtn(bits, T, pattern):
    grid, gained = Integers(bits, 32), 0.0
    for seed in range(3):
        W, kept, X = problem(24, 96, T, seed=seed, pattern=pattern)
        D, plain = (W - rounded(name, W, kept, X, grid).W_hat for name in ("gptq", "rtn"))
        ours, theirs = ((X @ d.T).square().sum(0) for d in (D, plain))
        assert bool((ours <= theirs * (1 + 1e-9)).all())  # row by row
        gained += (ours.sum() / theirs.sum()).item() / 3
    assert gained < 0.9


@pytest.mark.parametrize("name", ["gptq", "joint"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_smaller_scales_pay_where_there_are_few_codes(name, bits):
    """Over some layers together, and never at the price of the law above."""
    found = {}
    for search in (True, False):
        for seed in range(4):
            W, kept, X = problem(32, 128, 400, seed=seed)
            statistics, grid = statistics_of(X, {"outer"}), Integers(bits, 64)
            pattern, mask = (Dense(), kept) if name == "gptq" else (NM(2, 4), None)
            D = W - sparsegpt.sweep(W, statistics, pattern, sparsegpt.Config(), mask, grid, search).W_hat
            found[search] = found.get(search, 0.0) + ((X @ D.T).square().sum() / (X @ W.T).square().sum()).item()
    assert found[True] < 0.98 * found[False]


def test_the_scale_that_is_found_is_the_best_of_those_tried():
    W, d = torch.randn(8, 5, dtype=torch.float64), torch.rand(8, 1, dtype=torch.float64) + 0.1
    grid = Integers(3, None)

    def cost(s):
        return ((grid.value(grid.round(W.T, s), s) - W.T) * d.T).square().sum(1)
    full = grid.scales(W.T)
    best = cost(sparsegpt.scales_of(grid, W, d).T)
    for share in (1.0, *sparsegpt.SMALLER):
        assert bool((best <= cost((full * share).half().double()) + 1e-12).all())


def test_the_largest_inputs_first_pays():
    """Behind 2:4 and alone, over some layers whose inputs are of different size."""
    for pattern in (None, NM(2, 4)):
        errors = [sum(((W - rounded("gptq", W, kept, X, Integers(3, 64), order=order).W_hat) @ X.T).square().sum()
                      / (W @ X.T).square().sum() for W, kept, X in (problem(32, 128, 400, seed, pattern=pattern)
                                                                    for seed in range(4))) for order in (True, False)]
        assert errors[0] < 0.95 * errors[1]


def test_rows_that_are_better_off_to_nearest_are_said():
    """Two bits, few tokens: some rows, and their scales are those of rounding to nearest."""
    W, kept, X = problem(200, 64, 100, seed=1)
    grid = Integers(2, 32)
    found, plain = rounded("gptq", W, kept, X, grid, order=False, search=False), rounded("rtn", W, kept, X, grid)
    same = (found.W_hat == plain.W_hat).all(1)
    assert 0 < found.info["rows_to_nearest"] <= int(same.sum()) < 200
    assert torch.equal(found.scales[same], plain.scales[same])


def test_an_input_that_was_always_zero_is_rounded_to_nearest():
    W, kept, X = problem(dead=(3, 50))
    grid = Integers(8, None)
    found = rounded("gptq", W, kept, X, grid)
    assert (found.W_hat - W)[:, [3, 50]].abs().max() <= 0.51 * found.scales.max()


@pytest.mark.parametrize("name", quantise.names())
def test_too_large_weights_are_an_error(name):
    W, kept, X = problem()
    with pytest.raises(NumericalError, match="too large for the float16 scales of int4"):
        rounded(name, W * 1e8, kept, X, Integers(4))


def test_groups_whose_scale_vanishes_are_said_by_rtn_and_survive_gptq():
    W, kept, X = problem()
    W[:, :32] *= 1e-12
    assert "6 groups became zero" in rounded("rtn", W, kept, X, Integers(4, 32)).info["warnings"][0]
    assert torch.isfinite(rounded("gptq", W, kept, X, Integers(4, 32)).W_hat).all()


def test_groups_that_cut_through_a_pattern_are_an_error():
    W, _, X = problem(3, 96)
    with pytest.raises(ValueError, match=r"--quantise int4:64.*3:6"):
        joint.prune(W, statistics_of(X, {"outer"}), NM(3, 6), sparsegpt.Config(), Integers(4, 64))
    joint.prune(W, statistics_of(X, {"outer"}), NM(3, 6), sparsegpt.Config(), Integers(4, None))


def test_a_negative_damping_is_refused():
    with pytest.raises(ValueError, match=r"--gptq\.damping -1"):
        gptq.Config(damping=-1)


def test_float32_errs_at_most_as_papers_do():
    """The same codes as in float64 but for the few that were halfway."""
    W, kept, X = problem(40, 256, 800, seed=6, pattern=NM(2, 4))
    want = rounded("gptq", W, kept, X, Integers(4, 64))
    got = rounded("gptq", W.float(), kept, X.float(), Integers(4, 64))
    error = [((W - W_hat.double()) @ X.T).square().sum() for W_hat in (got.W_hat, want.W_hat)]
    assert abs(error[0] / error[1] - 1) < 0.05


def test_rtn_needs_no_data():
    W, kept, _ = problem()
    assert rtn.quantise(W, Solution(W, kept), None, Integers(4), rtn.Config()).W_hat.any()
