"""Naive float64 references of the methods that change their mask step by step; see reference.py."""

import torch
from reference import exact_count, gram_of, keep_n_of_m, masked, refit, remove_lowest, wanda, wanda_score


def dsnot(W, X, pattern=0.5, *, cycles=50, threshold=0.1):
    """DSnoT (arXiv 2310.08915) from Wanda's mask: per row, swap until the expected error is `threshold` of the first.

    e = sum over removed j of c_j, c_j = w_j E[x_j]. Grow, of the weights removed at first and not yet considered,
    with c_j of e's sign, the one of largest |c_j| / Var(x_j); drop, of the weights kept ever since the start, for
    (n, m) those of its group, with c_j against e's sign, the one of lowest Wanda score. The swap is made if |e|
    falls; if it is not, the row stops, for (n, m) the next candidate has its turn. See `oneshot/prune/solvers/dsnot.py`
    on what the public code does otherwise.
    """
    W, X = W.double(), X.double()
    keep, score = wanda(W, X, pattern)[1], wanda_score(W, X)
    mean, var = X.mean(0), X.var(0, correction=0)
    for i in range(W.shape[0]):
        c = (W[i] * mean).tolist()
        grow, drop = {j for j in range(len(c)) if not keep[i, j]}, {j for j in range(len(c)) if keep[i, j]}
        first = e = sum(c[j] for j in grow)
        for _ in range(cycles):
            grown = max((j for j in grow if c[j] * e > 0), key=lambda j: abs(c[j]) / var[j].item(), default=None)
            if abs(e) <= threshold * abs(first) or grown is None:
                break
            partners = [j for j in drop if c[j] * e < 0
                        and (not isinstance(pattern, tuple) or j // pattern[1] == grown // pattern[1])]
            dropped = min(partners, key=lambda j: score[i, j].item(), default=None)
            grow.remove(grown)
            if dropped is not None and abs(e - c[grown] + c[dropped]) < abs(e):
                drop.remove(dropped)
                keep[i, grown], keep[i, dropped] = True, False
                e += c[dropped] - c[grown]
            elif not isinstance(pattern, tuple):
                break
    return masked(W, keep), keep


def admm(W, X=None, pattern=0.5, *, G=None, damping=0.1, rho=1.0, iterations=20, mask_iterations=15):
    """ADMM (arXiv 2401.02938), its formulas as they stand: in units where inputs have norm 1, G is damped for the
    right-hand side as well, and the mask is chosen from |B + U|, a share s - s(1 - t/15)^3 after t steps.

    (n, m): the n best of every m are safe, the lowest others go first. Dead inputs stay out of it; their weights
    are the first to go and keep their values otherwise.
    """
    W, G = W.double(), gram_of(X, G)
    live = G.diagonal() > 0
    d = torch.where(live, G.diagonal(), 1.0).sqrt()
    A = G / torch.outer(d, d) + damping * torch.eye(len(d), dtype=W.dtype)
    B = torch.where(live, W * d, 0.0)
    right, U, inverse = B @ A, torch.zeros_like(B), torch.linalg.inv(A + rho * torch.eye(len(d), dtype=W.dtype))
    sparsity = 1 - pattern[0] / pattern[1] if isinstance(pattern, tuple) else pattern
    for t in range(1, iterations + 1):
        if t <= mask_iterations:
            score, share = (B + U).abs(), sparsity - sparsity * (1 - t / mask_iterations) ** 3
            if isinstance(pattern, tuple):
                score = torch.where(keep_n_of_m(score, *pattern), torch.inf, score)
            keep = remove_lowest(score, exact_count(W.numel(), share))
        Z = masked(B + U, keep)
        U = U + B - Z
        B = (right + rho * (Z - U)) @ inverse
    return masked(torch.where(live, (B + U) / d, W), keep), keep


def alps(W, X=None, pattern=0.5, *, G=None, rho=0.1):
    """ALPS (arXiv 2406.07831), algorithm 1 with the authors' update of rho, then exact values on the mask (there: CG).

    In units where inputs have norm 1, one eigendecomposition G = Q diag(e) Q^T for all rho. Every 3rd step rho grows
    by 1.3, 1.2 or 1.1 as the support has changed since the last 3rd by at least 10 %, 0.5 % of k or one weight; without
    a change it is the end. Sparsity over the whole matrix. No dead inputs.
    """
    W, G = W.double(), gram_of(X, G)
    s = G.diagonal().sqrt()
    w, (e, Q) = W * s, torch.linalg.eigh(G / torch.outer(s, s))
    D, V, wg = w.clone(), torch.zeros_like(w), w @ Q @ e.diag() @ Q.T
    last, step = None, 0
    while True:
        B = (wg - V + rho * D) @ Q @ (1 / (e + rho)).diag() @ Q.T
        score = (B + V / rho).abs()
        keep = keep_n_of_m(score, *pattern) if isinstance(pattern, tuple) else remove_lowest(
            score, exact_count(score.numel(), pattern))
        D = masked(B + V / rho, keep)
        V, step = V + rho * (B - D), step + 1
        if step % 3 == 0:
            changed = int((keep != last).sum()) / int(keep.sum()) if last is not None else 1.0
            if not changed:
                return refit(W, keep, G), keep
            last, rho = keep, rho * (1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1)
