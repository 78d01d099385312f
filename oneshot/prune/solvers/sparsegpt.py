"""SparseGPT (arXiv 2301.00774): prune columns from left to right; those to the right compensate for removed weights.

    G       E[x xᵀ] + λI, (C, C), the damped Gram matrix (the paper's Hessian H up to a factor)
    V       upper triangular, G = V Vᵀ
    U       V⁻¹, the paper's Cholesky factor of H⁻¹ = Uᵀ U
    E       W - Ŵ for the columns that are done, zero for the others, (R, C)
    b       width of a mask block (paper: 128 columns), whose mask is chosen at once from its current weights

The paper computes H⁻¹ and its Cholesky factor U, which takes three factorisations and 7/3 C³ operations. U is not
needed: a row's error is ‖(w - ŵ) V‖², so when the columns left of mask block B are done, the free weights have their
best values if (w - ŵ) V = 0 there, that is

    W_B = W⁰_B + (E V)_B V_BB⁻¹        and the score of w_j is (w_j V_jj)² = (w_j / U_jj)².

This leaves one Cholesky factorisation (C³/3), and the compensation for all earlier blocks is a single matrix product.
Within a block U_BB = V_BB⁻¹ is exactly the paper's, and its column loop is used. W is held transposed, so that columns
are contiguous. On a CPU the loop is compiled (oneshot_kernels/cpu/column_loop.py); `solve_block` is the same in torch,
for GPUs and for machines without a compiler.
"""

from dataclasses import dataclass

import torch
from oneshot_kernels.cpu import column_loop

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from ..linalg import upper_factor
from ..patterns import NM, Pattern, strength
from . import Solution

needs = frozenset({"outer"})
updates = True
SUB_BLOCK = 16  # columns that are updated one by one before the rest of the mask block is updated
SPAN = 4  # mask blocks that get the compensation for everything before them in one product


@dataclass(frozen=True)
class Config:
    damping: float = flag(0.01, "λ as a share of the mean of G's diagonal")
    block_size: int = flag(128, "b, number of columns whose mask is chosen at once (unstructured)")

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"--sparsegpt.damping {self.damping}: must not be negative")
        if self.block_size < 1:
            raise ValueError(f"--sparsegpt.block-size {self.block_size}: must be at least 1")

    @property
    def group(self) -> int:
        """The default comparison group: a mask block."""
        return self.block_size


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Find the mask and the compensated weights.

    An unstructured pattern is counted within each mask block (`block_size` columns, unless the user sets another
    number). With the groups "row" and "matrix" the whole mask is chosen from the dense weights before the first column.

    Raises NumericalError when G is not finite or not positive definite even at damping 1.
    """
    R, C = W.shape
    V, dead, info = upper_factor(statistics, cfg.damping, W.dtype)
    E = W.T.clone(memory_format=torch.contiguous_format)  # (C, R); blocks that are still to come hold W⁰
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
    solve = compiled if column_loop.available(W) else solve_block
    for i in range(0, C, b):
        B = slice(i, min(i + b, C))
        first = i - i % (SPAN * b)
        if i == first:  # the compensation for all blocks before this span, as one wide product: twice as fast
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
        solve(W_B, U, mask[B], nm)
        E[B] -= W_B
    return Solution(W_hat.T, mask.T, info)


def keep(pattern: Pattern, scaled: torch.Tensor) -> torch.Tensor:
    """Mask, bool (b, R), of the largest |scaled| (b, R), counted in the weight's own orientation."""
    return pattern.keep(strength(scaled.T, pattern)).T


def compiled(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: NM | None) -> None:
    """`solve_block` in C++: the same mask, values to rounding."""
    column_loop.solve(W, U, mask, (nm.n, nm.m) if nm else None)


def solve_block(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: NM | None) -> None:
    """The paper's column loop on one mask block, in place: W (b, R) becomes Ŵ. U: (b, b).

    mask: bool (b, R). For an N:M pattern it is chosen here, at every m-th column from the current weights. A column
    updates only its own sub-block; the rest of the block gets the sub-block's errors in one product.
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
