"""ALPS (arXiv 2406.07831): find mask and values together by the alternating direction method of multipliers (ADMM).

    G       E[x xᵀ] scaled to unit diagonal, (C, C); W is scaled with it
    D       the sparse weight, (R, C): zero off the mask
    B       its dense counterpart, held close to D by a penalty ρ ‖B - D‖² that grows
    U       V/ρ, the scaled multiplier of the constraint B = D
    Z       B + U

The paper's steps B = (W G - V + ρD)(G + ρI)⁻¹, D = top-k(B + V/ρ), V += ρ(B - D) become, since W G = W (G + ρI) - ρW,

    B = W - ρ (W - D + U)(G + ρI)⁻¹        D = Z on the mask, U = Z off it

with one Cholesky factorisation of G + ρI for each ρ, in the precision of W: ρ >= 0.1 with a unit diagonal keeps it
well-conditioned. Linears with the same inputs, and all patterns of `--shared-inputs`, share the factors. The paper uses
one eigendecomposition in float64 for all ρ. Its steps are cheaper, but it costs as much as two Cholesky steps at C =
64, seven at 512 and twelve at 1376 (R = 512, one CPU core), and gives no better masks.

ρ grows by a tenth each step until the mask settles (paper: by 10-30 % every third step). This takes 12 to 25 steps
instead of 35, with the same layer error to within 2 % (2.5 % with only twice as many tokens as inputs). G is undamped
(the paper's 1 % changes the error by less than 0.5 %). Finally the values on the mask are refitted. The start is D = W
on the mask of |W|, which in this scale is Wanda's score.

Operations per step, at least: C³/3 for the factor, 2·R·C² for the solve; then those of `linalg.refit`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from .. import cholesky, linalg
from ..patterns import Pattern, strength
from . import Solution

needs = frozenset({"outer"})
updates = True
SHARED = 2**30  # bytes of factors cached per Gram matrix


@dataclass(frozen=True)
class Config:
    rho: float = flag(0.1, "ρ, initial penalty; G has a unit diagonal")
    growth: float = flag(1.1, "factor by which the penalty grows each step; closer to 1: slower and better")
    steps: int = flag(100, "maximum number of steps")
    rest: float = flag(1e-3, "stop when less than this share of the kept weights changes")
    refit_steps: int = flag(10, "maximum number of conjugate gradient steps on the final mask")
    group = "matrix"

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"--alps.rho {self.rho}: must be positive")
        if not self.growth > 1:
            raise ValueError(f"--alps.growth {self.growth}: must be above 1")
        if self.steps < 1:
            raise ValueError(f"--alps.steps {self.steps}: must be at least 1")
        if not self.rest >= 0:
            raise ValueError(f"--alps.rest {self.rest}: must not be negative")
        if self.refit_steps < 0:
            raise ValueError(f"--alps.refit-steps {self.refit_steps}: must not be negative")


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Find mask and values.

    Raises NumericalError when G is not finite, or G + ρI is not positive definite even in float64.
    """
    _, s, dead = linalg.unit_gram(statistics, W.dtype)
    pattern = pattern.with_default_group(cfg.group)
    info = {"dead_inputs": int(dead.sum())} if dead.any() else {}
    scaled = (W * s).masked_fill_(dead, 0).contiguous()
    D, mask = admm(scaled, statistics, pattern, cfg, info)
    W_hat, info["refit_steps"] = linalg.refit(W, D.div_(s), mask, statistics, cfg.refit_steps, 1e-3)
    return Solution(W_hat, mask, info)


def admm(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config,
         info: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(D, mask), both (R, C), of the scaled problem; the steps taken, the last ρ and warnings are added to `info`."""
    G, _, _ = linalg.unit_gram(statistics, W.dtype)
    rho, mask, info["warnings"] = cfg.rho, pattern.keep(strength(W, pattern)), []
    D = W * mask
    kept, U = int(mask.count_nonzero()), torch.zeros_like(W)
    for step in range(1, cfg.steps + 1):
        if step * G.nbytes <= SHARED:  # all linears with these inputs, and all patterns, begin with the same ρ
            found, notes = statistics.derived(("alps", rho, G.dtype), lambda rho=rho: factor(G, rho))
        else:
            found, notes = factor(G, rho)
        info["warnings"] = info["warnings"] or list(notes)
        Z = found.solve((W - D).add_(U).to(found.L.dtype)).to(W.dtype)
        Z = Z.mul_(-rho).add_(W).add_(U)
        before, mask = mask, pattern.keep(strength(Z, pattern))
        D = Z * mask
        U = Z.sub_(D).div_(cfg.growth)  # V = ρU does not change when ρ grows
        if step > 1 and int((before != mask).count_nonzero()) <= 2 * cfg.rest * kept:  # a change is one out, one in
            break
        rho *= cfg.growth
    info |= {"steps": step, "rho": rho}
    return D, mask


def factor(G: torch.Tensor, rho: float) -> tuple[cholesky.Factor, list[str]]:
    """(the Cholesky factor (C, C) of G + ρI, warnings); in float64, with a warning, if rounding errors exceed ρ."""
    for dtype, notes in ((G.dtype, []), (torch.float64, ["factored in float64: float32 failed"])):
        A = G.to(dtype, copy=True)
        A.diagonal().add_(rho)
        if found := cholesky.factor(A):
            return found, notes
    raise linalg.NumericalError(f"its Gram matrix is not positive definite even with ρ = {rho:g} in float64")
