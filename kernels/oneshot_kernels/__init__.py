"""2:4 sparse linear layers: a packed format, kernels that run it faster than dense, and a module around them.

    reference   the format (pack, unpack) and the slow truth     dispatch   which kernel runs, and why
    linear      Sparse24Linear                                   ops        the torch operator
    fuse        sparsify(model)                                  gpu/       Triton kernels for NVIDIA GPUs

Needs torch; on a GPU also Triton.
"""

from .dispatch import explain
from .fuse import Report, sparsify
from .linear import Sparse24Linear
from .reference import Packed, is_24, pack, unpack

__all__ = ["Packed", "Report", "Sparse24Linear", "explain", "is_24", "pack", "sparsify", "unpack"]
