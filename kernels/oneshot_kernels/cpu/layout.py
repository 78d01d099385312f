"""How weights lie in memory for linear.cpp: tiles of L rows, one row on each SIMD lane. Made at load, never stored.

    L   lanes of the variant: 16 (AVX-512), 8 (AVX2), 4 (NEON)      T   tiles, ceil(N / L)
    K'  K rounded up to whole chunks of 32 columns                  G   groups of four, K' / 4

2:4 (`to_tiles`), from the format of reference.py:

    values    (T, G, 2L): the group's two kept values of every row; L pairs in bfloat16, because a shift and a mask turn
              a pair into two floats; in float16 and float32 the first of all rows, then the second of all
    metadata  (T, K'/32, L) int32: a row's eight groups of a chunk, four bits each, the first lowest

Dense (`dense_tiles`): (T, K'/2, 2L), two columns in the place of two kept values. Rows and columns that pad are zero.
"""

import torch
import torch.nn.functional as F

from ..reference import Packed, check

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


def _tiled(values: torch.Tensor, lanes: int) -> torch.Tensor:
    """(N, 2 S), with N a multiple of lanes, as (T, S, 2 lanes)."""
    four = values.view(-1, lanes, values.shape[1] // 2, 2)
    return four.permute(*((0, 2, 1, 3) if _in_pairs(values) else (0, 2, 3, 1))).flatten(2).contiguous()


def _untiled(values: torch.Tensor, lanes: int) -> torch.Tensor:
    """The inverse of `_tiled`."""
    if _in_pairs(values):
        four = values.unflatten(2, (lanes, 2)).permute(0, 2, 1, 3)
    else:
        four = values.unflatten(2, (2, lanes)).permute(0, 3, 1, 2)
    return four.reshape(four.shape[0] * four.shape[1], -1)


def _in_pairs(values: torch.Tensor) -> bool:
    return values.dtype == torch.bfloat16
