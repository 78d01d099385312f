"""SparseGPT (arXiv 2301.00774): columns from left to right; a removed weight's error is made good by those right of it.

    G       E[x xᵀ] + λI, (C, C), the damped Gram matrix (the paper's Hessian H up to a factor)
    V       upper triangular, G = V Vᵀ
    U       V⁻¹, the paper's Cholesky factor of H⁻¹ = Uᵀ U
    E       W - Ŵ over the columns done, zero at the others, (R, C)
    b       mask block (paper: 128 columns), whose mask is chosen at once from the weights as they are then

The paper forms H⁻¹ and its Cholesky factor U, three factorisations and 7/3 C³ operations. U is not needed: a row's
error is ‖(w - ŵ) V‖², so with the columns left of block B done, the free weights take their best values when
(w - ŵ) V = 0 there, that is

    W_B = W⁰_B + (E V)_B V_BB⁻¹        and the score of w_j is (w_j V_jj)² = (w_j / U_jj)².

One Cholesky factorisation (C³/3) is left, and the compensation from earlier blocks is one product, read but not written
column by column. Inside a block U_BB = V_BB⁻¹ is the paper's own, and its column loop runs on it. W is held transposed:
columns are contiguous.
"""

from dataclasses import dataclass

import torch

from ...runtime.flag import flag
from ..linalg import upper_factor
from ..patterns import NM
from . import Solution

needs = frozenset({"outer"})
updates = True
SUB_BLOCK = 16  # columns updated one by one before the rest of the block sees them
SPAN = 4  # blocks that take the compensation of everything before them in one product


@dataclass(frozen=True)
class Config:
    damping: float = flag(0.01, "λ as a share of the mean of G's diagonal")
    block_size: int = flag(128, "b, columns whose mask is chosen at once (unstructured)")

    def __post_init__(self):
        if not self.damping >= 0:
            raise ValueError(f"--sparsegpt.damping {self.damping}: must not be negative")
        if self.block_size < 1:
            raise ValueError(f"--sparsegpt.block_size {self.block_size}: must be at least 1")

    @property
    def group(self):
        return self.block_size


def prune(W, statistics, pattern, cfg):
    """Mask and compensated weights.

    An unstructured pattern's group is the mask block (`block_size` unless the user names another number of columns);
    the groups "row" and "matrix" fix the whole mask from the dense weights before the first column.

    Raises NumericalError when G is not finite or not positive definite even at damping 1.
    """
    R, C = W.shape
    V, dead, info = upper_factor(statistics, cfg.damping, W.dtype)
    E = W.T.clone(memory_format=torch.contiguous_format)  # (C, R): W⁰ where a block is still to come
    E[dead] = 0
    d = V.diagonal().unsqueeze(1)
    mask = torch.empty(C, R, dtype=torch.bool, device=W.device)
    nm = pattern if isinstance(pattern, NM) else None
    pattern = pattern.with_default_group(cfg.group)
    if not nm and not isinstance(pattern.group, int):
        mask.copy_(keep(pattern, E * d))
    b = pattern.group if isinstance(pattern.group, int) else cfg.block_size
    b = -(-b // nm.m) * nm.m if nm else b  # a group of m never straddles two blocks
    W_hat = torch.empty_like(E)
    for i in range(0, C, b):
        B = slice(i, min(i + b, C))
        first = i - i % (SPAN * b)
        if i == first:  # what all blocks before this span compensate: one wide product, twice as fast
            S = slice(first, min(first + SPAN * b, C))
            before = V[:first, S].T @ E[:first] if first else E.new_zeros(S.stop - S.start, R)
        eye = torch.eye(B.stop - i, dtype=W.dtype, device=W.device)
        U = torch.linalg.solve_triangular(V[B, B], eye, upper=True)
        compensation = before[i - first : B.stop - first]
        if i > first:
            compensation.addmm_(V[first:i, B].T, E[first:i])
        W_B = torch.addmm(E[B], U.T, compensation, out=W_hat[B])
        if not nm and isinstance(pattern.group, int):
            mask[B] = keep(pattern, W_B * d[B])
        solve_block(W_B, U, mask[B], nm)
        E[B] -= W_B
    return Solution(W_hat.T, mask.T, info)


def keep(pattern, scaled):
    """Mask (b, R) of the largest |scaled| (b, R), counted in the weight's own orientation."""
    return pattern.keep(scaled.T.abs()).T


def solve_block(W, U, mask, nm):
    """The paper's column loop on one block, in place: W (b, R) becomes Ŵ. For N:M `mask` (b, R) is chosen on the way,
    at every m-th column from the weights as they are then.

    Two levels: a column updates only its sub-block; the rest of the block takes the sub-block's errors in one product.
    """
    b, m = len(W), nm.m if nm else 1
    d, rows = U.diagonal().unbind(0), W.unbind(0)
    removed = (~mask).to(W.dtype) if not nm else torch.empty_like(W)
    step = m * max(1, SUB_BLOCK // m)
    for s in range(0, b, step):
        t = min(s + step, b)
        errors = torch.empty_like(W[s:t])
        for j, err in zip(range(s, t), errors.unbind(0), strict=True):
            if nm and j % m == 0:
                mask[j : j + m] = nm.keep_of((W[j : j + m] / U.diagonal()[j : j + m, None]).abs_())
                removed[j : j + m] = ~mask[j : j + m]
            torch.mul(rows[j], removed[j], out=err)
            rows[j].sub_(err)
            err.div_(d[j])
            if j + 1 < t:
                W[j + 1 : t].addr_(U[j, j + 1 : t], err, alpha=-1)
        if t < b:
            W[t:].addmm_(U[s:t, t:].T, errors, alpha=-1)
