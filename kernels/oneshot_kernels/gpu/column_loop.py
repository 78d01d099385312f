"""SparseGPT's loop over the columns of one block in one launch; cpu/column_loop.py says what it computes.

    B, BR   columns of the block, rows of a program: powers of two; both are held in registers

The torch loop is some ten launches for each column, which is all its time on a GPU. Here a program takes BR rows, which
nothing else touches, through all columns. A column takes B·BR operations for its update, and as many to look it up.

Plain Triton, so it also runs under the interpreter. Divisions are rounded to nearest, as torch's are, so that masks and
codes are the reference's where no decision is closer than rounding.
"""

import functools
import warnings
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .mma_sp import INTERPRET

if TYPE_CHECKING:
    from ..cpu.column_loop import Grid

MOST = 256  # columns of a block, at most
ROWS = 16  # with 32 some variants spill registers
LIMIT = 1e-4  # largest accepted relative error in the self-test, where no decision is close


@triton.jit
def _row(X, at, j):
    """Row j of X (B, BR)."""
    return tl.sum(tl.where(at[:, None] == j, X, 0), 0)


@triton.jit
def _choose(W, d, kept, j, B: tl.constexpr, BR: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """kept (B, BR) with the N of the M columns from j on whose |w / d| is highest; of equal ones the right-most."""
    group = tl.arange(0, B // M)[:, None, None] == j // M
    score = tl.reshape(tl.abs(tl.div_rn(W, d[:, None])), (B // M, M, BR))
    score = tl.sum(tl.where(group, score, 0), 0)  # (M, BR)
    place = tl.arange(0, M)
    left = (place[None, :] < place[:, None])[:, :, None]
    below = (score[None, :, :] < score[:, None, :]) | ((score[None, :, :] == score[:, None, :]) & left)
    stays = tl.sum(below.to(tl.int32), 1) >= M - N
    whole = tl.where(group, stays.to(tl.int32)[None], tl.reshape(kept, (B // M, M, BR)))
    return tl.reshape(whole, (B, BR))


@triton.jit
def _kernel(
    W_ptr, U_ptr, mask_ptr, scale_ptr, codes_ptr, b, R, width, low, high,
    B: tl.constexpr, BR: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GRID: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """A program's rows through all columns. W, mask, codes: (b, R); U: (b, b); scale: (ceil(b / width), R)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    at = tl.arange(0, B)
    inside = (at[:, None] < b) & (r[None, :] < R)
    place = at[:, None] * R + r[None, :]
    W = tl.load(W_ptr + place, mask=inside, other=0.0)
    d = tl.load(U_ptr + at * b + at, mask=at < b, other=1.0)
    kept = tl.zeros((B, BR), tl.int32)
    if M == 0:
        kept = tl.load(mask_ptr + place, mask=inside, other=0).to(tl.int32)
    for j in range(0, b):
        if M > 0:  # noqa: SIM102 - without M there is nothing to divide by
            if j % M == 0:
                kept = _choose(W, d, kept, j, B, BR, N, M)
        w = _row(W, at, j)
        stays = _row(kept, at, j)
        q = tl.where(stays != 0, w, 0.0)
        if GRID:
            s = tl.load(scale_ptr + j // width * R + r, mask=r < R, other=1.0)
            code = (tl.div_rn(w, s) + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest whole number, ties to even
            code = tl.where(stays != 0, tl.minimum(tl.maximum(code, low), high), 0.0)
            q = code * s
            if CODES:
                tl.store(codes_ptr + j * R + r, code.to(tl.int8), mask=r < R)
        u = tl.load(U_ptr + j * b + at, mask=(at > j) & (at < b), other=0.0)
        e = tl.div_rn(w - q, tl.load(U_ptr + j * b + j))
        W = tl.where(at[:, None] == j, q[None, :], W - u[:, None] * e[None, :])
    tl.store(W_ptr + place, W, mask=inside)
    if M > 0:
        tl.store(mask_ptr + place, kept.to(tl.int8), mask=inside)


def warps(columns: int) -> int:
    """Warps of a program with so many columns (B)."""
    return 8 if columns > 128 else 4


def takes(W: torch.Tensor, nm: tuple[int, int] | None = None) -> bool:
    """Whether `solve` can run on a weight like W: float32 on a GPU, few columns, groups that are a power of two."""
    there = W.device.type == "cuda" or (INTERPRET and W.device.type == "cpu")
    groups = nm is None or nm[1] & (nm[1] - 1) == 0
    return there and W.dtype == torch.float32 and len(W) <= MOST and groups and trusted(W.device, nm is not None)


def solve(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: tuple[int, int] | None = None,
          grid: "Grid | None" = None) -> None:
    """`cpu.column_loop.solve` on a GPU, for what it `takes`. W, mask, the grid's scale and codes must be contiguous."""
    (b, R), (n, m) = W.shape, nm or (0, 0)
    columns = max(triton.next_power_of_2(b), m, 16)
    scale, codes, width, low, high = (grid.scale, grid.codes, grid.width, grid.low, grid.high) if grid else (
        W, None, 1, 0, 0)
    with torch.cuda.device_of(W):  # Triton launches on the current device, which may be another than W's
        _kernel[(triton.cdiv(R, ROWS),)](
            W, U.contiguous(), mask.view(torch.int8), scale, W if codes is None else codes, b, R, width, float(low),
            float(high), B=columns, BR=ROWS, N=n, M=m, GRID=grid is not None, CODES=codes is not None,
            num_warps=warps(columns))


@functools.cache
def trusted(device: torch.device, chooses: bool) -> bool:
    """Whether the kernel compiles, and agrees with the reference, on this device; tried once, with one warning."""
    try:
        fault = wrong(device, chooses)
    except Exception as error:  # no compiler for the launcher, too few registers, an unknown GPU
        fault = f"{type(error).__name__}: {error}"
    if fault:
        warnings.warn(f"the column loop FAILED its self-test on {device} and is not used, plain torch is: {fault}. "
                      "Please report this", RuntimeWarning, stacklevel=3)
    return fault is None


def wrong(device: torch.device, chooses: bool) -> str | None:
    """What is wrong with the kernel on a small problem of as many columns as there may be, or None."""
    from ..cpu import column_loop as plain

    generator, b, R = torch.Generator().manual_seed(0), 24 if INTERPRET else MOST - 4, 19
    W = torch.randn(b, R, generator=generator).to(device)
    U = torch.randn(b, b, generator=generator).mul_(0.5 / b).triu_(1)
    U = (U + torch.diag(torch.rand(b, generator=generator) + 0.5)).to(device)
    given, nm = (torch.rand(b, R, generator=generator) < 0.5).to(device), (2, 4) if chooses else None
    grid, result = None if chooses else plain.some_grid(W), []
    for run in (solve, plain.reference):
        w, mask = W.clone(), given.clone()
        run(w, U, mask, nm, grid)
        result.append((w, mask))
    (got, mask), (want, wanted) = result
    error = float((got - want).norm() / want.norm())
    right = torch.equal(mask, wanted) and error <= (LIMIT if chooses else 0.1)
    return None if right else f"relative error {error:.3g}"
