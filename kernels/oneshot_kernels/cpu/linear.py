"""Linear layers on a CPU, compiled: 2:4 weights and, best for few tokens, dense ones in float32, bfloat16 and float16.

    M, N, K   tokens, outputs, inputs

Accumulation is in float32; results are rounded once, to the dtype of x. Rows of the weight are independent, so any
number of threads gives the same bits, and so are tokens (bfloat16 on tile registers, amx.h: but for one alone, which is
computed on vectors). Weights are in tiles (layout.py).
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import reference
from . import layout, library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PART = 1 << 22
"""Bytes of a weight that are dense at once: less than the caches hold, and enough rows for torch's products."""
SERIAL = 1 << 15
"""Weights below which a second thread costs more than it saves for 64 tokens: waking it takes some microseconds."""


def available() -> bool:
    """Whether the library is there; compiles and tests it at the first call."""
    return _library() is not None


def lanes() -> int:
    """L, the rows of a tile. Only where `available`."""
    return _library().lanes()


def linear(x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor | None, n: int,
           bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, K), contiguous, times a weight (n, K) in tiles, plus bias (n,) -> (M, n). All of one dtype.

    metadata: None for a dense weight. Nothing is checked here, shapes least of all: `Sparse24Linear` does.
    """
    y = x.new_empty(x.shape[0], n)
    threads = threads_for(len(x), n, x.shape[1])
    failed = _library().linear(x.data_ptr(), values.data_ptr(), None if metadata is None else metadata.data_ptr(),
                               None if bias is None else bias.data_ptr(), y.data_ptr(), x.shape[0], n, x.shape[1],
                               TYPES[x.dtype], threads)
    if failed:
        raise RuntimeError(f"no memory for {x.shape[0]} tokens of {x.shape[1]} inputs")
    return y


def threads_for(m: int, n: int, k: int) -> int:
    """Threads for m tokens and a weight (n, k)."""
    return library.threads() if n * k * max(1, m // 64) >= SERIAL else 1


def through_dense(x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, n: int,
                  bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` of 2:4 tiles, in either order, for many tokens: `in_parts`."""
    lanes = metadata.shape[2]
    return in_parts(x, n, lanes, bias, lambda row, out: expand(values[row // lanes :], metadata[row // lanes :], out))


def in_parts(x: torch.Tensor, n: int, lanes: int, bias: torch.Tensor | None,
             expand: Callable[[int, torch.Tensor], object]) -> torch.Tensor:
    """x (M, K) times a weight (n, K), plus bias: torch's products, with PART bytes of the weight dense at a time, which
    stay in the cache. expand(first, out) writes the rows from `first` on, a multiple of `lanes`, into out (rows, K)."""
    k = x.shape[1]
    rows = max(1, PART // (k * x.element_size() * lanes)) * lanes
    dense, y = x.new_empty(min(n, rows), k), x.new_empty(x.shape[0], n)
    for first in range(0, n, rows):
        part, own = dense[: n - first], slice(first, first + rows)
        expand(first, part)
        if bias is None:
            torch.mm(x, part.t(), out=y[:, own])
        else:
            torch.addmm(bias[own], x, part.t(), out=y[:, own])
    return y


def expand(values: torch.Tensor, metadata: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the first rows of 2:4 tiles, in either order, into out (n, K), dense; returns it."""
    _library().expand(values.data_ptr(), metadata.data_ptr(), out.data_ptr(), *out.shape, TYPES[values.dtype],
                      layout.in_pairs(values, metadata.shape[2]), library.threads())
    return out


def function() -> Any:
    """The compiled function itself, for step.cpp; None where there is none."""
    return None if _library() is None else _library().linear


def _library() -> ctypes.CDLL | None:
    """The compiled library, or None."""
    return library.load("linear", _declare, _self_test)


def _declare(cdll: ctypes.CDLL) -> None:
    """The functions' argument types."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    cdll.lanes.argtypes, cdll.lanes.restype = [], ctypes.c_int
    cdll.linear.argtypes, cdll.linear.restype = [pointer] * 5 + [number] * 5, ctypes.c_int
    cdll.expand.argtypes, cdll.expand.restype = [pointer] * 3 + [number] * 5, None


def _self_test(cdll: ctypes.CDLL) -> str | None:
    """What is wrong on small products that go through every part of the code, or None."""
    generator = torch.Generator().manual_seed(0)
    lanes, k = cdll.lanes(), 1100  # more than one flush, and a chunk that is not full
    n = 4 * lanes + 3  # five tiles
    for dtype, code in TYPES.items():
        groups = torch.randn(n, k // 4, 4, generator=generator)
        kept = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2, dim=-1).indices, 1.0)
        weight = (groups * kept).view(n, k).to(dtype)
        bias, every = torch.randn(n, generator=generator).to(dtype), torch.randn(70, k, generator=generator).to(dtype)
        dense = layout.dense_tiles(weight, lanes), None
        for form, (values, metadata) in {"2:4": layout.to_tiles(reference.pack(weight), lanes), "dense": dense}.items():
            at = None if metadata is None else metadata.data_ptr()
            for m in (1, 15, 70):
                x, y = every[:m], torch.full((m, n), torch.nan, dtype=dtype)
                cdll.linear(x.data_ptr(), values.data_ptr(), at, bias.data_ptr(), y.data_ptr(), m, n, k, code, 2)
                truth = F.linear(x.double(), weight.double(), bias.double())
                error = float((y.double() - truth).norm() / truth.norm())
                if not error <= 4 * torch.finfo(dtype).eps:
                    return f"{form} {dtype}, {m} tokens: relative error {error:.3g}"
            if metadata is not None:
                out = torch.full_like(weight, torch.nan)
                cdll.expand(values.data_ptr(), at, out.data_ptr(), n, k, code, layout.in_pairs(values, lanes), 2)
                if not torch.equal(out, weight):
                    return f"expanding 2:4 {dtype}"
    return None
