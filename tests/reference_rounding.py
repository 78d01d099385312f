"""Naive float64 references of rounding to a grid; see reference.py."""

import torch
from reference import dead_then_damped, gram_of, keep_n_of_m, masked


def scale_of(w, bits):
    """One group's scale: max |w| / ((2^bits - 1) / 2), as a float16 number."""
    return torch.tensor(w.abs().max().item() / ((2**bits - 1) / 2)).half().double().item()


def nearest(w, scale, bits):
    """w rounded to scale * k with k from -2^(bits-1) to 2^(bits-1) - 1, ties to even."""
    return (w / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale if scale else 0.0 * w


def rtn(W, keep, bits, width):
    """W_hat (R, C): what is kept rounded to nearest, one scale for every row and `width` columns."""
    W_hat = masked(W.double(), keep)
    for i in range(W.shape[0]):
        for j in range(0, W.shape[1], width):
            part = W_hat[i, j:j + width]
            W_hat[i, j:j + width] = nearest(part, scale_of(part, bits), bits)
    return W_hat


def gptq(W, X=None, keep=None, bits=4, width=128, damping=0.01, *, pattern=None, G=None, given=None):
    """(W_hat, keep): GPTQ, arXiv 2210.17323, algorithm 1, every column's update at once. With a mask `keep` what is not
    kept becomes zero. Or with `pattern` (n, m) the mask is chosen on the way, as SparseGPT's section 3.5 has it.

    A row's scale for `width` columns is chosen at the first of them, from the weights as they are by then: of a given
    mask only the kept ones. Or `given` (R, C) is each weight's scale. Now and then a row's error is above `rtn`'s.
    """
    R, C = W.shape
    alive, G = dead_then_damped(W.double(), gram_of(X, G), damping)
    W = alive if keep is None else masked(W.double(), keep)
    chosen, keep = keep is None, torch.ones(R, C, dtype=torch.bool) if keep is None else keep
    U = torch.linalg.cholesky(torch.linalg.inv(G), upper=True)
    for j in range(C):
        if chosen and j % pattern[1] == 0:
            n, m = pattern
            score = W[:, j:j + m] ** 2 / U.diagonal()[j:j + m] ** 2
            keep[:, j:j + m] = keep_n_of_m(score, n, m)
        if given is not None:
            scales = given[:, j].tolist()
        elif j % width == 0:
            group = W[:, j:j + width] if chosen else masked(W[:, j:j + width], keep[:, j:j + width])
            scales = [scale_of(row, bits) for row in group]
        q = torch.stack([nearest(w, s, bits) for w, s in zip(W[:, j], scales, strict=True)])
        q = masked(q, keep[:, j])
        err = (W[:, j] - q) / U[j, j]
        W[:, j + 1:] -= torch.outer(err, U[j, j + 1:])
        W[:, j] = q
    return W, keep
