"""Parity of every solver with its naive float64 reference, in float64 and float32."""

import pytest
import reference as ref
import reference_iterated as iterated
import torch
from problems import layer, ref_pattern
from solving import case, resolved, run

from oneshot.prune.patterns import NM, Unstructured


def sparsegpt_reference(W, X, pattern, cfg):
    block = pattern.group if isinstance(pattern, Unstructured) else cfg.block_size
    return ref.sparsegpt(W, X, ref_pattern(pattern), cfg.damping, block)


REFERENCES = {
    "magnitude": lambda W, X, pattern, cfg: ref.magnitude(W, ref_pattern(pattern)),
    "wanda": lambda W, X, pattern, cfg: ref.wanda(W, X, ref_pattern(pattern)),
    "sparsegpt": sparsegpt_reference,
    "ria": lambda W, X, pattern, cfg: ref.ria(W, X, ref_pattern(pattern), a=cfg.a),
    "dsnot": lambda W, X, pattern, cfg: iterated.dsnot(W, X, ref_pattern(pattern), cycles=cfg.cycles,
                                                       threshold=cfg.threshold),
    "admm": lambda W, X, pattern, cfg: iterated.admm(W, X, ref_pattern(pattern), damping=cfg.damping, rho=cfg.rho,
                                                     iterations=cfg.iterations, mask_iterations=cfg.mask_iterations),
}
BLOCKS = [case("sparsegpt", block_size=b) for b in (128, 48, 7, 1)]
PARITY = [pytest.param(c, p, id=f"{c.name}{getattr(c.chain[0][1], 'block_size', '')}-{p}")
          for c in [case("magnitude"), case("wanda"), case("ria"), case("dsnot"), case("admm"), *BLOCKS]
          for p in (Unstructured(0.29), Unstructured(0.7), NM(2, 4), NM(3, 5), NM(4, 20))
          if c not in BLOCKS[1:] or isinstance(p, Unstructured)]


def clear_problem(reference, R, C, T, dead):
    """A layer on which no decision is a near-tie: the reference's mask survives errors of 1e-5."""
    for seed in range(50):
        W, X = (t.float() for t in layer(R, C, T, seed=seed, dead=dead))
        W_ref, keep = reference(W, X)
        noise = torch.randn(2, R, C, generator=torch.Generator().manual_seed(seed))
        if all(torch.equal(reference(W * (1 + 1e-5 * n), X)[1], keep) for n in noise):
            return W, X, W_ref, keep
    raise AssertionError("no clear problem in 50")


@pytest.mark.parametrize("c, pattern", PARITY)
@pytest.mark.parametrize("R, C, T, dead", [(1, 20, 30, ()), (4, 60, 200, (0, 31)),
                                           (3, 260, 100, (5, 128, 259)), (2, 140, 400, ())])
def test_parity(c, pattern, R, C, T, dead):
    """One block and several, ragged ones, dead inputs, fewer tokens than columns; in float64 and float32."""
    pattern, cfg = resolved(c, pattern), c.chain[0][1]
    W, X, W_ref, keep = clear_problem(lambda W, X: REFERENCES[c.name](W, X, pattern, cfg), R, C, T, dead)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        solution = run(c, W.to(dtype), X.to(dtype), pattern)
        assert torch.equal(solution.mask, keep)
        assert torch.linalg.vector_norm(solution.W_hat - W_ref) <= tolerance * torch.linalg.vector_norm(W_ref)
