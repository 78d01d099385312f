"""SparseSwaps (arXiv 2512.10922), with refitted values: exchange kept weights for removed ones while that pays.

    G       E[x xᵀ] scaled to unit diagonal, (C, C); W is scaled with it
    c       (w - ŵ) G, minus half the gradient of a row's error, (C,)
    p, u    a kept weight that may be removed, a removed weight that may be restored in its place
    Q       a row's candidates: q = `candidates` columns, K kept ones, then removed ones; the rest of ŵ is fixed
    A       Q's tableau, (q+1, q+1): G_QQ bordered by b, the c that results with all of Q zero, pivoted on the K kept:

              [ -H    T    y ]      H = (G_KK)⁻¹    T = H G_KU    y = H b_K, the best values of the kept
              [  Tᵀ   S    r ]      S = G_UU - G_UK T,            r = b_U - G_UK y, the c of the removed

The paper evaluates an exchange with all other weights fixed: removing p and giving u its best value changes the error
by ŵ_p² G_pp + 2 ŵ_p c_p - (c_u + ŵ_p G_up)² / G_uu. Here the kept weights in Q are refitted, and the change is exactly

    y_p²/H_pp - (r_u + T_pu y_p/H_pp)² / (S_uu + T_pu²/H_pp)

In each row the exchange with the lowest change is made, by two pivots, until no change is negative, not even summed
over up to `depth` exchanges in sequence. A restored weight and the kept ones in Q get their least-squares values.

Up to ε (`linalg.epsilon`) the change is exact, given the weights outside Q; if Q is the whole row (at most q/2 weights
kept and q/2 removed; N:M: C <= q), it is exact altogether. The choice of Q is a heuristic: by the paper's terms, the
kept weights that are cheapest to remove and the removed ones with most to gain; for N:M the whole groups in which these
two differ most. After that c is updated for all columns and Q chosen again, until no exchange within Q pays (N:M: nor
within any group). In a wider row, exchanges remain that would pay if all kept weights were refitted. More candidates
find them. Error after refit relative to wanda+refit, 64 rows, patterns 0.5 / 2:4:

    C      q = 32       q = 64       q = 128
    160    .90 / .92    .85 / .88    .81 / .83
    512    .97 / .96    .95 / .96    .89 / .93

(q = 128 takes three to five times as long as 64.) Preselecting by the paper's pairs, or trying further sets of 32 when
one has no exchange that pays, found nothing more: what pays requires the others to be refitted.

Compared with the best of all masks (C <= 10, 150 layers of 3 rows, after wanda, sparsegpt, alps and magnitude), 99 % of
the rows reach it; the worst row's error is 1.25 times as large, at depth 2 1.8 times; depth above 3 changes nothing.
With 8 `beginnings` every row reaches it: a row in which nothing pays also tries to begin with the second lowest change,
the third, and so on. In layers of realistic width this gains 0.1 to 0.5 % for two to three times the time; more
candidates are a better investment.

Exchanges stay within a row and within a group, so counts never change; with the groups "matrix" or a number of columns
they are within a row as well. Operations, at least: 2·R·C² per round. The work on the tableaux, a few times R·q²
numbers per exchange, is memory-bound and usually larger.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from .. import linalg
from ..patterns import NM, Columns, Dense, Pattern
from . import Solution

needs = frozenset({"outer"})
updates = True
CHUNK = 2**22  # numbers held in tableaux at a time
INF = float("inf")


@dataclass(frozen=True)
class Config:
    candidates: int = flag(64, "columns of a row among which exchanges are evaluated exactly")
    depth: int = flag(3, "number of exchanges that may pay only together; 1: each must pay by itself")
    beginnings: int = flag(1, "how many of the lowest exchanges are tried as the first of `depth`")
    rounds: int = flag(6, "how many times the candidates are chosen, at most")

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ValueError(f"--swaps.candidates {self.candidates}: must be at least 2")
        if self.depth < 1:
            raise ValueError(f"--swaps.depth {self.depth}: must be at least 1")
        if self.beginnings < 1:
            raise ValueError(f"--swaps.beginnings {self.beginnings}: must be at least 1")
        if self.rounds < 0:
            raise ValueError(f"--swaps.rounds {self.rounds}: must not be negative")


def refine(W: torch.Tensor, solution: Solution, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """A better mask with the same counts, and its values. info: the number of exchanges and of rounds.

    Raises NumericalError when the inputs are not finite.
    """
    (G, s, _), eps = linalg.unit_gram(statistics, W.dtype), linalg.epsilon(statistics, W.dtype)
    mask = solution.mask.clone(memory_format=torch.contiguous_format)
    if isinstance(pattern, Dense | Columns) or mask.all() or not mask.any():
        return Solution(solution.W_hat.clone(), mask)
    W_hat, _ = linalg.refit(W, solution.W_hat, mask, statistics, 5, 0.01)  # so that dropping is judged on good values
    X, target = (W_hat * s).contiguous(), (W * s).contiguous()
    c = (target - X) @ G
    before = ((target - X) * c).sum(1)
    problem = Problem(G, eps, pattern, width(pattern, W.shape[1]), cfg)
    w, n_rows = problem.width, max(1, CHUNK // (cfg.candidates + 1) ** 2)
    settled = torch.zeros(len(W), -(-W.shape[1] // w), dtype=torch.bool, device=W.device)
    rows, swaps, rounds = torch.arange(len(W), device=W.device), 0, 0
    while rounds < cfg.rounds and len(rows):
        rounds += 1
        for i in rows.split(n_rows):
            d, mask[i], settled[i], n = one_round(X[i], mask[i], c[i], settled[i], problem)
            X[i] += d
            c[i] -= d @ G
            swaps += int(n.sum())
        rows = rows[~settled[rows].all(1)]
    X.mul_(mask)  # removed weights are exactly zero
    D = target.sub_(X)
    better = ((D @ G).mul_(D).sum(1) < before).unsqueeze(1)  # recomputed, as c has accumulated rounding errors
    return Solution(torch.where(better, X.div_(s), W_hat), torch.where(better, mask, solution.mask),
                    {"exchanges": swaps, "rounds": rounds})


class Problem(NamedTuple):
    """What all rows have in common.

    G: (C, C), see above. eps: ε. pattern, cfg: as for `refine`. width: columns within which an exchange must stay.
    """

    G: torch.Tensor
    eps: float
    pattern: Pattern
    width: int
    cfg: Config


def width(pattern: Pattern, C: int) -> int:
    """The number of columns within which an exchange must stay."""
    if isinstance(pattern, NM):
        return pattern.m
    return min(pattern.group, C) if isinstance(pattern.group, int) else C


def one_round(X: torch.Tensor, mask: torch.Tensor, c: torch.Tensor, settled: torch.Tensor,
              problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose candidates and exchange among them, in each row: (change of X (R, C), mask, settled, exchanges (R,)).

    X (scaled ŵ), mask (bool), c: (R, C). settled: bool (R, groups), groups tried in vain since the row's last exchange.
    """
    G, eps, pattern, w, cfg = problem
    picked, Q, K, valid = candidates(X, mask, c, settled, problem)
    G_QQ = G[Q.unsqueeze(2), Q.unsqueeze(1)] * (valid.unsqueeze(2) & valid.unsqueeze(1))
    x, c_Q = X.gather(1, Q) * valid, c.gather(1, Q) * valid
    allowed = valid[:, :K].unsqueeze(2) & valid[:, K:].unsqueeze(1)
    if isinstance(pattern, NM):  # for other patterns Q is within one group
        allowed &= (Q[:, :K] // w).unsqueeze(2) == (Q[:, K:] // w).unsqueeze(1)
    values, order, n = exchange(x, c_Q, G_QQ, allowed, K, problem)
    for beginning in range(1, cfg.beginnings):
        i = (n == 0).nonzero().flatten()
        values[i], order[i], n[i] = exchange(x[i], c_Q[i], G_QQ[i], allowed[i], K, problem, beginning)
    d = torch.zeros_like(x).scatter_(1, order[:, :K], values) * valid - x
    fall = 2 * (d * c_Q).sum(1) - (d.unsqueeze(1) @ G_QQ @ d.unsqueeze(2)).flatten()
    # In exact arithmetic the error falls by at least ε‖d‖² (see tableau). If it falls by less, that is rounding error
    # of a nearly singular G, and the row stays as it is.
    better = (fall > eps / 2 * d.square().sum(1)).unsqueeze(1)
    n = n * better.squeeze(1)
    turned = torch.zeros_like(valid, dtype=torch.int8).scatter_(1, order[:, :K], 1)  # 1 restored, -1 removed
    turned[:, :K] -= 1
    turned *= valid & better
    settled = settled.scatter(1, picked, True) & (n == 0).unsqueeze(1)
    return (torch.zeros_like(X).scatter_add_(1, Q, d * better),
            mask.to(torch.int8).scatter_add_(1, Q, turned).bool(), settled, n)


def candidates(X: torch.Tensor, mask: torch.Tensor, c: torch.Tensor, settled: torch.Tensor,
               problem: Problem) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """(groups picked (R, g), columns Q (R, q) with the K kept first, K, valid bool (R, q)).

    Arguments as in `one_round`. An entry that is not valid is padding, because the row's group has too few kept or
    removed weights.
    """
    pattern, w, q = problem.pattern, problem.width, problem.cfg.candidates
    (R, C), n_g = X.shape, settled.shape[1]
    cost = torch.where(mask, X * (X + 2 * c), INF)  # of removing it
    gain = torch.where(mask, -INF, c * c)  # of restoring it with its best value
    rest = n_g * w - C
    cost, gain = pad(cost, (0, rest), value=INF).view(R, n_g, w), pad(gain, (0, rest), value=-INF).view(R, n_g, w)
    promise = (gain.amax(2) - cost.amin(2)).masked_fill_(settled, -INF)
    if isinstance(pattern, NM):
        picked = promise.topk(min(max(1, q // w), n_g), dim=1).indices
        Q = (picked.unsqueeze(2) * w + torch.arange(w, device=X.device)).flatten(1)
        kept = mask.gather(1, Q)
        return picked, Q.gather(1, (~kept).to(torch.int8).argsort(dim=1, stable=True)), len(picked[0]) * pattern.n, \
            torch.ones_like(kept)
    picked = promise.argmax(1, keepdim=True)
    one = picked.unsqueeze(2).expand(R, 1, w)
    K = min(q // 2, w)
    costs, p = cost.gather(1, one).squeeze(1).topk(K, dim=1, largest=False)
    gains, u = gain.gather(1, one).squeeze(1).topk(K, dim=1)
    valid = torch.cat([costs < INF, gains > -INF], dim=1)
    return picked, (torch.cat([p, u], dim=1) + picked * w) * valid, K, valid


def exchange(x: torch.Tensor, c: torch.Tensor, G: torch.Tensor, allowed: torch.Tensor, K: int, problem: Problem,
             beginning: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the best exchanges until none pays: (values (R, K), order (R, q), number of exchanges (R,)).

    values: of the kept weights. order: of the columns in Q, the kept first. x, c (R, q) and G (R, q, q) are restricted
    to Q. allowed: bool (R, K, q - K), which pairs may be exchanged. Up to depth - 1 exchanges that do not pay are made
    if a later one more than compensates for them; meanwhile none of them is reversed. The first exchange is the one of
    rank `beginning` (0: the lowest), all others are the lowest.
    """
    (R, q), depth, eps = x.shape, problem.cfg.depth, problem.eps
    A, rows = tableau(x, c, G, K, eps), torch.arange(R, device=x.device)
    values, order, n = A[:, :K, q].clone(), torch.arange(q, device=x.device).repeat(R, 1), torch.zeros_like(rows)
    alive, now, free, tried = rows, order.clone(), allowed, torch.zeros_like(rows)
    level = A[:, q, q].clone()  # -b_K H b_K, which is the error of `values` up to a constant
    numb = 10 * torch.finfo(x.dtype).eps
    for step in range(4 * q):  # many more than are ever needed
        rises = worth(A, K).masked_fill_(~free, INF).flatten(1)
        lowest, at = rises.kthvalue(min(beginning + 1, rises.shape[1])) if beginning and not step else rises.min(1)
        pays = A[:, q, q] + lowest < level * (1 + numb)
        go = pays | ((tried + 1 < depth) & (lowest < INF))
        if not go.all():
            A, now, at, alive, pays, tried, level = (t[go] for t in (A, now, at, alive, pays, tried, level))
            allowed, free = allowed[go], free[go]
        if not len(alive):
            break
        p, u, rows = at // (q - K), at % (q - K) + K, torch.arange(len(A), device=x.device)
        pivot(A, p, -1)
        pivot(A, u, 1)
        for weight in (A, A.transpose(1, 2), now):  # u takes p's place among the kept
            weight[rows, p], weight[rows, u] = weight[rows, u], weight[rows, p]
        if depth > 1:
            free = free.clone()
            free[rows, p], free[rows, :, u - K] = False, False
            free = torch.where(pays[:, None, None], allowed, free)
        tried += 1
        better = alive[pays]
        values[better], order[better] = A[pays, :K, q], now[pays]
        n[better] += tried[pays]
        tried = torch.where(pays, 0, tried)
        level = torch.where(pays, A[:, q, q], level)
    return values, order, n


def tableau(x: torch.Tensor, c: torch.Tensor, G: torch.Tensor, K: int, eps: float) -> torch.Tensor:
    """A (R, q+1, q+1), see above, for x, c (R, q) and G (R, q, q).

    A proximal term ε‖x_new - x‖² makes H exist even for a singular G; it cannot make the resulting error higher than
    before.
    """
    q = x.shape[1]
    N = pad(G, (0, 1, 0, 1))
    N.diagonal(dim1=1, dim2=2)[:, :q] += eps
    N[:, :q, q] = N[:, q, :q] = c + (N[:, :q, :q] @ x.unsqueeze(2)).squeeze(2)
    H = torch.cholesky_inverse(torch.linalg.cholesky_ex(N[:, :K, :K])[0])
    border = N[:, :K, K:]
    T = H @ border
    return torch.cat([torch.cat([-H, T], dim=2),
                      torch.cat([T.transpose(1, 2), N[:, K:, K:] - border.transpose(1, 2) @ T], dim=2)], dim=1)


def worth(A: torch.Tensor, K: int) -> torch.Tensor:
    """(R, K, q - K): by how much exchanging p for u would raise the error, for tableaux A (R, q+1, q+1)."""
    q = A.shape[1] - 1
    y, r = A[:, :K, q:], A[:, q:, K:q]
    d = A.diagonal(dim1=1, dim2=2)
    h, S = -d[:, :K].unsqueeze(2), d[:, K:q].unsqueeze(1)
    T = A[:, :K, K:q]
    return y * y / h - (r + T * (y / h)).square_() / (S + T * T / h)


def pivot(A: torch.Tensor, k: torch.Tensor, sign: int) -> None:
    """In place, in each row of A (R, q+1, q+1): column k (R,) of Q joins the kept (sign 1) or leaves them (-1)."""
    rows = torch.arange(len(A), device=A.device)
    column = A[rows, :, k]
    scaled = column / column[rows, k].unsqueeze(1)
    corner = -1 / column[rows, k]
    A.addcmul_(column.unsqueeze(2), scaled.unsqueeze(1), value=-1)
    scaled = sign * scaled
    scaled[rows, k] = corner
    A[rows, :, k] = A[rows, k] = scaled
