"""ALPS (arXiv 2406.07831): mask and values together by the alternating direction method of multipliers (ADMM).

    G       E[x xᵀ] scaled to unit diagonal, (C, C); W is scaled with it
    D       the sparse weight, (R, C): zero off the mask
    B       its dense twin, held to D by a penalty ρ ‖B - D‖² that grows
    U       V/ρ, the scaled multiplier of B = D
    Z       B + U

The paper's steps B = (W G - V + ρD)(G + ρI)⁻¹, D = top-k(B + V/ρ), V += ρ(B - D) become, since W G = W (G + ρI) - ρW,

    B = W - ρ (W - D + U)(G + ρI)⁻¹        D = Z on the mask, U = Z off it

with one Cholesky factorisation of G + ρI for each ρ, in the precision of W: ρ >= 0.1 beside a unit diagonal keeps it
well-conditioned. Linears fed by the same inputs, and all patterns of `--shared-inputs`, share the factors. The paper's
float64 eigendecomposition, one for all ρ, has cheaper steps but costs as much itself as two Cholesky steps at C = 64,
seven at 512 and twelve at 1376 (R = 512, one CPU core), and gives no better masks.

ρ grows by a tenth each step until the mask rests (paper: every third step by 10-30 %): 12 to 25 steps instead of 35,
with the same layer error within 2 % (2.5 % with only twice as many tokens as inputs). G is undamped (the paper's 1 %
changes the error by less than 0.5 %). The values on the final mask are then refitted. Start: D is W on the mask of |W|,
which is Wanda's score.

Floor, operations a step: C³/3 for the factor, 2·R·C² for the solve; then those of `linalg.refit`.
"""

from dataclasses import dataclass

import torch

from ...runtime.flag import flag
from .. import linalg
from . import Solution

needs = frozenset({"outer"})
updates = True
SHARED = 2**30  # bytes of factors kept beside a Gram matrix


@dataclass(frozen=True)
class Config:
    rho: float = flag(0.1, "the penalty at the start; G has a unit diagonal")
    growth: float = flag(1.1, "the penalty grows by this factor each step; nearer to 1: "
                                                         "slower and better")
    steps: int = flag(100, "steps at most")
    rest: float = flag(1e-3, "end when less than this share of the kept weights changes")
    refit_steps: int = flag(10, "conjugate gradient steps at most on the final mask")
    group = "matrix"

    def __post_init__(self):
        if not self.rho > 0:
            raise ValueError(f"--alps.rho {self.rho}: must be positive")
        if not self.growth > 1:
            raise ValueError(f"--alps.growth {self.growth}: must be above 1")
        if self.steps < 1:
            raise ValueError(f"--alps.steps {self.steps}: must be at least 1")
        if not self.rest >= 0:
            raise ValueError(f"--alps.rest {self.rest}: must not be negative")
        if self.refit_steps < 0:
            raise ValueError(f"--alps.refit_steps {self.refit_steps}: must not be negative")


def prune(W, statistics, pattern, cfg):
    """Mask and values.

    Raises NumericalError when G is not finite or G + ρI not positive definite in float64.
    """
    _, s, dead = linalg.unit_gram(statistics, W.dtype)
    pattern = pattern.with_default_group(cfg.group)
    info = {"dead_inputs": int(dead.sum())} if dead.any() else {}
    scaled = (W * s).masked_fill_(dead, 0).contiguous()
    D, mask = admm(scaled, statistics, pattern, cfg, info)
    W_hat, info["refit_steps"] = linalg.refit(W, D.div_(s), mask, statistics, cfg.refit_steps, 1e-3)
    return Solution(W_hat, mask, info)


def admm(W, statistics, pattern, cfg, info):
    """(D, mask) for the scaled problem; steps taken, last ρ and warnings go into `info`."""
    G, _, _ = linalg.unit_gram(statistics, W.dtype)
    rho, mask, info["warnings"] = cfg.rho, pattern.keep(W.abs()), []
    D = W * mask
    kept, U = int(mask.count_nonzero()), torch.zeros_like(W)
    for step in range(1, cfg.steps + 1):
        if step * G.nbytes <= SHARED:  # every linear fed by these inputs, and every pattern, begins with the same ρ
            L, notes = statistics.derived(("alps", rho, G.dtype), lambda rho=rho: factor(G, rho))
        else:
            L, notes = factor(G, rho)
        info["warnings"] = info["warnings"] or list(notes)
        Z = torch.cholesky_solve((W - D).add_(U).T.to(L.dtype), L).T.to(W.dtype)
        Z = Z.mul_(-rho).add_(W).add_(U)
        before, mask = mask, pattern.keep(Z.abs())
        D = Z * mask
        U = Z.sub_(D).div_(cfg.growth)  # V stays while ρ grows
        if step > 1 and int((before != mask).count_nonzero()) <= 2 * cfg.rest * kept:  # each change is one out, one in
            break
        rho *= cfg.growth
    info |= {"steps": step, "rho": rho}
    return D, mask


def factor(G, rho):
    """(lower Cholesky factor of G + ρI, warnings); in float64, with a warning, should G's rounding errors exceed ρ."""
    for dtype, notes in ((G.dtype, []), (torch.float64, ["factored in float64: float32 failed"])):
        A = G.to(dtype, copy=True)
        A.diagonal().add_(rho)
        L, failed = torch.linalg.cholesky_ex(A)
        if not failed:
            return L, notes
    raise linalg.NumericalError(f"its Gram matrix is not positive definite even with ρ = {rho:g} in float64")
