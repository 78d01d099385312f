"""Fragment order: the packed weight in the order in which sparse tensor cores expect it in registers. Made at load.

    N, K    rows and columns of the weight          NT   row tiles of 16, ceil(N / 16)
    KB      k-blocks of 32 columns, padded to a multiple of 8 (256 columns)
    g, q    a warp's lane is 4g + q, g in 0..7, q in 0..3
    chunk   the two kept values of one group of four: 32 bits, first value in the low half

One warp-wide `mma.sp.m16n8k32` multiplies 16 rows by 32 columns of the weight. Which lane must hold which chunk in
which of its four registers is defined in the PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16/.bf16":

`values` (NT, KB, 32, 8), 16-bit floats, the last dimension being four registers of two values: register 2h + r of
lane 4g + q holds the chunk of row g + 8r and group q + 4h. A lane's part is 16 contiguous bytes and a warp's 512, so
that one instruction loads a fragment without wasting a byte.

`metadata` (NT, KB/8, 32, 4), int32: one 16-byte load per lane serves eight k-blocks. Word w serves k-blocks 2w and
2w + 1; the instruction's sparsity selector s takes it from lanes q = 2s and 2s + 1 of each g, so lane 4g + 2s + c
holds columns 16c .. 16c + 15 of k-block 2w + s: row g in the low 16 bits, row g + 8 in the high 16, four bits a group.

Padding rows and columns hold zero values with the valid positions (0, 1).
"""

import torch
import torch.nn.functional as F

from ..reference import Packed

ROWS = 16
"""Rows in a tile: M of the instruction."""
K_BLOCK = 32
"""Columns in a k-block: K of the instruction."""
K_PAD = 256
"""Columns are padded to a multiple of this, as eight k-blocks share a 16-byte metadata load."""
_EMPTY_PAIR = 0x44  # two groups with positions (0, 1)


def padded_rows(n: int, row_blocks: int = 1) -> int:
    """The number of rows in fragment order: each of the `row_blocks` equal parts is padded to whole tiles by itself."""
    return row_blocks * -(-(n // row_blocks) // ROWS) * ROWS


def to_fragments(packed: Packed, row_blocks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-major `Packed` -> (values, metadata) in fragment order, on the same device.

    row_blocks: if greater than 1, each of that many equal parts of the rows starts at a new tile, as needed for
    SwiGLU's gate and up.

    Raises ValueError for dtypes other than float16 and bfloat16, and if N is not divisible by `row_blocks`.
    """
    values, metadata, (n, k) = packed
    if values.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the kernels take float16 and bfloat16 weights, got {values.dtype}; convert the module first")
    if n % row_blocks:
        raise ValueError(f"{n} rows do not split into {row_blocks} equal parts")
    rows, columns = padded_rows(n, row_blocks), -(-k // K_PAD) * K_PAD
    tiles, k_blocks, part = rows // ROWS, columns // K_BLOCK, n // row_blocks
    pad_rows = rows // row_blocks - part

    codes = metadata.clone()
    if k % 8:  # the high half of the last byte is not a group of W: give it positions (0, 1)
        codes[:, -1] |= _EMPTY_PAIR & 0xF0
    codes = codes.view(row_blocks, part, -1)
    codes = F.pad(codes, (0, columns // 8 - codes.shape[-1], 0, pad_rows), value=_EMPTY_PAIR)
    values = F.pad(values.view(row_blocks, part, -1), (0, (columns - k) // 2, 0, pad_rows))

    # (tile, r, g, k-block, h, q, value) -> (tile, k-block, g, q, h, r, value)
    values = values.view(tiles, 2, 8, k_blocks, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    # (tile, r, g, 8 k-blocks, w, s, c, byte of 16 bits) -> (tile, 8 k-blocks, g, s, c, w, r, byte): little-endian words
    codes = codes.view(tiles, 2, 8, k_blocks // 8, 4, 2, 2, 2).permute(0, 3, 2, 5, 6, 4, 1, 7)
    return (
        values.reshape(tiles, k_blocks, 32, 8).contiguous(),
        codes.reshape(tiles, k_blocks // 8, 32, 16).contiguous().view(torch.int32),
    )


def from_fragments(values: torch.Tensor, metadata: torch.Tensor, n: int, k: int, row_blocks: int = 1) -> Packed:
    """The inverse of `to_fragments`: the row-major `Packed` of a weight (n, k) without padding, byte for byte."""
    tiles, k_blocks = values.shape[:2]
    rows, part = tiles * ROWS, n // row_blocks
    packed = (
        values.view(tiles, k_blocks, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(row_blocks, -1, k_blocks * 16)
    )
    codes = metadata.view(torch.uint8).view(tiles, k_blocks // 8, 8, 2, 2, 4, 2, 2).permute(0, 6, 2, 1, 5, 3, 4, 7)
    codes = codes.reshape(row_blocks, rows // row_blocks, -1)[:, :part, : -(-k // 8)].reshape(n, -1).contiguous()
    if k % 8:
        codes[:, -1] &= 0x0F
    return Packed(packed[:, :part, : k // 2].reshape(n, -1).contiguous(), codes, (n, k))
