"""How weights lie in memory for linear.cpp: tiles of L rows, one row on each SIMD lane. Made at load, never stored.

    L   lanes of the variant: 16 (AVX-512), 8 (AVX2), 4 (NEON)      T   tiles, ceil(N / L)
    K'  K rounded up to whole chunks of 32 columns                  G   groups of four, K' / 4

2:4 (`to_tiles`), from the format of reference.py:

    values    the group's two kept values of every row. bfloat16 (T, G, 2L): L pairs, because a shift and a mask turn a
              pair into two floats. float16 and float32 (T, 2G, L): the first of all rows, then the second of all.
    metadata  (T, K'/32, L) int32: a row's eight groups of a chunk, four bits each, the first lowest

Dense (`dense_tiles`): two columns in the place of two kept values, (T, K'/2, 2L) or (T, K', L). Rows and columns that
pad are zero. The shape says which order it is: a tensor that someone casts to another dtype stays readable (`is_native`
is then False, and it is expanded before use).
"""

import torch
import torch.nn.functional as F

from ..reference import Packed, check
from .library import huge_pages

CHUNK = 32


def to_tiles(packed: Packed, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, metadata) in tiles, of a weight in the row-major format.

    Raises ValueError for damaged metadata, as `reference.unpack` does: the kernels do not look.
    """
    check(packed.values, packed.metadata)
    n, k = packed.shape
    rows, chunks = -(-n // lanes) * lanes, -(-k // CHUNK)
    metadata = F.pad(packed.metadata, (0, 4 * chunks - packed.metadata.shape[1], 0, rows - n))
    words = metadata.view(torch.int32).view(-1, lanes, chunks)
    values = F.pad(packed.values, (0, CHUNK // 2 * chunks - k // 2, 0, rows - n))
    return _tiled(values, lanes), words.transpose(1, 2).contiguous()


def from_tiles(values: torch.Tensor, metadata: torch.Tensor, n: int, k: int) -> Packed:
    """The inverse: the row-major weight (n, k) of tiles."""
    rows = metadata.transpose(1, 2).reshape(-1, metadata.shape[1])[:n].contiguous()
    return Packed(_untiled(values, metadata.shape[2])[:n, : k // 2].contiguous(),
                  rows.view(torch.uint8)[:, : -(-k // 8)].contiguous(), (n, k))


def dense_tiles(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """A dense weight (N, K) in tiles."""
    n, k = weight.shape
    return _tiled(F.pad(weight, (0, -k % CHUNK, 0, -n % lanes)), lanes)


def shapes(n: int, k: int, lanes: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes that the values of a 2:4 weight (n, k) may have: in pairs, and not."""
    tiles, slots = -(-n // lanes), -(-k // CHUNK) * CHUNK // 2
    return (tiles, slots // 2, 2 * lanes), (tiles, slots, lanes)


def is_native(values: torch.Tensor, lanes: int) -> bool:
    """Whether the order of `values` is the one that the kernel for its dtype reads."""
    return in_pairs(values, lanes) == (values.dtype == torch.bfloat16)


def in_pairs(values: torch.Tensor, lanes: int) -> bool:
    """Whether tiles hold pairs, (.., .., 2L), rather than one value of all rows after the other, (.., .., L)."""
    return values.shape[2] == 2 * lanes


def _tiled(values: torch.Tensor, lanes: int) -> torch.Tensor:
    """(N, 2 S), with N a multiple of lanes, as (T, S, 2 lanes) or (T, 2 S, lanes)."""
    rows = values.view(-1, lanes, values.shape[1])
    if values.dtype == torch.bfloat16:
        return huge_pages(rows.unflatten(2, (-1, 2)).transpose(1, 2).flatten(2).contiguous())
    return huge_pages(rows.transpose(1, 2).contiguous())


def _untiled(values: torch.Tensor, lanes: int) -> torch.Tensor:
    """The inverse of `_tiled`."""
    if in_pairs(values, lanes):
        values = values.unflatten(2, (lanes, 2)).transpose(1, 2).flatten(2)
    else:
        values = values.transpose(1, 2)
    return values.reshape(values.shape[0] * lanes, -1)
