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
are contiguous. The loop is compiled on a CPU and one launch on a GPU (oneshot_kernels/columns.py); `solve_block` is the
same in torch, for machines without a compiler or Triton.

The loop also rounds (the paper's section 3.5; with a given mask it is GPTQ, arXiv 2210.17323): a kept weight goes to
the nearest value of its grid, and the error of that is compensated like that of a removed weight. A group's scale is
chosen when the loop gets there, from the weights as they are by then, or as the loop would leave them unrounded.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from oneshot_kernels import columns

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from ..linalg import NumericalError, upper_factor
from ..patterns import NM, Pattern, strength
from . import Solution

needs = frozenset({"outer"})
updates = True
SUB_BLOCK = 16  # columns that are updated one by one before the rest of the mask block is updated
SPAN = 6  # mask blocks that get the compensation for everything before them in one product
WIDE = 512  # columns of a span of rounded blocks, which may be small
SMALLER = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # shares of a full scale that are tried
LEAST = 2.0**-24  # the smallest scale, float16's smallest number


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
    return sweep(W, statistics, pattern, cfg)


def sweep(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config, mask: torch.Tensor | None = None,
          grid: Any = None, search: bool = False) -> Solution:
    """`prune`, with what the column loop can do beside it.

    mask: bool (R, C), the weights that stay, instead of a choice by the pattern. grid: a Grid of quantise/grids.py that
    kept weights are rounded to; the Solution then has scales. search: whether a scale may be smaller than the group's
    largest weight asks for. A weight whose input was always zero is removed, unless
    the mask is given.

    Raises NumericalError as `prune` does, and when a scale does not fit float16.
    """
    C, given = W.shape[1], mask
    V, dead, info = upper_factor(statistics, cfg.damping, W.dtype)
    E = W.T.clone(memory_format=torch.contiguous_format)  # (C, R); blocks that are still to come hold W⁰
    d = V.diagonal().unsqueeze(1)
    if mask is None:
        if dead.any():
            E[dead] = 0
        nm, pattern = pattern if isinstance(pattern, NM) else None, pattern.with_default_group(cfg.group)
        chosen = pattern.group if isinstance(pattern.group, int) and not nm else 0  # columns of a mask block
        mask = torch.empty_like(E, dtype=torch.bool) if nm or chosen else keep(pattern, E * d).contiguous()
    else:
        nm, chosen, mask = None, 0, mask.T.contiguous()
        E *= mask
    b, shared, span = widths(C, chosen or cfg.block_size, nm, grid)
    plain = sweep(W, statistics, pattern, cfg, given).W_hat.T if search and shared == C else None
    scales, W_hat, current = [], torch.empty_like(E), Current(E, V, span)
    for i in range(0, C, b):
        B = slice(i, min(i + b, C))
        W_B, U = current(B, out=W_hat[B])
        if chosen and i % chosen == 0:
            M = slice(i, min(i + chosen, C))
            mask[M] = keep(pattern, (W_B if M == B else current(M)[0]) * d[M])
        if grid and i % shared == 0:
            G = slice(i, min(i + shared, C))
            W_G, U_G = (E, None) if shared == C else (W_B, U) if G == B else current(G)
            known = not nm and (not chosen or G.stop <= M.stop)  # what is kept in the group
            if search and (nm or known):  # as it would be unless it were rounded
                W_G = unrounded(W_G, U_G, mask[G], nm) if plain is None else plain
            scales.append(scales_of(grid, W_G * mask[G] if known else W_G, d[G] if search else None))
        solve(W_B, U, mask[B], nm, columns.Grid(scales[-1], b, grid.low, grid.high) if grid else None)
        E[B] -= W_B
    return Solution(W_hat.T, mask.T, info, scales=torch.cat(scales).T if grid else None)


def rounded(W: torch.Tensor, V: torch.Tensor, mask: torch.Tensor, scales: torch.Tensor, grid: Any) -> torch.Tensor:
    """Ŵ (C, R) of W (C, R), V (C, C) and mask (C, R), with a scale for each weight (C, R), chosen before.

    The columns may stand in any order, as long as all four have the same.
    """
    E, W_hat, b = W * mask, torch.empty_like(W), 128
    current = Current(E, V, SPAN * b)
    for i in range(0, len(W), b):
        B = slice(i, min(i + b, len(W)))
        W_B, U = current(B, out=W_hat[B])
        solve(W_B, U, mask[B], None, columns.Grid(scales[B], 1, grid.low, grid.high))
        E[B] -= W_B
    return W_hat


def widths(C: int, b: int, nm: NM | None, grid: Any) -> tuple[int, int, int]:
    """(columns of a block in the loop, columns that share a scale, columns of a span) of C.

    b: the block wanted, of which all whose mask is chosen together and all that share a scale are multiples or parts.
    """
    b = -(-b // nm.m) * nm.m if nm else b  # a group of m never straddles two blocks
    if grid is None:
        return b, C, SPAN * b
    shared = grid.width(C)
    if shared >= C:
        return b, C, -(-WIDE // b) * b
    outer, b = math.lcm(b, shared), math.gcd(b, shared)
    if nm and b % nm.m:
        raise ValueError(f"--quantise {grid}: groups of {shared} columns are no whole groups of {nm}; give other ones")
    return b, shared, -(-WIDE // outer) * outer


class Current:
    """The weights of columns that are still to come, with the compensation for all that are done.

    E (C, R), V (C, C): see above. span: columns that get the compensation for everything before them in one product.
    """

    def __init__(self, E: torch.Tensor, V: torch.Tensor, span: int) -> None:
        self.E, self.V, self.span = E, V, span

    def __call__(self, B: slice, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(W_B (b, R), U_BB (b, b)) of the columns B, which lie in one span, when all before them are done."""
        E, V, first = self.E, self.V, B.start - B.start % self.span
        if B.start == first and first:  # as one wide product: twice as fast
            S = slice(first, min(first + self.span, len(E)))
            self.before = V[:first, S].T @ E[:first]
        S, before = slice(first, B.stop), self.before[B.start - first : B.stop - first] if first else None
        out = torch.empty_like(E[B]) if out is None else out
        return out, columns.current(E[S], V[S, S], before, out)


def unrounded(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: NM | None) -> torch.Tensor:
    """What the column loop makes of a group of columns W (b, R) without rounding; nothing given is changed."""
    W = W.clone()
    solve(W, U, mask.clone(), nm)
    return W


def scales_of(grid: Any, W: torch.Tensor, d: torch.Tensor | None = None) -> torch.Tensor:
    """(1, R): the scales for a group of columns W (b, R). Raises NumericalError when float16 cannot hold them.

    d (b, 1): choose among the full scale and SMALLER shares of it the one with the least Σ_j (d_j (w_j - ŵ_j))², which
    is what the group's rounding costs before compensation. Where a scale would vanish it is float16's smallest number,
    as compensation may bring something there.
    """
    full = grid.scales(W.T)
    if not torch.isfinite(full).all():
        raise NumericalError(f"its weights are too large for the float16 scales of {grid}")
    full = full.masked_fill(full == 0, LEAST)
    if d is None:
        return full.T.contiguous()
    best, least = full, torch.full_like(full, torch.inf)
    for share in (1.0, *SMALLER):
        s = (full * share).half().to(full)
        s = s.masked_fill(s == 0, LEAST)
        cost = (grid.value(grid.round(W.T, s), s) - W.T).mul_(d.T).square_().sum(1, keepdim=True)
        best, least = torch.where(cost < least, s, best), torch.minimum(cost, least)
    return best.T.contiguous()


def keep(pattern: Pattern, scaled: torch.Tensor) -> torch.Tensor:
    """Mask, bool (b, R), of the largest |scaled| (b, R), counted in the weight's own orientation."""
    return pattern.keep(strength(scaled.T, pattern)).T


def solve(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: NM | None,
          grid: columns.Grid | None = None) -> None:
    """`solve_block` where it is fast: the same mask, values to rounding."""
    pair = (nm.n, nm.m) if nm else None
    if columns.available(W, pair):
        columns.solve(W, U, mask, pair, grid)
    else:
        solve_block(W, U, mask, nm, grid)


def solve_block(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: NM | None,
                grid: columns.Grid | None = None) -> None:
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
            if grid:
                scale = grid.scale[j // grid.width]
                q = (rows[j] / scale).round_().clamp_(grid.low, grid.high).mul_(scale).mul_(mask[j])
                torch.sub(rows[j], q, out=err)
                rows[j].copy_(q)
            else:
                torch.mul(rows[j], removed[j], out=err)
                rows[j].sub_(err)
            err.div_(d[j])
            if j + 1 < t:
                W[j + 1 : t].addr_(U[j, j + 1 : t], err, alpha=-1)
        if t < b:
            W[t:].addmm_(U[s:t, t:].T, errors, alpha=-1)
