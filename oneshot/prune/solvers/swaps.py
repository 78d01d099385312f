"""SparseSwaps (arXiv 2512.10922), with refitted values: exchange a kept weight for a removed one while that pays.

    G       E[x xᵀ] scaled to unit diagonal, (C, C); W is scaled with it
    c       (w - ŵ) G, a row's half gradient, (C,)
    p, u    a kept weight that may go, a removed one that may come back in its place
    Q       a row's candidates: q = `candidates` columns, K kept and then the removed ones; the rest of ŵ stands still
    A       Q's tableau, (q+1, q+1): G_QQ bordered by b, the half gradient with Q emptied, and pivoted on the K kept:

                  [ -H    T    y ]      H = (G_KK)⁻¹    T = H G_KU    y = H b_K, the best kept values
                  [  Tᵀ   S    r ]      S = G_UU - G_UK T,            r = b_U - G_UK y, what the removed ones miss

The paper weighs exchanges with all other weights held: dropping p and giving u its best value changes the error by
ŵ_p² G_pp + 2 ŵ_p c_p - (c_u + ŵ_p G_up)² / G_uu. Here the kept of Q move along, and the exchange is worth exactly

    y_p²/H_pp - (r_u + T_pu y_p/H_pp)² / (S_uu + T_pu²/H_pp)

of which the lowest of each row is taken, by two pivots, until none is negative, nor the lowest together with the one
or two that then are lowest (`depth`). A restored weight and the kept of Q get their least-squares values. Exact, up to
ε (`linalg.epsilon`): every exchange's worth, given the weights outside Q; given nothing, when Q holds the whole row
(up to q/2 weights kept and q/2 removed; N:M: C <= q). Not exact: which columns are in Q. These are the kept ones
cheapest to drop and the removed ones with the most to gain, by the paper's terms; for N:M the whole groups in which the
two are furthest apart. Then c is brought up to date for all columns and Q chosen anew, until the row's Q holds no
exchange (N:M: nor that of any group). In a wider row exchanges are left that would pay if all kept weights moved along.
More candidates find them; refitted, in shares of the error of wanda+refit, 64 rows, 0.5 / 2:4:

    C      q = 32       q = 64       q = 128
    160    .90 / .92    .85 / .88    .81 / .83
    512    .97 / .96    .95 / .96    .89 / .93

(q = 128 takes three to five times as long as 64.) A shortlist by the paper's pairs, or further sets of 32 where one
holds no exchange, found nothing more: what pays needs the others to move.

The best of all supports (tried: C <= 10, 150 layers of 3 rows, behind wanda, sparsegpt, alps and magnitude) is met by
99 rows in 100, the worst row errs 1.25 times as much, at depth 2 1.8 times; more depth than 3 changes nothing. With 8
`beginnings` every row meets it: one in which no exchange pays begins with the second lowest, the third ... as well. In
layers with real widths this gains 0.1 to 0.5 % for two to three times the time; more candidates are the better buy.

Exchanges stay in their row and group, so the counts stay; for the groups "matrix" and a number of columns they are
those of a row. Floor: 2·R·C² operations a round; the tableaux' work, R·q² numbers a few times over for each exchange,
is bound by memory and mostly larger.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from ...runtime.flag import flag
from .. import linalg
from ..patterns import NM, Dense, Pattern
from . import Solution

needs = frozenset({"outer"})
updates = True
CHUNK = 2**22  # numbers in the tableaux at once
INF = float("inf")


@dataclass(frozen=True)
class Config:
    candidates: int = flag(64, "columns of a row among which exchanges are weighed exactly")
    depth: int = flag(3, "exchanges that may pay together only; 1: each must pay by itself")
    beginnings: int = flag(1, "the lowest exchanges that are tried as the first of `depth`")
    rounds: int = flag(6, "times that the candidates are chosen anew, at most")

    def __post_init__(self):
        if self.candidates < 2:
            raise ValueError(f"--swaps.candidates {self.candidates}: must be at least 2")
        if self.depth < 1:
            raise ValueError(f"--swaps.depth {self.depth}: must be at least 1")
        if self.beginnings < 1:
            raise ValueError(f"--swaps.beginnings {self.beginnings}: must be at least 1")
        if self.rounds < 0:
            raise ValueError(f"--swaps.rounds {self.rounds}: must not be negative")


def refine(W, solution, statistics, pattern, cfg):
    """Another mask with the same counts, and values.

    Raises NumericalError when the inputs are not finite.
    """
    (G, s, _), eps = linalg.unit_gram(statistics, W.dtype), linalg.epsilon(statistics, W.dtype)
    mask = solution.mask.clone(memory_format=torch.contiguous_format)
    if isinstance(pattern, Dense) or mask.all() or not mask.any():
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
    X.mul_(mask)  # what was dropped is exactly zero
    D = target.sub_(X)
    better = ((D @ G).mul_(D).sum(1) < before).unsqueeze(1)  # from scratch: c has gathered rounding errors
    return Solution(torch.where(better, X.div_(s), W_hat), torch.where(better, mask, solution.mask),
                    {"exchanges": swaps, "rounds": rounds})


class Problem(NamedTuple):
    """What all rows have in common. width: columns within which an exchange must stay."""

    G: torch.Tensor
    eps: float
    pattern: Pattern
    width: int
    cfg: Config


def width(pattern, C):
    """Columns within which an exchange must stay."""
    if isinstance(pattern, NM):
        return pattern.m
    return min(pattern.group, C) if isinstance(pattern.group, int) else C


def one_round(X, mask, c, settled, problem):
    """Choose candidates and exchange among them, each row for itself: (change of X, mask, settled, exchanges (R,)).

    settled: (R, groups), looked at without success since the row's last exchange.
    """
    G, eps, pattern, w, cfg = problem
    picked, Q, K, valid = candidates(X, mask, c, settled, problem)
    G_QQ = G[Q.unsqueeze(2), Q.unsqueeze(1)] * (valid.unsqueeze(2) & valid.unsqueeze(1))
    x, c_Q = X.gather(1, Q) * valid, c.gather(1, Q) * valid
    allowed = valid[:, :K].unsqueeze(2) & valid[:, K:].unsqueeze(1)
    if isinstance(pattern, NM):  # in all other cases Q lies within one group
        allowed &= (Q[:, :K] // w).unsqueeze(2) == (Q[:, K:] // w).unsqueeze(1)
    values, order, n = exchange(x, c_Q, G_QQ, allowed, K, problem)
    for beginning in range(1, cfg.beginnings):
        i = (n == 0).nonzero().flatten()
        values[i], order[i], n[i] = exchange(x[i], c_Q[i], G_QQ[i], allowed[i], K, problem, beginning)
    d = torch.zeros_like(x).scatter_(1, order[:, :K], values) * valid - x
    fall = 2 * (d * c_Q).sum(1) - (d.unsqueeze(1) @ G_QQ @ d.unsqueeze(2)).flatten()
    # exactly, the fall is at least ε‖d‖² (see tableau); less is rounding errors of a nearly singular G: the row stays
    better = (fall > eps / 2 * d.square().sum(1)).unsqueeze(1)
    n = n * better.squeeze(1)
    turned = torch.zeros_like(valid, dtype=torch.int8).scatter_(1, order[:, :K], 1)  # 1 came, -1 went
    turned[:, :K] -= 1
    turned *= valid & better
    settled = settled.scatter(1, picked, True) & (n == 0).unsqueeze(1)
    return (torch.zeros_like(X).scatter_add_(1, Q, d * better),
            mask.to(torch.int8).scatter_add_(1, Q, turned).bool(), settled, n)


def candidates(X, mask, c, settled, problem):
    """(groups picked (R, g), Q (R, q) with the kept first, K, valid (R, q)).

    Not valid: filled up, because the row's group has fewer kept or removed weights; its index means nothing.
    """
    pattern, w, q = problem.pattern, problem.width, problem.cfg.candidates
    (R, C), n_g = X.shape, settled.shape[1]
    cost = torch.where(mask, X * (X + 2 * c), INF)  # of dropping it
    gain = torch.where(mask, -INF, c * c)  # of its best value
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


def exchange(x, c, G, allowed, K, problem, beginning=0):
    """Best exchanges until none pays: (values of the kept (R, K), order of Q, kept first (R, q), exchanges (R,)).

    x, c (R, q) and G (R, q, q) belong to Q; allowed (R, K, q - K) says which pairs may be exchanged. Up to depth - 1
    exchanges that do not pay are tried on the way to one that makes good for them; none of them is undone on that way.
    The first exchange of all is the lowest but `beginning`, each other the lowest.
    """
    (R, q), depth, eps = x.shape, problem.cfg.depth, problem.eps
    A, rows = tableau(x, c, G, K, eps), torch.arange(R, device=x.device)
    values, order, n = A[:, :K, q].clone(), torch.arange(q, device=x.device).repeat(R, 1), torch.zeros_like(rows)
    alive, now, free, tried = rows, order.clone(), allowed, torch.zeros_like(rows)
    level = A[:, q, q].clone()  # -b_K H b_K, the error up to a constant: of what is in `values`
    numb = 10 * torch.finfo(x.dtype).eps
    for step in range(4 * q):  # far more than ever needed
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


def tableau(x, c, G, K, eps):
    """A (R, q+1, q+1), see above. Values are held to where they are by ε‖x_new - x‖²: H exists for a singular G, too,
    and the error of what comes out is no higher for it."""
    q = x.shape[1]
    N = pad(G, (0, 1, 0, 1))
    N.diagonal(dim1=1, dim2=2)[:, :q] += eps
    N[:, :q, q] = N[:, q, :q] = c + (N[:, :q, :q] @ x.unsqueeze(2)).squeeze(2)
    H = torch.cholesky_inverse(torch.linalg.cholesky_ex(N[:, :K, :K])[0])
    border = N[:, :K, K:]
    T = H @ border
    return torch.cat([torch.cat([-H, T], dim=2),
                      torch.cat([T.transpose(1, 2), N[:, K:, K:] - border.transpose(1, 2) @ T], dim=2)], dim=1)


def worth(A, K):
    """(R, K, q - K): by how much exchanging p for u raises the error."""
    q = A.shape[1] - 1
    y, r = A[:, :K, q:], A[:, q:, K:q]
    d = A.diagonal(dim1=1, dim2=2)
    h, S = -d[:, :K].unsqueeze(2), d[:, K:q].unsqueeze(1)
    T = A[:, :K, K:q]
    return y * y / h - (r + T * (y / h)).square_() / (S + T * T / h)


def pivot(A, k, sign):
    """Row by row, in place: column k (R,) of Q enters the kept (sign 1) or leaves them (-1)."""
    rows = torch.arange(len(A), device=A.device)
    column = A[rows, :, k]
    scaled = column / column[rows, k].unsqueeze(1)
    corner = -1 / column[rows, k]
    A.addcmul_(column.unsqueeze(2), scaled.unsqueeze(1), value=-1)
    scaled = sign * scaled
    scaled[rows, k] = corner
    A[rows, :, k] = A[rows, k] = scaled
