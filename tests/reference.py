"""Naive float64 references: the mathematics of the papers, one line per step, to judge the fast solvers by.

Slow on purpose, and independent of `oneshot`: nothing of it is imported here. Every function casts to float64
and leaves its arguments untouched. Beside it: reference_iterated.py, the methods that change a mask step by step, and
reference_rounding.py, those that round.

    W      (R, C)  dense weight, rows = outputs
    X      (T, C)  the linear's inputs, one token a row (padding already taken out); or `G=` in its place
    G      (C, C)  E[x x^T] = X^T X / T, a mean over tokens (public SparseGPT: sum times 2 / n_sequences)
    keep   (R, C)  bool, True = the weight stays (a kept weight may happen to be zero)
    pattern        a sparsity s in [0, 1], the share removed (0.7 or "0.7"); or (n, m): n of m are KEPT
    score          the lowest is removed first; among equal scores the lower (row-major) index first
    U      (C, C)  upper triangular with G^-1 = U^T U

The pruning functions return (W_hat, keep).
Sources: Wanda arXiv 2306.11695, github.com/locuslab/wanda; SparseGPT arXiv 2301.00774,
github.com/IST-DASLab/sparsegpt. Where the public code removes one weight too many per threshold
(`sort()[int(n * s)]` with `<=`), these references remove exactly floor(n * s).
"""

from decimal import Decimal
from fractions import Fraction
from itertools import combinations

import torch

# --- counting and choosing ----------------------------------------------------------------------------------


def exact_count(n, sparsity):
    """floor(n * sparsity) in decimal: 29 for n = 100 and sparsity 0.29, where binary floats give 28."""
    return int(Decimal(str(sparsity)) * n)


def remove_lowest(score, k):
    """keep mask of score's shape: the k lowest are removed, among equals the lower row-major index first."""
    values = score.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[order[:k]] = False
    return keep.reshape(score.shape)


def keep_n_of_m(score, n, m):
    """keep mask (R, C): in each row the n highest of every m neighbouring columns, from column 0 on."""
    R, C = score.shape
    if C % m:
        raise ValueError(f"{n}:{m} does not divide a width of {C}")
    keep = torch.ones(R, C, dtype=torch.bool)
    for i in range(R):
        for j in range(0, C, m):
            keep[i, j:j + m] = remove_lowest(score[i, j:j + m], m - n)
    return keep


def masked(W, keep):
    """W where kept, +0.0 elsewhere (a product with the mask would write -0.0)."""
    return torch.where(keep, W, torch.zeros_like(W))


def gram(X):
    """G (C, C) = E[x x^T] over the tokens X (T, C)."""
    X = X.double()
    return X.T @ X / X.shape[0]


def gram_of(X, G):
    """G as float64, whichever of the two is given."""
    if (X is None) == (G is None):
        raise ValueError("give either X or G")
    return gram(X) if G is None else G.double().clone()


# --- the methods --------------------------------------------------------------------------------------------


def magnitude(W, pattern):
    """Score |w|. Sparsity: floor(s * R * C) removed over the whole matrix (the baseline of both papers)."""
    W = W.double()
    if isinstance(pattern, tuple):
        keep = keep_n_of_m(W.abs(), *pattern)
    else:
        keep = remove_lowest(W.abs(), exact_count(W.numel(), pattern))
    return masked(W, keep), keep


def wanda_score(W, X=None, *, G=None):
    """(R, C) |w_ij| * sqrt(E[x_j^2]): arXiv 2306.11695, eq. 1 (there a sum over tokens: same order)."""
    norm = gram_of(X, G).diagonal().sqrt()
    return W.double().abs() * norm


def wanda(W, X=None, pattern=0.5, *, G=None):
    """Wanda: floor(s * C) removed in every output row; (n, m): within each group of m. No weight changes."""
    W, score = W.double(), wanda_score(W, X, G=G)
    if isinstance(pattern, tuple):
        keep = keep_n_of_m(score, *pattern)
    else:
        k = exact_count(W.shape[1], pattern)
        keep = torch.stack([remove_lowest(row, k) for row in score])
    return masked(W, keep), keep


def taylor_score(W, gradients):
    """|W_ij · E_b[g_ij]| (LLM-Pruner, arXiv 2305.11627): what the loss changes, to first order, without a weight.
    gradients: of the loss of each batch, all of W's shape."""
    mean = sum(g.double() for g in gradients) / len(gradients)
    return (W.double() * mean).abs()


