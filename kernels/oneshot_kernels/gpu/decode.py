# ruff: noqa: RUF005 - inside a kernel Triton takes `a + (b,)`, not `(*a, b)`
"""The decode kernel: 1 to 64 tokens on the sparse tensor cores, in one launch that reads the weights once.

    M, N, K   tokens, outputs, inputs              T    token tiles of 8, ceil(M / 8)
    NT        row tiles of 16 (fragment.py)        R    row tiles per program
    KB8       blocks of 256 columns                PARTS 2 with SwiGLU (gate and up), else 1
    WARPS     warps per program; they split K      STAGES  depth of the software pipeline

At these sizes the time is proportional to the bytes read: a packed weight has 0.5625 of the bytes of a dense one, so
the speedup is at most 1.78. Three choices serve that:

* Weights are the rows (M) of the MMA and tokens its columns (N = 8). With one token this wastes arithmetic, which is
  free here, but no weight bytes.
* `tl.range(num_stages=...)` turns the loads of weights into asynchronous copies to shared memory, although there is no
  `tl.dot`. Without it ptxas places each load next to its use, and the memory system idles.
* Warps split K and are summed in shared memory at the end, in a fixed order and without atomics, so that equal inputs
  give equal bits.

x stays row-major. The optional RMSNorm on x multiplies it by the gain (so that the weights stay bit-exact), sums x²
along the way, and scales the final sum: y = (x·gain)Wᵀ / rms(x). In float16, x·gain must stay below 65504.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .fragment import K_BLOCK, K_PAD, ROWS
from .mma_sp import INTERPRET, join_pair, load_b, mma_sp, split_pair

MAX_TOKENS = 64
TOKEN_TILE = 8


@dataclass(frozen=True)
class Config:
    """Launch parameters of the decode kernel: row tiles per program, warps, pipeline stages."""

    row_tiles: int = 1
    warps: int = 8
    stages: int = 3
    direct_x: bool = True
    """Whether to read x into registers through L1, instead of staging it in shared memory with the weights."""


def default_config(tokens: int, k: int, swiglu: bool = False) -> Config:
    """The Config used until `tune` has measured, chosen so that the compiled kernel does not spill registers.

    If K is not a multiple of 256, x is staged in shared memory, which takes about warps · (4 T + 4.5) KiB; this is kept
    below the 99 KiB available to a block on Ada.
    """
    if k % K_PAD:
        return Config(row_tiles=1, warps=8 if tokens <= 8 else 4 if tokens <= 32 else 2, stages=2)
    if tokens > 32:
        return Config(row_tiles=1, warps=4, stages=2)
    return Config(row_tiles=1, warps=8, stages=2 if tokens > 8 or swiglu else 3)


def shape_flags(k: int, config: Config) -> tuple[int, bool, bool]:
    """(warps launched, WHOLE_K, EVEN_WARPS) for K inputs: the properties of the compiled variant that depend on K."""
    blocks = -(-k // K_PAD)
    warps = min(config.warps, triton.next_power_of_2(blocks))
    return warps, k % K_PAD == 0, blocks % warps == 0


# No specialisation on integers, which would compile variants that the self-test has not checked.
@triton.jit(do_not_specialize=["M", "N", "NT", "K", "KB8"])
def _decode_kernel(
    values_ptr, metadata_ptr, x_ptr, gain_ptr, bias_ptr, residual_ptr, y_ptr, M, N, NT, K, KB8, eps,
    T: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, SWIGLU: tl.constexpr,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WHOLE_K: tl.constexpr,
    EVEN_WARPS: tl.constexpr, DIRECT_X: tl.constexpr, FP16: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program p computes row tiles pR .. pR + R - 1 (with SWIGLU of both gate and up) for all tokens.

    values, metadata, x, gain are int32 pointers (two 16-bit floats per word). WHOLE_K: K is a multiple of 256.
    EVEN_WARPS: all warps have the same number of blocks. If both hold, no load along K needs a mask.
    """
    PARTS: tl.constexpr = 2 if SWIGLU else 1
    pid = tl.program_id(0)
    i = tl.arange(0, WARPS * 128)  # (warp, lane, register)
    warp = i // 128
    in_warp = i % 128
    g = in_warp // 16
    q = (in_warp // 4) % 4
    pair_in_block = 4 * (in_warp % 4) + q  # B fragment: register r of lane q holds pair 4r + q
    zero = tl.zeros((WARPS * 128,), tl.float32)

    acc = ()
    for _ in tl.static_range(PARTS * R * T):
        acc = acc + (zero,)
    square = ()
    for _ in tl.static_range(T):
        square = square + (zero,)

    for block in tl.range(0, KB8, WARPS, num_stages=STAGES):
        in_range = (block + warp) < KB8
        x_block = tl.minimum(block + warp, KB8 - 1) * 128  # a warp past the end repeats a block, with zero weights
        gains = ()
        if NORM:
            for step in tl.static_range(8):
                pair = (block + warp) * 128 + step * 16 + pair_in_block
                if DIRECT_X:
                    gain = load_b(gain_ptr + x_block + q, step, WARPS, INTERP)
                elif WHOLE_K and EVEN_WARPS:
                    gain = tl.load(gain_ptr + pair)
                else:
                    gain = tl.load(gain_ptr + pair, mask=pair < K // 2, other=0)
                gains = gains + (gain,)
        xs = ()
        new_square = ()
        for t in tl.static_range(T):
            token = 8 * t + g
            total = square[t]
            for step in tl.static_range(8):
                pair = (block + warp) * 128 + step * 16 + pair_in_block
                if DIRECT_X:  # tokens past the end repeat the last one; their columns of the product are never stored
                    x = load_b(x_ptr + tl.minimum(token, M - 1) * (K // 2) + x_block + q, step, WARPS, INTERP)
                elif WHOLE_K and EVEN_WARPS:
                    x = tl.load(x_ptr + token * (K // 2) + pair, mask=token < M, other=0)
                else:
                    x = tl.load(x_ptr + token * (K // 2) + pair, mask=(token < M) & (pair < K // 2), other=0)
                if NORM:
                    low, high = split_pair(x, FP16)
                    gain_low, gain_high = split_pair(gains[step], FP16)
                    squares = low * low + high * high
                    total += squares if EVEN_WARPS else tl.where(in_range, squares, 0.0)
                    x = join_pair(low * gain_low, high * gain_high, FP16, INTERP)
                xs = xs + (x,)
            new_square = new_square + (total,)
        square = new_square

        new_acc = ()
        for part in tl.static_range(PARTS):
            for r in tl.static_range(R):
                tile = tl.minimum(pid * R + r, NT // PARTS - 1)  # a tile past the end repeats the last, never stored
                base = (tile + part * (NT // PARTS)).to(tl.int64) * KB8
                metadata_at = metadata_ptr + (base + block) * 128 + i
                if EVEN_WARPS:
                    codes = tl.load(metadata_at, eviction_policy="evict_first")
                else:  # 0x4444_4444: the valid positions (0, 1)
                    codes = tl.load(metadata_at, mask=in_range, other=0x44444444, eviction_policy="evict_first")
                row = ()
                for t in tl.static_range(T):
                    row = row + (acc[(part * R + r) * T + t],)
                for step in tl.static_range(8):
                    values_at = values_ptr + (base + block + warp) * 1024 + step * 128 + in_warp
                    if EVEN_WARPS:
                        a = tl.load(values_at, eviction_policy="evict_first")
                    else:
                        a = tl.load(values_at, mask=in_range, other=0, eviction_policy="evict_first")
                    new_row = ()
                    for t in tl.static_range(T):
                        new_row = new_row + (mma_sp(a, xs[t * 8 + step], row[t], codes, step, WARPS, FP16, INTERP),)
                    row = new_row
                new_acc = new_acc + row
        acc = new_acc

    j = tl.arange(0, 128)  # C fragment: (g, q, r, parity of the token)
    row_in_tile = j // 16 + 8 * ((j // 2) % 2)
    token_in_tile = 2 * ((j // 4) % 4) + j % 2
    for t in tl.static_range(T):
        token = 8 * t + token_in_tile
        if NORM:  # sum of squares over warps and a row's four lanes, moved to the lanes with the token's outputs
            squares = tl.sum(tl.sum(tl.reshape(square[t], (WARPS, 8, 16)), axis=2), axis=0)
            scales = 1.0 / tl.sqrt(squares / K + eps)
            match = token_in_tile[:, None] == tl.arange(0, 8)[None, :]
            scale = tl.sum(tl.where(match, scales[None, :], 0.0), axis=1)
        for r in tl.static_range(R):
            n = (pid * R + r) * 16 + row_in_tile
            mask = (token < M) & (n < N)
            y = tl.sum(tl.reshape(acc[r * T + t], (WARPS, 128)), axis=0)
            if NORM:
                y = y * scale
            if HAS_BIAS:
                y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            if SWIGLU:
                up = tl.sum(tl.reshape(acc[(R + r) * T + t], (WARPS, 128)), axis=0)
                if NORM:
                    up = up * scale
                if HAS_BIAS:
                    up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)
                y = y / (1.0 + tl.exp(-y)) * up
            if HAS_RESIDUAL:
                y += tl.load(residual_ptr + token * N + n, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=mask)


def as_words(x: torch.Tensor) -> torch.Tensor:
    """16-bit floats (..., K) viewed as int32 pairs (..., K/2); copied if not contiguous or not aligned to 4 bytes."""
    x = x.contiguous()
    return (x.clone() if x.storage_offset() % 2 else x).view(torch.int32)


def decode(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    n: int,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_gain: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    swiglu: bool = False,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """x (M, K) times a weight in fragment order, accumulated in float32 -> (M, n) in x's dtype or `out_dtype`.

    values, metadata: from `to_fragments` (with row_blocks=2 for `swiglu`, where n counts only the gate's rows). bias:
    (n,), with `swiglu` (2n,). residual: (M, n), contiguous. norm_gain: (K,) in x's dtype. Same result as
    `reference.linear`.

    Raises ValueError for more than 64 tokens, or a weight of another shape or dtype.
    """
    m, k = x.shape
    if not 0 < m <= MAX_TOKENS:
        raise ValueError(f"the decode kernel takes 1 to {MAX_TOKENS} tokens, got {m}; use expand.matmul above that")
    tiles, blocks, parts = values.shape[0], metadata.shape[1], 2 if swiglu else 1
    if x.dtype != values.dtype or values.shape[1] * K_BLOCK != -(-k // K_PAD) * K_PAD or tiles // parts * ROWS < n:
        raise ValueError(f"the decode kernel got x {tuple(x.shape)} {x.dtype} and {n} outputs for a weight "
                         f"{tuple(values.shape)} {values.dtype} of another shape or dtype")
    config = config or default_config(m, k, swiglu)
    warps, whole_k, even_warps = shape_flags(k, config)
    y = x.new_empty(m, n, dtype=out_dtype or x.dtype)
    words = as_words(x)
    _decode_kernel[(triton.cdiv(tiles // parts, config.row_tiles),)](
        values.view(torch.int32),
        metadata,
        words,
        words if norm_gain is None else as_words(norm_gain),
        x if bias is None else bias,
        x if residual is None else residual,
        y,
        *(m, n, tiles, k, blocks, norm_eps),
        T=triton.cdiv(m, TOKEN_TILE),
        R=config.row_tiles,
        WARPS=warps,
        STAGES=config.stages,
        SWIGLU=swiglu,
        NORM=norm_gain is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        WHOLE_K=whole_k,
        EVEN_WARPS=even_warps,
        DIRECT_X=config.direct_x and whole_k,
        FP16=x.dtype == torch.float16,
        INTERP=INTERPRET,
        num_warps=warps,
    )
    return y
