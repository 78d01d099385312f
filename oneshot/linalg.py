"""Linear algebra on a layer's Gram matrix, shared by the solvers; each result is kept with its Moments.

    G   E[x xᵀ], (C, C)
    V   upper triangular with V Vᵀ = G + λI
    D   E[(x_dense - x) xᵀ], (C, C): how far the pruned model's inputs x have moved from the dense model's
"""

import torch


class NumericalError(ValueError):
    """A layer's statistics cannot be used: not finite, or singular beyond what damping mends."""


def require_finite(mean_sq):
    """Raise NumericalError unless E[x_j²] (C,) is finite: a NaN, an Inf or a square beyond the dtype came in."""
    if not torch.isfinite(mean_sq).all():
        raise NumericalError("its inputs are not finite")


def input_weighted(W, moments):
    """|W_ij| · sqrt(E[x_j²]), (R, C): Wanda's score (arXiv 2306.11695, eq. 1). Needs `sum_sq` or `outer`.

    Raises NumericalError when the inputs are not finite.
    """
    require_finite(moments.mean_sq)
    return W.abs() * moments.mean_sq.sqrt().to(W)


def upper_factor(moments, damping, dtype):
    """(V, dead, info): the factor of the damped Gram matrix and the inputs that were always zero (bool (C,)).

    λ = damping · mean(diag G) over the live inputs. A dead input gets that mean as its diagonal (SparseGPT's code puts
    1, which depends on the activations' scale); its column of W is the caller's to clear. When the factorisation fails,
    damping is raised tenfold up to 1, then all is tried again in float64; info says what was used.

    Raises NumericalError when nothing helps.
    """
    V, dead, info = moments.derived(("upper_factor", damping, dtype), lambda: _upper_factor(moments.G, damping, dtype))
    return V, dead, {**info, "warnings": list(info["warnings"])}  # each linear's record its own: callers take it apart


def towards_dense(W, moments, share, damping=0.01):
    """The target W* = W + share · W D (G + λI)⁻¹, (R, C): as a layer for x it comes nearest to W x_dense at share 1.

    Solvers that approach W* instead of W on the pruned model's inputs make up for errors of the layers before. The
    whole way fits the noise of few samples; half of it is what helped. Needs `outer` and `cross`.

    Raises NumericalError as `upper_factor` does.
    """
    def shift():
        V, _, _ = upper_factor(moments, damping, W.dtype)
        Y = torch.linalg.solve_triangular(V.T, moments.cross.to(W.dtype) / moments.n, upper=False, left=False)
        return torch.linalg.solve_triangular(V, Y, upper=True, left=False)

    return torch.addmm(W, W, moments.derived(("towards_dense", damping, W.dtype), shift), alpha=share)


def _upper_factor(G, damping, dtype):
    diag = G.diagonal()
    require_finite(diag)  # |G_ij|² <= G_ii G_jj: the diagonal speaks for all
    dead = diag == 0
    mean = diag[~dead].mean() if not dead.all() else torch.ones((), dtype=G.dtype, device=G.device)
    for precision in (dtype, torch.float64):
        for used in damping_ladder(damping):
            A = G.flip(0, 1).to(precision)  # A = L Lᵀ reversed in both directions is G = V Vᵀ
            A.diagonal().add_(used * mean).add_(dead.flip(0) * mean)
            L, failed = torch.linalg.cholesky_ex(A)
            del A
            if not failed and torch.isfinite(L.diagonal()).all():  # an overflow to Inf is no failure to LAPACK
                return L.flip(0, 1).to(dtype), dead, factor_info(damping, used, precision, dtype, dead)
    raise NumericalError(f"its Gram matrix is not positive definite even with damping {used:g} in float64")


def damping_ladder(damping):
    """damping, then ten times as much each time, up to 1."""
    ladder = [damping]
    while ladder[-1] < 1:
        ladder.append(min(ladder[-1] * 10, 1.0) if ladder[-1] else 0.01)
    return ladder


def factor_info(asked, used, precision, dtype, dead):
    info = {"damping": used, "warnings": []}
    if dead.any():
        info["dead_inputs"] = int(dead.sum())
    if used != asked:
        info["warnings"].append(f"damping raised from {asked:g} to {used:g}: the Gram matrix is nearly singular")
    if precision != dtype:
        info["warnings"].append("factored in float64: float32 failed")
    return info