def gradient_score(W, gradients):
    """|W_ij| · sqrt(E_b[g_ij^2]) (GBLM-Pruner without activations, arXiv 2311.04902)."""
    squares = sum(g.double() ** 2 for g in gradients) / len(gradients)
    return W.double().abs() * squares.sqrt()


def keep_columns(score, kept, count, size):
    """keep mask (R, C): of every `count` units of `size` neighbouring columns, the `kept` of highest summed score."""
    keep = torch.ones(score.shape, dtype=torch.bool)
    for j in range(0, score.shape[1], count * size):
        sums = torch.stack([score[:, j + u * size:j + (u + 1) * size].sum() for u in range(count)])
        for u, stays in enumerate(remove_lowest(sums, count - kept).tolist()):
            keep[:, j + u * size:j + (u + 1) * size] = stays
    return keep


def variant_keep(score, alpha):
    """keep mask (R, C) of Wanda's variant at one alpha (`return_given_alpha` in wanda's lib/prune.py).

    Row by row: sort the scores upwards; the longest head whose sum, its own last score included, is at most
    alpha * (sum of the row) sets the threshold: its last score. Every score <= threshold goes, so equal
    ones go together. No such head: nothing goes (the public code then indexes with -1 and fails).
    """
    keep = torch.ones(score.shape, dtype=torch.bool)
    for i in range(score.shape[0]):
        ordered = sorted(score[i].tolist())
        budget, total, threshold = alpha * sum(ordered), 0.0, None
        for value in ordered:
            total += value
            if total > budget:
                break
            threshold = value
        if threshold is not None:
            keep[i] = score[i] > threshold
    return keep


def wanda_variant(W, X=None, sparsity=0.5, *, G=None):
    """Wanda with `use_variant`: one alpha for all rows by bisection of [0, 0.8], as in its `prune_wanda`.

    Start: lo = 0, hi = 0.8, alpha = 0.4, mask at alpha. WHILE |reached - s| > 0.001 AND hi - lo >= 0.001:
    reached > s: hi = alpha, else lo = alpha; alpha = (lo + hi) / 2; mask at alpha. So at most ten steps
    (0.8 / 2^10 < 0.001), the mask is that of the LAST alpha tried (not the best), and the count is met
    to 0.001 of the weights only, or not at all if scores are few or s is more than alpha = 0.8 removes.
    `reached` is the share removed in the whole matrix, compared here as an exact fraction (there in float32).
    """
    W, score = W.double(), wanda_score(W, X, G=G)
    target = Fraction(str(sparsity))
    lo, hi, alpha = 0.0, 0.8, 0.4
    keep = variant_keep(score, alpha)
    while abs(share_removed(keep) - target) > Fraction("0.001") and hi - lo >= 0.001:
        if share_removed(keep) > target:
            hi = alpha
        else:
            lo = alpha
        alpha = (lo + hi) / 2
        keep = variant_keep(score, alpha)
    return masked(W, keep), keep


def share_removed(keep):
    """Exact share of weights removed, a Fraction."""
    return Fraction(int((~keep).sum()), keep.numel())


def dead_then_damped(W, G, damping):
    """(W, G) as SparseGPT uses them: dead inputs (G_jj = 0) first, then the damping.

    Dead: G_jj = mean of the live diagonal and W[:, j] = 0. Damping: G += damping * mean(diag G) * I.
    Deviation from the public code, which puts G_jj = 1: its ones enter the mean, so with small activations
    a few dead inputs swamp the damping of the live ones, and the result depends on the scale of G.
    """
    W, G = W.clone(), G.clone()
    live = G.diagonal()[G.diagonal() > 0]
    mean = live.mean() if len(live) else 1.0
    for j in range(G.shape[0]):
        if G[j, j] == 0:
            G[j, j] = mean
            W[:, j] = 0.0
    return W, G + damping * G.diagonal().mean() * torch.eye(G.shape[0], dtype=torch.float64)


