"""The middle kernel, which expands 2:4 weights in registers for an ordinary tensor-core product; and full expansion.

    M, N, K   tokens, outputs, inputs            BM, BN, BK   a program's tile of each
    NT        row tiles of 16 (fragment.py)      KB           k-blocks of 32 columns (padded)
    SPLIT     number of programs that share one output tile, each with a part of K

Used for about 64 to 512 tokens, where the time is no longer determined by bytes alone, and on every GPU without
`mma.sp` (AMD, older NVIDIA). This is plain Triton, so it also runs entirely under the interpreter. It reads the same
fragment-ordered tensors as the decode kernel: one copy of the weights serves all sizes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .mma_sp import INTERPRET


@dataclass(frozen=True)
class Config:
    """Launch parameters of the middle kernel: rows, tokens, columns are BN, BM, BK; split is SPLIT."""

    rows: int = 64
    tokens: int = 64
    columns: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 3


def default_config(tokens: int, n: int, k: int) -> Config:
    """The Config used until `tune` has measured: fills 132 multiprocessors (H100, H200), splitting K if needed."""
    wide = tokens > 256 and n >= 8192
    rows, columns_of_x = (128, 128) if wide else (64, max(16, min(64, triton.next_power_of_2(tokens))))
    programs = triton.cdiv(n, rows) * triton.cdiv(tokens, columns_of_x)
    split = 1
    while split < 8 and programs * split * 2 <= 264 and k // (split * 2) >= 512:
        split *= 2
    return Config(rows=rows, tokens=columns_of_x, columns=64, split=split, warps=8 if wide else 4)


@triton.jit
def _load_expanded(values_ptr, metadata_ptr, first_tile, first_block, NT, KB, BN: tl.constexpr, BK: tl.constexpr):
    """Dense tile (BN, BK) of 16-bit patterns, int16, from row tile `first_tile` and k-block `first_block` on.

    Tiles out of range repeat the last one (the caller never stores them); k-blocks out of range are zeros.
    """
    TILES: tl.constexpr = BN // 16
    BLOCKS: tl.constexpr = BK // 32
    tile = tl.minimum(first_tile + tl.arange(0, TILES), NT - 1).to(tl.int64)
    block = first_block + tl.arange(0, BLOCKS)

    # A fragment is 128 contiguous words: loads are 16 bytes wide, and the reordering happens in registers.
    word = tl.arange(0, 128)
    at = (tile[:, None, None] * KB + block[None, :, None]) * 128 + word[None, None, :]
    pairs = tl.load(values_ptr + at, mask=block[None, :, None] < KB, other=0)
    pairs = tl.reshape(pairs, (TILES, BLOCKS, 8, 4, 2, 2))  # tile block g q h r
    pairs = tl.reshape(tl.permute(pairs, (0, 5, 2, 1, 4, 3)), (BN, BK // 4))  # row (tile r g), group (block h q)

    # metadata: row r, g of a tile and 16 columns c of a block share a 16-bit half of a word
    row = tl.arange(0, BN)
    row_tile = tl.minimum(first_tile + row // 16, NT - 1).to(tl.int64)
    half = tl.arange(0, BK // 16)
    k_block = first_block + half // 2
    lane = 4 * (row[:, None] % 8) + (2 * (k_block % 2) + half % 2)[None, :]
    at = ((row_tile[:, None] * (KB // 8) + (k_block // 8)[None, :]) * 32 + lane) * 4 + ((k_block % 8) // 2)[None, :]
    words = tl.load(metadata_ptr + at, mask=k_block[None, :] < KB, other=0x44444444)
    words = words >> (16 * ((row // 8) % 2))[:, None]
    code = tl.reshape(words[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :], (BN, BK // 4))

    i0 = code & 3
    i1 = (code >> 2) & 3
    low = pairs.to(tl.int16)
    high = (pairs >> 16).to(tl.int16)
    zero = tl.zeros_like(low)
    w0 = tl.where(i0 == 0, low, zero)
    w1 = tl.where(i0 == 1, low, tl.where(i1 == 1, high, zero))
    w2 = tl.where(i0 == 2, low, tl.where(i1 == 2, high, zero))
    w3 = tl.where(i1 == 3, high, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BN, BK))


@triton.jit
def _as_float(bits, FP16: tl.constexpr, INTERP: tl.constexpr):
    """int16 patterns as 16-bit floats; as float32 for bfloat16 under the interpreter, whose bfloat16 dot is wrong."""
    if FP16:
        return bits.to(tl.float16, bitcast=True)
    elif INTERP:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def _matmul_kernel(
    values_ptr, metadata_ptr, x_ptr, bias_ptr, residual_ptr, y_ptr, M, N, NT, K, KB,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FP16: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """y (SPLIT, M, N): program (row block, token block, part of K) writes one tile. The weight is the left operand."""
    pid_n = tl.program_id(0)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    n = pid_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, BM), tl.float32)
    steps = tl.cdiv(K, BK)
    per_part = tl.cdiv(steps, SPLIT)
    for step in tl.range(part * per_part, tl.minimum((part + 1) * per_part, steps), num_stages=STAGES):
        k = step * BK + tl.arange(0, BK)
        bits = _load_expanded(values_ptr, metadata_ptr, pid_n * (BN // 16), step * (BK // 32), NT, KB, BN, BK)
        x = tl.load(
            x_ptr + m[None, :].to(tl.int64) * K + k[:, None],
            mask=(m[None, :] < M) & (k[:, None] < K),
            other=0.0,
        )
        if INTERP:
            x = x.to(tl.float32)
            acc = tl.dot(_as_float(bits, FP16, INTERP).to(tl.float32), x, acc, input_precision="ieee")
        else:
            acc = tl.dot(_as_float(bits, FP16, INTERP), x, acc)
    mask = (n[:, None] < N) & (m[None, :] < M)
    at = m[None, :].to(tl.int64) * N + n[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + part.to(tl.int64) * M * N + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand_kernel(values_ptr, metadata_ptr, w_ptr, N, NT, K, KB, BN: tl.constexpr, BK: tl.constexpr):
    """W (N, K) row-major, int16 patterns: program (row block, column block) writes one tile."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    first_block = tl.program_id(1) * (BK // 32)
    bits = _load_expanded(values_ptr, metadata_ptr, tl.program_id(0) * (BN // 16), first_block, NT, KB, BN, BK)
    tl.store(w_ptr + n[:, None].to(tl.int64) * K + k[None, :], bits, mask=(n[:, None] < N) & (k[None, :] < K))


def matmul(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    n: int,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """x (M, K) times a weight in fragment order, accumulated in float32 -> (M, n) in x's dtype or `out_dtype`.

    x must be contiguous. bias: (n,). residual: (M, n), contiguous. With split > 1 the parts are float32 and torch adds
    them in a fixed order, deterministically and without atomics.

    Raises ValueError if x is not contiguous or of another dtype than the weight.
    """
    m, k = x.shape
    if x.dtype != values.dtype or not x.is_contiguous():
        raise ValueError(f"the middle kernel takes contiguous x in the weight's dtype {values.dtype}, got {x.dtype}"
                         + ("" if x.is_contiguous() else ", not contiguous"))
    config = config or default_config(m, n, k)
    dtype = out_dtype or x.dtype
    split = config.split
    y = x.new_empty(split, m, n, dtype=torch.float32 if split > 1 else dtype)
    grid = (triton.cdiv(n, config.rows), triton.cdiv(m, config.tokens), split)
    _matmul_kernel[grid](
        values.view(torch.int32),
        metadata,
        x,
        x if bias is None else bias,
        x if residual is None else residual,
        y,
        m,
        n,
        values.shape[0],
        k,
        values.shape[1],
        BM=config.tokens,
        BN=config.rows,
        BK=config.columns,
        SPLIT=split,
        STAGES=config.stages,
        HAS_BIAS=bias is not None and split == 1,
        HAS_RESIDUAL=residual is not None and split == 1,
        FP16=x.dtype == torch.float16,
        INTERP=INTERPRET,
        num_warps=config.warps,
    )
    if split == 1:
        return y[0]
    total = y.sum(0)
    for term in (bias, residual):
        if term is not None:
            total += term
    return total.to(dtype)


def expand(values: torch.Tensor, metadata: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """A weight in fragment order as a dense (n, k) matrix of its dtype, bit for bit."""
    dense = values.new_empty(n, k)
    rows, columns = 32, 128
    grid = (triton.cdiv(n, rows), triton.cdiv(k, columns))
    _expand_kernel[grid](
        values.view(torch.int32),
        metadata,
        dense.view(torch.int16),
        n,
        values.shape[0],
        k,
        values.shape[1],
        BN=rows,
        BK=columns,
        num_warps=4,
    )
    return dense
