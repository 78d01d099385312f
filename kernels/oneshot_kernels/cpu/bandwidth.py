"""How fast this machine reads memory: what a kernel that only moves weights cannot beat."""

import ctypes

import torch

from . import library

PIECE = 4 << 16  # bytes; what is left over at the end is not read


def read(tensor: torch.Tensor) -> int:
    """Read a contiguous tensor once with torch's threads; returns the sum of its 32-bit words, modulo 2^32.

    Raises RuntimeError where nothing can be compiled.
    """
    cdll = library.load("bandwidth", _declare, _self_test)
    if cdll is None:
        raise RuntimeError(f"the read limit cannot be measured: {library.why('bandwidth')}")
    return cdll.read_all(tensor.data_ptr(), tensor.numel() * tensor.element_size(), library.threads())


def _declare(cdll: ctypes.CDLL) -> None:
    """The function's argument types."""
    cdll.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    cdll.read_all.restype = ctypes.c_uint32


def _self_test(cdll: ctypes.CDLL) -> str | None:
    """What is wrong, or None."""
    words = torch.arange(3 * PIECE // 4, dtype=torch.int32)
    got, want = cdll.read_all(words.data_ptr(), 3 * PIECE, 2), int(words.sum()) % 2**32
    return None if got == want else f"a sum of {got} instead of {want}"
