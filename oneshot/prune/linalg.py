"""Linear algebra on a layer's Gram matrix, shared by the solvers. Results are cached in the layer's Statistics.

    G   E[x xᵀ], (C, C), the Gram matrix of the inputs (the papers' Hessian up to a factor)
    V   upper triangular with V Vᵀ = G + λI
    D   E[(x_dense - x) xᵀ], (C, C): how far the pruned model's inputs x have moved from the dense model's
    s   sqrt(diag G), (C,): in the scale where W is multiplied by s, the Gram matrix has unit diagonal

W and W_hat (R, C) are float32 or float64, and results have their dtype.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..calibrate.statistics import Statistics
from . import cholesky

SCARCE = 0.03  # ε with fewer tokens than inputs


class NumericalError(ValueError):
    """A layer's statistics cannot be used: they are not finite, or singular beyond what damping can fix."""


def require_finite(mean_sq: torch.Tensor) -> None:
    """Raise NumericalError unless E[x_j²] (C,) is finite (no NaN, no Inf, no overflow of a square)."""
    if not torch.isfinite(mean_sq).all():
        raise NumericalError("its inputs are not finite")


def input_weighted(W: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """|W_ij| · sqrt(E[x_j²]), (R, C): Wanda's score (arXiv 2306.11695, eq. 1). Needs `sum_sq` or `outer`.

    Raises NumericalError when the inputs are not finite.
    """
    require_finite(statistics.mean_sq)
    return W.abs() * statistics.mean_sq.sqrt().to(W)


def upper_factor(statistics: Statistics, damping: float,
                 dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(V, dead, info): the factor V (C, C) of the damped Gram matrix, and which inputs were always zero (bool (C,)).

    λ = damping · mean(diag G) over the live inputs. A dead input gets that mean as its diagonal entry (SparseGPT's code
    uses 1, which depends on the scale of the activations); the caller has to clear its column of W. If the
    factorisation fails, the damping is raised tenfold up to 1, then all of this is repeated in float64; info, for the
    record, says what was used. Needs `outer`.

    Raises NumericalError when nothing helps.
    """
    V, dead, info = statistics.derived(("upper_factor", damping, dtype),
                                       lambda: _upper_factor(statistics.G, damping, dtype))
    return V, dead, {**info, "warnings": list(info["warnings"])}  # a copy per linear, as callers modify it


def towards_dense(W: torch.Tensor, statistics: Statistics, share: float,
                  damping: float = 0.01) -> tuple[torch.Tensor, list[str]]:
    """(W*, warnings): the target W* = W + share · W D (G + λI)⁻¹, (R, C).

    At share 1, W* x is the least-squares approximation of W x_dense. A solver that approximates W* instead of W on the
    pruned model's inputs compensates for errors of earlier layers. Share 1 overfits few samples; 0.5 worked best. Needs
    `outer` and `cross`.

    Raises NumericalError as `upper_factor` does.
    """
    def shift() -> tuple[torch.Tensor, list[str]]:
        V, _, info = upper_factor(statistics, damping, W.dtype)
        Y = torch.linalg.solve_triangular(V.T, statistics.cross.to(W.dtype) / statistics.n, upper=False, left=False)
        return torch.linalg.solve_triangular(V, Y, upper=True, left=False), info["warnings"]

    moved, warnings = statistics.derived(("towards_dense", damping, W.dtype), shift)
    return torch.addmm(W, W, moved, alpha=share), [f"dense target: {w}" for w in warnings]


def _upper_factor(G: torch.Tensor, damping: float,
                  dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """See `upper_factor`."""
    diag = G.diagonal()
    require_finite(diag)  # |G_ij|² <= G_ii G_jj, so the diagonal suffices
    dead = diag == 0
    mean = diag[~dead].mean() if not dead.all() else torch.ones((), dtype=G.dtype, device=G.device)

    def damped(used: float, precision: torch.dtype) -> torch.Tensor:
        A = G.flip(0, 1).to(precision)  # reversing rows and columns turns A = L Lᵀ into G = V Vᵀ
        A.diagonal().add_(used * mean).add_(dead.flip(0) * mean)
        return A

    L, info = damped_cholesky(damped, damping, dtype, dead)
    return L.flip(0, 1).to(dtype), dead, info


def damped_cholesky(matrix: Callable[[float, torch.dtype], torch.Tensor], damping: float, dtype: torch.dtype,
                    dead: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """(L, info): the lower Cholesky factor (C, C) of matrix(damping, precision), and plain values for the record.

    matrix: gives a symmetric matrix (C, C) whose diagonal grows with the damping. dtype: the precision to try first.
    dead: which inputs were always zero, bool (C,). On failure the damping is raised tenfold up to 1, then all of this
    is repeated in float64, with a warning for each.

    Raises NumericalError when nothing helps.
    """
    for precision in (dtype, torch.float64):
        for used in damping_ladder(damping):
            if (found := cholesky.factor(matrix(used, precision))) is None:
                continue
            warnings = [f"damping raised from {damping:g} to {used:g}: the Gram matrix is nearly singular"
                        ] if used != damping else []
            warnings += ["factored in float64: float32 failed"] if precision != dtype else []
            return found.L, {"damping": used, "warnings": warnings} | (
                {"dead_inputs": int(dead.sum())} if dead.any() else {})
    raise NumericalError(f"its Gram matrix is not positive definite even with damping {used:g} in float64")


def damping_ladder(damping: float) -> list[float]:
    """The dampings to try: `damping`, then ten times as much each time, up to 1."""
    ladder = [damping]
    while ladder[-1] < 1:
        ladder.append(min(ladder[-1] * 10, 1.0) if ladder[-1] else 0.01)
    return ladder


def unit_gram(statistics: Statistics, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(G, s, dead): the Gram matrix scaled to unit diagonal, G_ij / (s_i s_j) (C, C), undamped; s (C,); dead bool (C,).

    A dead input has s = 1 and only zeros in G. The error (W-Ŵ) G (W-Ŵ)ᵀ is the same in both scales. With n tokens and
    more than n inputs, an input may by chance be tiny for all tokens. Then s_j² = (n E[x_j²] + median) / (n + 1), as if
    the median over all inputs had been observed once more, and the diagonal is not exactly 1. Needs `outer`.

    Raises NumericalError when the inputs are not finite.
    """
    few = statistics.n if statistics.n < statistics.C else 0
    return statistics.derived(("unit_gram", dtype), lambda: _unit_gram(statistics.G, few, dtype))


def _unit_gram(G: torch.Tensor, few: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `unit_gram`. few: the number of tokens if it is smaller than the number of inputs, else 0."""
    diag = G.diagonal()
    require_finite(diag)
    dead = diag == 0
    size = diag.to(dtype)
    if few and not dead.all():
        s = (few * size + size[~dead].median()).div_(few + 1).sqrt_()
        return (G.to(dtype) / s).div_(s.unsqueeze(1)), s, dead
    s = size.sqrt().masked_fill_(dead, 1)
    G = G.to(dtype) / s
    G.div_(s.unsqueeze(1)).diagonal().copy_((~dead).to(dtype))  # exactly 1
    return G, s, dead


def epsilon(statistics: Statistics, dtype: torch.dtype) -> float:
    """ε, the weight of a proximal term in the scale of `unit_gram`: changing values costs an extra ε‖x - x_start‖².

    Without it, least squares on a singular G (few tokens) divides rounding errors by rounding errors, and weights grow
    a millionfold at no cost on the calibration tokens. In float32, 4 √eps is 0.0014 and moves an optimum by less than 1
    %. With fewer tokens than inputs ε must be larger, because as many kept weights as tokens can fit noise (48 tokens,
    96 inputs, half of them kept: on other tokens, refit's error is 1.5 times Wanda's with 0.0014, 0.6 times with 0.03).
    """
    return SCARCE if statistics.n < statistics.C else 4 * torch.finfo(dtype).eps ** 0.5


def refit(W: torch.Tensor, W_hat: torch.Tensor, mask: torch.Tensor, statistics: Statistics, steps: int,
          tolerance: float) -> tuple[torch.Tensor, int]:
    """(Ŵ, steps taken): the kept weights moved towards their least-squares values by conjugate gradients.

    Each row minimises (w-ŵ) G (w-ŵ)ᵀ + ε‖(ŵ-ŵ_start) s‖² over its kept weights (`epsilon`), with G's diagonal as the
    preconditioner (ALPS, arXiv 2406.07831, algorithm 2). All rows at once: 2·R·C² operations per step, and as many at
    the start and at the end. Stops after the first step that lowers the objective (summed over rows) by less than
    `tolerance` of it, or after `steps`. A row whose error has not fallen keeps its values. Needs `outer`.

    W, W_hat: (R, C). mask: bool (R, C); W_hat is zero where it is False.
    """
    (G, s, _), eps = unit_gram(statistics, W.dtype), epsilon(statistics, W.dtype)
    X = (W_hat * s).contiguous()
    D = (W * s).contiguous()
    start = D - X
    c = start @ G
    before = (start * c).sum(1)
    kept = mask.to(W.dtype)
    r = c.mul_(kept)  # the residual, minus half the gradient
    P, rr, whole, used = r.clone(), r.square().sum(1), before.sum().item(), 0
    while used < steps:
        GP = (P @ G).add_(P, alpha=eps)
        curvature = (P * GP).sum(1)
        a = torch.where(curvature > 0, rr / curvature, 0)
        X.addcmul_(P, a.unsqueeze(1))
        used += 1
        gained = (a * rr).sum().item()
        whole -= gained
        if not gained > tolerance * whole:
            break
        r.addcmul_(GP.mul_(kept), a.unsqueeze(1), value=-1)
        rr, last = r.square().sum(1), rr
        P.mul_(torch.where(last > 0, rr / last, 0).unsqueeze(1)).add_(r)
    D -= X
    better = ((D @ G).mul_(D).sum(1) < before).unsqueeze(1)
    return torch.where(better, X.div_(s), W_hat), used
