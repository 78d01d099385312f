"""SparseGPT with the compiled column loop and with the one in torch: the same mask, the same values to rounding."""


import pytest
import reference as ref
import torch
from oneshot_kernels.cpu import column_loop, library
from problems import layer
from solving import case, run
from variants import needs_compiler

from oneshot.pipeline import compress
from oneshot.prune.patterns import NM, Unstructured
from oneshot.prune.solvers import sparsegpt
from oneshot.settings import flags


@pytest.fixture
def torch_only(monkeypatch):
    """A function that makes the solver use its torch loop."""
    return lambda: monkeypatch.setattr(column_loop, "available", lambda W: False)


@needs_compiler
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 2), Unstructured(0.5), Unstructured(0.7, "row")],
                         ids=str)
def test_both_loops_agree(pattern, torch_only):
    W, X = (t.float() for t in layer(70, 192, 600, seed=3, dead=(7,)))
    assert column_loop.available(W)
    compiled = run(case("sparsegpt"), W, X, pattern)
    torch_only()
    plain = run(case("sparsegpt"), W, X, pattern)
    assert torch.equal(compiled.mask, plain.mask) and compiled.info == plain.info
    assert (compiled.W_hat - plain.W_hat).norm() <= 1e-5 * plain.W_hat.norm()


@needs_compiler
def test_errs_at_most_twice_as_much_as_torch(torch_only):
    """Against the naive float64 reference (tests/reference.py), with masks that are equal."""
    W, X = (t.float() for t in layer(40, 128, 400, seed=5))
    truth, keep = ref.sparsegpt(W, X, (2, 4), 0.01, 128)
    compiled = run(case("sparsegpt"), W, X, NM(2, 4))
    torch_only()
    plain = run(case("sparsegpt"), W, X, NM(2, 4))
    assert torch.equal(compiled.mask, keep) and torch.equal(plain.mask, keep)
    assert (compiled.W_hat - truth).norm() <= 2 * (plain.W_hat - truth).norm()


@needs_compiler
def test_the_compiled_loop_is_the_one_that_runs(monkeypatch):
    monkeypatch.setattr(sparsegpt, "solve_block", None)
    W, X = (t.float() for t in layer(8, 16, 40, seed=0))
    assert run(case("sparsegpt"), W, X, NM(2, 4)).mask.sum() == 64


def test_without_a_compiler_the_mask_is_the_same_and_there_is_one_warning(tmp_path, monkeypatch):
    W, X = (t.float() for t in layer(24, 64, 200, seed=1))
    want = run(case("sparsegpt"), W, X, NM(2, 4))
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path))
    library.forget()
    try:
        with pytest.warns(RuntimeWarning, match="plain torch") as seen:
            got = [run(case("sparsegpt"), W, X, NM(2, 4)) for _ in range(2)]
        assert len(seen) == 1 and all(torch.equal(g.mask, want.mask) for g in got)
    finally:
        library.forget()


def test_a_resumed_run_says_that_another_loop_computed_it(monkeypatch):
    """A compiler that is gone, or another processor: values differ in their last bits."""
    cfg = flags.build({"method": "sparsegpt", "pattern": "2:4", "device": "cpu"})
    here = compress.circumstances(cfg, None)["column_loop"]
    monkeypatch.setattr(column_loop, "_library", lambda: None)
    assert compress.circumstances(cfg, None)["column_loop"] == "torch" and here
    other = flags.build({"method": "wanda", "pattern": "2:4", "device": "cpu"})
    assert "column_loop" not in compress.circumstances(other, None)
