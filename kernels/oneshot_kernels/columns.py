"""SparseGPT's loop over the columns of one block where it is fast: compiled on a CPU, one launch on a GPU.

`current`, what the columns before a block make of it, is compiled on a CPU alone; a GPU's library is fast enough.

cpu/column_loop.py says what it computes; gpu/column_loop.py is the same in Triton.
"""

import torch

from .cpu import column_loop
from .cpu.column_loop import Grid

try:
    from .gpu import column_loop as launched
except ImportError:  # no Triton here
    launched = None

__all__ = ["Grid", "available", "current", "kind", "solve"]


def available(W: torch.Tensor, nm: tuple[int, int] | None = None) -> bool:
    """Whether `solve` can run on a block like W (b, R), choosing n of m if nm is given."""
    return column_loop.available(W) or bool(launched and launched.takes(W, nm))


def solve(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: tuple[int, int] | None = None,
          grid: Grid | None = None) -> None:
    """`cpu.column_loop.solve` where W is. Only for what is `available`."""
    run = column_loop if column_loop.available(W) else launched
    run.solve(W, U, mask, nm, grid)


def current(E: torch.Tensor, V: torch.Tensor, before: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """`cpu.column_loop.current` where E is, in torch where nothing is compiled."""
    return (column_loop.current if column_loop.available(E) else column_loop.current_reference)(E, V, before, out)


def kind(device: str) -> str:
    """What runs the loop on a device: a variant of the compiled library such as "avx512", "triton", or "torch"."""
    like = torch.empty(1, 1, device=device)
    return column_loop.kind(device) if like.device.type == "cpu" else "triton" if available(like) else "torch"
