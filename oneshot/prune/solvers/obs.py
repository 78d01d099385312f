"""OBS for columns: remove the units whose loss the others can make up for best, then give these their best values.

    G     E[x xᵀ] + λI, (C, C), λ = `damping` · mean diagonal;  P = G⁻¹ over the columns that are left
    g     a unit: columns of the weight that go together (patterns.Columns);  W the current, compensated weight
    Δ_g   tr(W_g (P_gg)⁻¹ W_gᵀ), the exact increase of the layer's error when g goes and all others are refitted

The units of lowest Δ go, a share `step` of those to be removed at a time, all of them jointly:

    W -= W_S (P_SS)⁻¹ P_S:        P -= P_:S (P_SS)⁻¹ P_S:

then the next are chosen by the new W and P (optimal brain surgeon for groups, as in ZipLM, arXiv 2302.04089). At the
end the kept columns K get their least-squares values from the dense weight W⁰, shrunk towards what they were:

    Ŵ_K = W⁰_K + W⁰_S G_SK (G_KK + μI)⁻¹

Plain least squares overfits where tokens are few (SmolLM2 with a third of its blocks gone: worse than no refit at all).
So μ is the one of RIDGES (shares of the mean diagonal) with the least error on the held-out windows, also "no change";
without any held out it is λ. `weigh` lets tokens count by 1 / ‖dense block's output‖²: in Llama-like models one token
with a norm of 26 000 against a median of 142 would decide everything else.

Other patterns: the mask of the same score for single weights, w² / P_jj, with values refitted on it (one-shot OBS).
"""

from dataclasses import dataclass

import torch

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from .. import cholesky, linalg
from ..patterns import Columns, Pattern
from . import Solution

needs = frozenset({"outer", "held"})
updates = True
RIDGES = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Config:
    damping: float = flag(0.01, "λ as a share of the mean of G's diagonal")
    step: float = flag(0.02, "share of the units to be removed that go at once")
    ridge: float = flag(0.0, "μ as a share of the mean diagonal; 0: chosen on held-out windows")
    refit: bool = flag(True, "give the kept columns their least-squares values")
    weigh: bool = flag(True, "count tokens by 1 / the squared norm of the block's output")
    group = "matrix"

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"--obs.damping {self.damping}: must be positive")
        if not 0 < self.step <= 1:
            raise ValueError(f"--obs.step {self.step}: must lie above 0, up to 1")
        if not self.ridge >= 0:
            raise ValueError(f"--obs.ridge {self.ridge}: must not be negative")


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Find mask and values. Raises NumericalError when G is not finite or not positive definite even at damping 1."""
    V, dead, info = linalg.upper_factor(statistics, cfg.damping, W.dtype)
    if not isinstance(pattern, Columns):
        return single_weights(W, statistics, pattern, V, dead, info)
    start = W.masked_fill(dead, 0)
    P = statistics.derived(("obs", cfg.damping, W.dtype), lambda: inverse(V))
    kept = remove(start.clone(), P.clone(), pattern, max(1, int((pattern.count - pattern.kept) * cfg.step)))
    kept = kept.repeat_interleave(pattern.size)
    mask = kept.unsqueeze(0).expand(W.shape[0], -1).contiguous()
    W_hat = W * mask
    if cfg.refit and kept.any() and not kept.all():
        change, more = refit(W, kept, statistics, cfg)
        W_hat[:, kept] += change
        info |= more
    return Solution(W_hat, mask, info)


def inverse(V: torch.Tensor) -> torch.Tensor:
    """(V Vᵀ)⁻¹ (C, C) for an upper triangular V."""
    eye = torch.eye(len(V), dtype=V.dtype, device=V.device)
    U = torch.linalg.solve_triangular(V, eye, upper=True)
    return U.T @ U


def remove(W: torch.Tensor, P: torch.Tensor, pattern: Columns, at_once: int,
           trace: list[float] | None = None) -> torch.Tensor:
    """bool (C / size,): which units are kept. W (R, C) and P (C, C) are changed in place, see above.

    at_once: how many of each `pattern.count` units go in a step. trace: gets each step's exact increase of the layer's
    error.
    """
    units, size = W.shape[1] // pattern.size, pattern.size
    kept = torch.ones(units, dtype=torch.bool, device=W.device)
    to_go = pattern.count - pattern.kept  # of each `count` units
    whole = P.clone()
    columns = torch.arange(W.shape[1], device=W.device).view(units, size)
    G = None
    while to_go:
        n = min(at_once, to_go)
        if not bool((P.diagonal() > 0).all()):  # rounding has eaten up what was left of it
            G = torch.linalg.inv(whole.double()) if G is None else G
            P.copy_(inverse_on(G, kept.repeat_interleave(size)))
        score = increases(W, P, columns).masked_fill_(~kept, torch.inf)
        gone = score.view(-1, pattern.count).argsort(dim=1, stable=True)[:, :n]
        gone = (gone + torch.arange(0, units, pattern.count, device=W.device).unsqueeze(1)).flatten()
        S = columns[gone].flatten()
        solved = torch.linalg.solve(P[S][:, S], P[S])
        if trace is not None:
            trace.append(float((torch.linalg.solve(P[S][:, S], W[:, S].T) * W[:, S].T).sum()))
        W.addmm_(W[:, S], solved, alpha=-1)
        P.addmm_(P[:, S], solved, alpha=-1)
        W[:, S] = 0
        P[S], P[:, S] = 0, 0
        P[S, S] = 1  # no unit that is gone is looked at again; its block stays invertible
        kept[gone] = False
        to_go -= n
    return kept


def inverse_on(G: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The inverse of G (C, C) over the columns `kept`, bool (C,), with the identity for all others."""
    P = torch.eye(len(G), dtype=G.dtype, device=G.device)
    P[kept.nonzero(), kept.nonzero()[:, 0]] = torch.linalg.inv(G[kept][:, kept])
    return P


