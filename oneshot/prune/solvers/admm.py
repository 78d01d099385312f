"""ADMM (arXiv 2401.02938): find mask and weights together, alternating between least error and the pattern.

    G       E[x xᵀ], (C, C), the Gram matrix of the inputs
    d       sqrt(diag G), (C,); D = diag(d). Everything is computed in the scale in which every input has norm 1
    A       D⁻¹ G D⁻¹ + (δ + ρ) I, (C, C): the scaled Gram matrix, damped, plus the penalty
    B_0     W D, the dense weight in this scale; |B_0| is Wanda's score
    B       the weight of least error near Z - U, (R, C)
    Z       the projection of B + U on the pattern
    U       the scaled dual variable, the sum of all B - Z

    Z = (B + U) on the mask, 0 elsewhere;   U += B - Z;   B = B_0 + ρ (Z - U - B_0) A⁻¹

The last is the paper's B = ((G_s + δI) B_0 + ρ(Z - U)) A⁻¹, simplified. The first `mask_iterations` choose the mask
from |B + U|; after t of them the share s - s(1 - t/15)³ is removed, a cubic schedule that removes few weights in the
last steps. With N:M, the n best of every m stay throughout, and of the others the lowest are removed first, wherever
they are.

The public code (github.com/fmfi-compbio/admm-pruning, `lib/admm.py`) computes the cubic schedule, but if unstructured
removes the final share at once; and it treats any N:M as 2:4 (it sorts groups of four). Both follow the paper here. An
input that is always zero keeps its dense weights wherever the mask keeps them (in their code its score is 1e-8).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from ..linalg import damped_cholesky, require_finite
from ..patterns import NM, Columns, Pattern, Unstructured, strength
from . import Solution

needs = frozenset({"outer"})
updates = True


@dataclass(frozen=True)
class Config:
    damping: float = flag(0.1, "δ, added to the scaled Gram matrix's diagonal of ones")
    rho: float = flag(1.0, "ρ, penalty on the distance to the pattern")
    iterations: int = flag(20, "number of iterations")
    mask_iterations: int = flag(15, "in how many of them the mask is still chosen, sparser each time")
    group = "matrix"

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"--admm.damping {self.damping}: must not be negative")
        if not self.rho > 0:
            raise ValueError(f"--admm.rho {self.rho}: must be positive")
        if not 1 <= self.mask_iterations <= self.iterations:
            raise ValueError(f"--admm.mask-iterations {self.mask_iterations}: must be from 1 to --admm.iterations "
                             f"({self.iterations})")


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Find mask and weights. Cost, for any pattern: `iterations` products of (R, C) with (C, C).

    Raises NumericalError when G is not finite or not positive definite even at damping 1.
    """
    A_inv, d, dead, info = scaled_inverse(statistics, cfg.damping, cfg.rho, W.dtype)
    pattern = pattern.with_default_group(cfg.group)
    B_0 = (W * d).contiguous()  # so that the order of summation does not depend on W's memory layout
    B, U = B_0, torch.zeros_like(B_0)
    for t in range(1, cfg.iterations + 1):
        U = U + B  # from here to the subtraction of Z this is B + U
        if t <= cfg.mask_iterations:
            mask = gradual(pattern, strength(U, pattern), t / cfg.mask_iterations)
        Z = U * mask
        U -= Z
        B = torch.addmm(B_0, Z - U - B_0, A_inv, alpha=cfg.rho)
    W_hat = (B + U) / torch.where(dead, 1, d)
    W_hat[:, dead] = W[:, dead]
    return Solution(W_hat.mul_(mask), mask, info)


def gradual(pattern: Pattern, score: torch.Tensor, progress: float) -> torch.Tensor:
    """The mask, bool (R, C), after a share `progress` of the schedule; at 1 it is the pattern's own mask."""
    keep = pattern.keep(score)
    if progress == 1 or keep.all():
        return keep
    sparsity = pattern.sparsity * (1 - (1 - progress) ** 3)
    if isinstance(pattern, NM):
        return Unstructured(sparsity).keep(score.masked_fill(keep, torch.inf))
    if isinstance(pattern, Columns):
        return replace(pattern, kept=pattern.count - int(sparsity * pattern.count)).keep(score)
    return replace(pattern, sparsity=sparsity).keep(score)


def scaled_inverse(statistics: Statistics, damping: float, rho: float,
                   dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(A⁻¹ (C, C), d (C,), dead bool (C,), info), cached in the Statistics; a dead input has d = 0."""
    A_inv, d, dead, info = statistics.derived(("admm", damping, rho, dtype),
                                           lambda: _scaled_inverse(statistics.G, damping, rho, dtype))
    return A_inv, d, dead, {**info, "warnings": list(info["warnings"])}


def _scaled_inverse(G: torch.Tensor, damping: float, rho: float,
                    dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """See `scaled_inverse`."""
    require_finite(G.diagonal())
    d = G.diagonal().sqrt()
    dead = d == 0

    def damped(used: float, precision: torch.dtype) -> torch.Tensor:
        by = torch.where(dead, 1, d).to(precision)
        A = G.to(precision) / by
        A /= by.unsqueeze(1)
        A.diagonal().add_(used + rho)
        return A

    L, info = damped_cholesky(damped, damping, dtype, dead)
    return torch.cholesky_inverse(L).to(dtype), d.to(dtype), dead, info
