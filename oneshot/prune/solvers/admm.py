"""ADMM (arXiv 2401.02938): mask and weights found together, alternating between the least error and the pattern.

    d       sqrt(diag G), (C,): all is done in units in which every input has norm 1
    A       D⁻¹ G D⁻¹ + (δ + ρ) I, (C, C): the scaled Gram matrix, damped, plus the penalty
    B_0     W D, the dense weight in these units; |B_0| is Wanda's score
    B       the weight of least error near Z - U, (R, C)
    Z       the nearest weight that has the pattern
    U       what has been lost so far by forcing the pattern (the scaled dual)

    Z = (B + U) on the mask, 0 elsewhere;   U += B - Z;   B = B_0 + ρ (Z - U - B_0) A⁻¹

which is the paper's B = ((G_s + δI) B_0 + ρ(Z - U)) A⁻¹ with what cancels left out. The first `mask_iterations` choose
the mask from |B + U|, after t of them with the share s - s(1 - t/15)³ removed: cubic, few weights in the last steps.
N:M on the way: the n best of every m stay, and of the others the lowest go first, wherever they are.

The public code (github.com/fmfi-compbio/admm-pruning, `lib/admm.py`) computes the cubic schedule, but removes the final
share at once when unstructured; and any N:M is 2:4 there (it sorts groups of four). Both are as in the paper here. An
input that is always zero keeps its dense weights as far as the mask keeps them (there: score 1e-8).
"""

from dataclasses import dataclass, replace

import torch

from ...runtime.flag import flag
from ..linalg import damped_cholesky, require_finite
from ..patterns import NM, Unstructured
from . import Solution

needs = frozenset({"outer"})
updates = True


@dataclass(frozen=True)
class Config:
    damping: float = flag(0.1, "δ, added to the scaled Gram matrix's diagonal of ones")
    rho: float = flag(1.0, "ρ, penalty on the distance to the pattern")
    iterations: int = flag(20, "iterations in all")
    mask_iterations: int = flag(15, "of these, how many choose the mask, ever sparser")
    group = "matrix"

    def __post_init__(self):
        if not self.damping >= 0:
            raise ValueError(f"--admm.damping {self.damping}: must not be negative")
        if not self.rho > 0:
            raise ValueError(f"--admm.rho {self.rho}: must be positive")
        if not 1 <= self.mask_iterations <= self.iterations:
            raise ValueError(f"--admm.mask-iterations {self.mask_iterations}: must be from 1 to --admm.iterations "
                             f"({self.iterations})")


def prune(W, statistics, pattern, cfg):
    """Mask and weights; the same cost for every pattern: `iterations` products of (R, C) with (C, C).

    Raises NumericalError when G is not finite or not positive definite even at damping 1.
    """
    A_inv, d, dead, info = scaled_inverse(statistics, cfg.damping, cfg.rho, W.dtype)
    pattern = pattern.with_default_group(cfg.group)
    B_0 = (W * d).contiguous()  # one order of summation, however W is held
    B, U = B_0, torch.zeros_like(B_0)
    for t in range(1, cfg.iterations + 1):
        U = U + B  # here B + U
        if t <= cfg.mask_iterations:
            mask = gradual(pattern, U.abs(), t / cfg.mask_iterations)
        Z = U * mask
        U -= Z
        B = torch.addmm(B_0, Z - U - B_0, A_inv, alpha=cfg.rho)
    W_hat = (B + U) / torch.where(dead, 1, d)
    W_hat[:, dead] = W[:, dead]
    return Solution(W_hat.mul_(mask), mask, info)


def gradual(pattern, score, progress):
    """The mask after a share `progress` of the schedule; at 1 it is the pattern's own."""
    keep = pattern.keep(score)
    if progress == 1 or keep.all():
        return keep
    sparsity = pattern.sparsity * (1 - (1 - progress) ** 3)
    if isinstance(pattern, NM):
        return Unstructured(sparsity).keep(score.masked_fill(keep, torch.inf))
    return replace(pattern, sparsity=sparsity).keep(score)


def scaled_inverse(statistics, damping, rho, dtype):
    """(A⁻¹, d, dead, info), kept with the Statistics; a dead input has d = 0."""
    A_inv, d, dead, info = statistics.derived(("admm", damping, rho, dtype),
                                           lambda: _scaled_inverse(statistics.G, damping, rho, dtype))
    return A_inv, d, dead, {**info, "warnings": list(info["warnings"])}


def _scaled_inverse(G, damping, rho, dtype):
    require_finite(G.diagonal())
    d = G.diagonal().sqrt()
    dead = d == 0

    def damped(used, precision):
        by = torch.where(dead, 1, d).to(precision)
        A = G.to(precision) / by
        A /= by.unsqueeze(1)
        A.diagonal().add_(used + rho)
        return A

    L, info = damped_cholesky(damped, damping, dtype, dead)
    return torch.cholesky_inverse(L).to(dtype), d.to(dtype), dead, info
