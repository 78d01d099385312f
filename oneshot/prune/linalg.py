"""Linear algebra on a layer's Gram matrix, shared by the solvers; each result is kept with its Statistics.

    G   E[x xᵀ], (C, C)
    V   upper triangular with V Vᵀ = G + λI
    D   E[(x_dense - x) xᵀ], (C, C): how far the pruned model's inputs x have moved from the dense model's
    s   sqrt(diag G), (C,): columns of W times s meet a Gram matrix of unit diagonal
"""

import torch

SCARCE = 0.03  # ε with fewer tokens than inputs


class NumericalError(ValueError):
    """A layer's statistics cannot be used: not finite, or singular beyond what damping mends."""


def require_finite(mean_sq):
    """Raise NumericalError unless E[x_j²] (C,) is finite: a NaN, an Inf or a square beyond the dtype came in."""
    if not torch.isfinite(mean_sq).all():
        raise NumericalError("its inputs are not finite")


def input_weighted(W, statistics):
    """|W_ij| · sqrt(E[x_j²]), (R, C): Wanda's score (arXiv 2306.11695, eq. 1). Needs `sum_sq` or `outer`.

    Raises NumericalError when the inputs are not finite.
    """
    require_finite(statistics.mean_sq)
    return W.abs() * statistics.mean_sq.sqrt().to(W)


def upper_factor(statistics, damping, dtype):
    """(V, dead, info): the factor of the damped Gram matrix and the inputs that were always zero (bool (C,)).

    λ = damping · mean(diag G) over the live inputs. A dead input gets that mean as its diagonal (SparseGPT's code puts
    1, which depends on the activations' scale); its column of W is the caller's to clear. When the factorisation fails,
    damping is raised tenfold up to 1, then all is tried again in float64; info says what was used.

    Raises NumericalError when nothing helps.
    """
    V, dead, info = statistics.derived(("upper_factor", damping, dtype),
                                       lambda: _upper_factor(statistics.G, damping, dtype))
    return V, dead, {**info, "warnings": list(info["warnings"])}  # each linear's record its own: callers take it apart


def towards_dense(W, statistics, share, damping=0.01):
    """(W*, warnings): the target W* = W + share · W D (G + λI)⁻¹, (R, C).

    As a layer for x it comes nearest to W x_dense at share 1.

    Solvers that approach W* instead of W on the pruned model's inputs make up for errors of the layers before. The
    whole way fits the noise of few samples; half of it is what helped. Needs `outer` and `cross`.

    Raises NumericalError as `upper_factor` does.
    """
    def shift():
        V, _, info = upper_factor(statistics, damping, W.dtype)
        Y = torch.linalg.solve_triangular(V.T, statistics.cross.to(W.dtype) / statistics.n, upper=False, left=False)
        return torch.linalg.solve_triangular(V, Y, upper=True, left=False), info["warnings"]

    moved, warnings = statistics.derived(("towards_dense", damping, W.dtype), shift)
    return torch.addmm(W, W, moved, alpha=share), [f"dense target: {w}" for w in warnings]


def _upper_factor(G, damping, dtype):
    diag = G.diagonal()
    require_finite(diag)  # |G_ij|² <= G_ii G_jj: the diagonal speaks for all
    dead = diag == 0
    mean = diag[~dead].mean() if not dead.all() else torch.ones((), dtype=G.dtype, device=G.device)

    def damped(used, precision):
        A = G.flip(0, 1).to(precision)  # A = L Lᵀ reversed in both directions is G = V Vᵀ
        A.diagonal().add_(used * mean).add_(dead.flip(0) * mean)
        return A

    L, info = damped_cholesky(damped, damping, dtype, dead)
    return L.flip(0, 1).to(dtype), dead, info


def damped_cholesky(matrix, damping, dtype, dead):
    """(L, what the record says of it) of matrix(damping, precision), symmetric, whose diagonal the damping raises.

    Where that fails the damping is raised tenfold up to 1, then all is tried again in float64; each is a warning.

    Raises NumericalError when nothing helps.
    """
    for precision in (dtype, torch.float64):
        for used in damping_ladder(damping):
            L, failed = torch.linalg.cholesky_ex(matrix(used, precision))
            if failed or not torch.isfinite(L.diagonal()).all():  # an overflow to Inf is no failure to LAPACK
                continue
            warnings = [f"damping raised from {damping:g} to {used:g}: the Gram matrix is nearly singular"
                        ] if used != damping else []
            warnings += ["factored in float64: float32 failed"] if precision != dtype else []
            return L, {"damping": used, "warnings": warnings} | ({"dead_inputs": int(dead.sum())} if dead.any() else {})
    raise NumericalError(f"its Gram matrix is not positive definite even with damping {used:g} in float64")


def damping_ladder(damping):
    """damping, then ten times as much each time, up to 1."""
    ladder = [damping]
    while ladder[-1] < 1:
        ladder.append(min(ladder[-1] * 10, 1.0) if ladder[-1] else 0.01)
    return ladder


def unit_gram(statistics, dtype):
    """(G, s, dead): the Gram matrix scaled to unit diagonal, G_ij / (s_i s_j) (C, C), undamped.

    A dead input (bool (C,)) has s = 1 and nothing but zeros in G. (W-Ŵ) G (W-Ŵ)ᵀ is the same in both scales. With n
    tokens, fewer than inputs, one may happen to be tiny in all of them: E[x_j²] then counts as n observations beside
    one of the median, s_j² = (n E[x_j²] + median) / (n + 1), and the diagonal is not quite 1.

    Raises NumericalError when the inputs are not finite.
    """
    few = statistics.n if statistics.n < statistics.C else 0
    return statistics.derived(("unit_gram", dtype), lambda: _unit_gram(statistics.G, few, dtype))


def _unit_gram(G, few, dtype):
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


def epsilon(statistics, dtype):
    """ε, what holds values where they are in the scale of `unit_gram`: moving them costs ε‖x - x_start‖².

    Without it, least squares on a singular G (few tokens) divides rounding errors by rounding errors: weights grow
    a million times, at no cost on the calibration tokens. 4 √eps is 0.0014 in float32, where it moves an optimum by
    less than 1 %. With fewer tokens than inputs more is needed: kept weights about as many as tokens fit their noise
    (at 48 tokens, 96 inputs, half kept, 0.0014 leaves refit at 1.5 times Wanda's error on other tokens, 0.03 at 0.6).
    """
    return SCARCE if statistics.n < statistics.C else 4 * torch.finfo(dtype).eps ** 0.5


def refit(W, W_hat, mask, statistics, steps, tolerance):
    """(Ŵ, steps taken): the kept weights moved towards their least-squares values by conjugate gradients.

    Each row minimises (w-ŵ) G (w-ŵ)ᵀ + ε‖(ŵ-ŵ_start) s‖² over its kept weights (`epsilon`); G's diagonal is the
    preconditioner (ALPS, arXiv 2406.07831, algorithm 2). All rows at once, 2·R·C² operations a step and for start and
    end. It ends with the first step that lowers this whole by less than `tolerance` of it. A row whose error has not
    fallen stays as it was.

    W, W_hat (R, C), W_hat zero where the mask is False; float32 or float64.
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
