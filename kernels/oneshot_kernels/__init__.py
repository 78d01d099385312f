"""2:4 sparse linear layers: a packed format, kernels that compute with it faster than dense, and an nn.Module.

    reference   the format (pack, unpack), reference results     dispatch   which kernel runs, and why (problem)
    linear      Sparse24Linear                                   ops        the torch operator
    fuse        sparsify(model)                                  gpu/       Triton kernels for NVIDIA GPUs
    rounded     Rounded24Linear: int8, int4                      cpu/       compiled kernels for CPUs
    columns     SparseGPT's loop over the columns

Needs torch; on a GPU also Triton.
"""

from .cpu.decode import decoder_of, fast_decode
from .dispatch import explain
from .fuse import Report, sparsify
from .linear import Sparse24Linear
from .reference import Packed, is_24, pack, unpack
from .rounded import Rounded24Linear

__all__ = ["Packed", "Report", "Rounded24Linear", "Sparse24Linear", "decoder_of", "explain", "fast_decode", "is_24",
           "pack", "sparsify", "unpack"]
