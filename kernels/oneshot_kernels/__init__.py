"""2:4 sparse linear layers: a packed format, kernels that run it faster than dense, and a module around them.

    reference.py   the format (pack, unpack) and the slow truth      dispatch.py   which kernel runs, and why
    fragment.py    the order the tensor cores want                   tune.py       measure it on your GPU
    mma_sp.py      the sparse tensor-core instruction in Triton      ops.py        the torch operator
    decode.py      1 to 64 tokens                                    linear.py     Sparse24Linear
    expand.py      64 to 512 tokens, every other GPU                 fuse.py       sparsify(model)
    prefill.py     many tokens                                       selftest.py   asks the GPU whether decode is right

Needs torch; on a GPU also Triton.
"""

from .dispatch import explain
from .fuse import Report, sparsify
from .linear import Sparse24Linear
from .reference import Packed, is_24, pack, unpack

__all__ = ["Packed", "Report", "Sparse24Linear", "explain", "is_24", "pack", "sparsify", "unpack"]