def increases(W: torch.Tensor, P: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Δ (units,): the increase of the error when each unit alone goes. columns: int64 (units, size)."""
    if columns.shape[1] == 1:
        return W.square().sum(0) / P.diagonal()
    blocks = P[columns.unsqueeze(2), columns.unsqueeze(1)]  # (units, size, size)
    own = W.T[columns]  # (units, size, R)
    return (torch.linalg.solve(blocks, own) * own).sum((1, 2))


def refit(W: torch.Tensor, kept: torch.Tensor, statistics: Statistics,
          cfg: Config) -> tuple[torch.Tensor, dict[str, float]]:
    """(what is added to W_K (R, K), {"ridge": μ as a share; 0: nothing is added})."""
    share, apart = cfg.ridge or cfg.damping, statistics.apart
    if not cfg.ridge and apart is not None:
        train, held = (G.to(W.dtype) for G in apart)
        left = torch.zeros_like(W)
        best, share = error(W, kept, left[:, kept], held), 0.0
        for ridge in RIDGES:
            found = error(W, kept, ridge_change(W, kept, train, ridge), held)
            best, share = (found, ridge) if found < best else (best, share)
    change = ridge_change(W, kept, statistics.G.to(W.dtype), share) if share else torch.zeros_like(W[:, kept])
    return change, {"ridge": share}


def ridge_change(W: torch.Tensor, kept: torch.Tensor, G: torch.Tensor, ridge: float) -> torch.Tensor:
    """W_S G_SK (G_KK + μI)⁻¹, (R, K), μ = ridge · mean diag G. G: (C, C)."""
    A = G[kept][:, kept]
    A.diagonal().add_(ridge * G.diagonal().mean().clamp_min(torch.finfo(W.dtype).tiny))
    B = W[:, ~kept] @ G[~kept][:, kept]
    if found := cholesky.factor(A):
        return found.solve(B)
    return torch.linalg.lstsq(A.double(), B.T.double()).solution.T.to(W.dtype)


def error(W: torch.Tensor, kept: torch.Tensor, change: torch.Tensor, G: torch.Tensor) -> float:
    """tr(D G Dᵀ) for D = W - Ŵ, (R, C): the removed columns of W, and minus the change of the kept ones."""
    D = W.clone()
    D[:, kept] = -change
    return float(((D @ G) * D).sum())


def single_weights(W: torch.Tensor, statistics: Statistics, pattern: Pattern, V: torch.Tensor, dead: torch.Tensor,
                   info: dict) -> Solution:
    """The mask of w² / P_jj in any other pattern, refitted by conjugate gradients."""
    P = inverse(V).diagonal()
    mask = pattern.with_default_group(Config.group).keep(W.masked_fill(dead, 0).square() / P)
    start = W.masked_fill(dead, 0) * mask
    W_hat, info["refit_steps"] = linalg.refit(W, start, mask, statistics, 30, 1e-3)
    return Solution(W_hat, mask, info)