def sparsegpt(W, X=None, pattern=0.5, damping=0.01, block=128, *, G=None):
    """SparseGPT, arXiv 2301.00774, algorithm 1, without its lazy batches: every column's update at once.

    Sparsity: at each block's first column choose over all rows x `block` columns of the weights as they are
    by then, exactly floor(n * s) of the block's n (a narrower last block has its own n). (n, m): choose at
    every column divisible by m, whatever the `block`. Score w^2 / U_jj^2, where U_jj^2 = [(G_{j:,j:})^-1]_00.
    """
    R, C = W.shape
    if isinstance(pattern, tuple) and C % pattern[1]:
        raise ValueError(f"{pattern[0]}:{pattern[1]} does not divide a width of {C}")
    W, G = dead_then_damped(W.double(), gram_of(X, G), damping)
    U = torch.linalg.cholesky(torch.linalg.inv(G), upper=True)
    keep = torch.ones(R, C, dtype=torch.bool)
    for j in range(C):
        if isinstance(pattern, tuple):
            n, m = pattern
            if j % m == 0:
                score = W[:, j:j + m] ** 2 / U.diagonal()[j:j + m] ** 2
                keep[:, j:j + m] = keep_n_of_m(score, n, m)
        elif j % block == 0:
            score = W[:, j:j + block] ** 2 / U.diagonal()[j:j + block] ** 2
            keep[:, j:j + block] = remove_lowest(score, exact_count(score.numel(), pattern))
        q = masked(W[:, j], keep[:, j])
        err = (W[:, j] - q) / U[j, j]
        W[:, j + 1:] -= torch.outer(err, U[j, j + 1:])
        W[:, j] = q
    return W, keep


def ria(W, X=None, pattern=0.5, *, G=None, a=0.5):
    """RIA (ICLR 2024): the share of its column plus that of its row, times the input's norm to the power a.

    Sparsity: floor(s * R * C) removed over the whole matrix. No zero row or column. No weight changes.
    """
    W = W.double()
    norm, score = gram_of(X, G).diagonal().sqrt(), torch.zeros_like(W)
    rows, columns = W.abs().sum(1), W.abs().sum(0)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            score[i, j] = (W[i, j].abs() / columns[j] + W[i, j].abs() / rows[i]) * norm[j] ** a
    if isinstance(pattern, tuple):
        keep = keep_n_of_m(score, *pattern)
    else:
        keep = remove_lowest(score, exact_count(W.numel(), pattern))
    return masked(W, keep), keep


# --- error, best values, best support -----------------------------------------------------------------------


def layer_error(W, W_hat, G):
    """tr((W - W_hat) G (W - W_hat)^T), a float: E |W x - W_hat x|^2, summed over outputs."""
    D = W.double() - W_hat.double()
    return torch.trace(D @ G.double() @ D.T).item()


def refit(W, mask, G, start=None, hold=None):
    """W_hat (R, C): on the support mask (R, C; True = kept) the exact least-squares values, zero elsewhere.

    Row by row min (w - v) G (w - v)^T over v supported on S, that is G_SS v_S = G_S: w. G is taken as given
    (not damped here). If G_SS is singular the values are not unique, the error is: the shortest v_S.
    With `start` (R, C) a move costs sum_j hold_j (v_j - start_j)^2 besides, and the values are unique.
    """
    W, G = W.double(), G.double()
    if start is None:
        start, hold = torch.zeros_like(W), torch.zeros_like(W[0])
    W_hat = torch.zeros_like(W)
    for i in range(W.shape[0]):
        S = mask[i].nonzero().flatten()
        if len(S):
            rhs = (G[S] @ W[i] + hold[S] * start[i, S]).unsqueeze(1)
            W_hat[i, S] = torch.linalg.lstsq((G + hold.diag())[S][:, S], rhs, driver="gelsd").solution.flatten()
    return W_hat


def best_mask_bruteforce(w, G, k):
    """(w_hat (C,), keep (C,), error): of one row w (C,), C <= 12, the best k weights to KEEP, refitted."""
    C = w.shape[0]
    if C > 12:
        raise ValueError(f"C = {C}: too many supports to try them all, 12 is the limit")
    W, best = w.double().reshape(1, C), None
    for support in combinations(range(C), k):
        keep = torch.zeros(1, C, dtype=torch.bool)
        keep[0, list(support)] = True
        W_hat = refit(W, keep, G)
        error = layer_error(W, W_hat, G)
        if best is None or error < best[2]:
            best = (W_hat[0], keep[0], error)
    return best
