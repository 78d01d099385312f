"""Many tokens: cuSPARSELt on its own copy of the weights, or expansion into a temporary and a dense product.

    M, N, K   tokens, outputs, inputs

`torch._cslt_compress` turns a dense 2:4 weight into cuSPARSELt's opaque format, which takes another 0.5625 of the dense
bytes, so this copy is made only on request (`prefill_copy=True`). Without it the weight in fragment order is expanded
into a temporary that cuBLAS multiplies: slower than dense by at most one write and one read of the dense weight.
"""

import torch
import torch.nn.functional as F

_ALIGN = 8
"""cuSPARSELt needs 16-bit activations in multiples of 8 rows (torch.sparse.SparseSemiStructuredTensorCUSPARSELT)."""


def sparselt_refuses(n: int, k: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why cuSPARSELt cannot be used with a weight (n, k), or None if it can."""
    if device.type != "cuda" or torch.version.hip:
        return "cuSPARSELt needs an NVIDIA GPU"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "cuSPARSELt needs compute capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"prefill takes float16 and bfloat16, not {dtype}"
    if n % 16 or k % 16:
        return f"cuSPARSELt needs N and K divisible by 16, got {n} x {k}"
    return None


def compress(dense: torch.Tensor) -> torch.Tensor:
    """Dense 2:4 weight (N, K) on a GPU -> cuSPARSELt's copy, 1-D uint8 so that no cast of a module changes it."""
    return torch._cslt_compress(dense).flatten().view(torch.uint8)


def _padded(x: torch.Tensor) -> torch.Tensor:
    """x (M, K) with M padded to a multiple of 8."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % _ALIGN))


def sparselt(
    x: torch.Tensor, blob: torch.Tensor, n: int, *, bias: torch.Tensor | None = None, algorithm: int = 0
) -> torch.Tensor:
    """x (M, K) times the weight compressed in `blob` -> (M, n) in x's dtype, by cuSPARSELt's algorithm `algorithm`."""
    compressed = _typed(blob, x, n)
    y = torch._cslt_sparse_mm(compressed, _padded(x).t(), bias=bias, transpose_result=True, alg_id=algorithm)
    return y[: x.shape[0]]


def best_algorithm(x: torch.Tensor, blob: torch.Tensor, n: int) -> int:
    """The number of the algorithm that cuSPARSELt finds best for this shape; it runs and times kernels to find out."""
    return torch._cslt_sparse_mm_search(_typed(blob, x, n), _padded(x).t(), transpose_result=True)


def _typed(blob: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    """The blob as _cslt_compress has shaped it: torch takes N from its first dimension."""
    return blob.view(x.dtype).view(n, -1)


def through_scratch(
    x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, n: int, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (M, K) times a weight in fragment order, which is first expanded to a temporary of 2·n·K bytes -> (M, n)."""
    from .expand import expand

    return F.linear(x, expand(values, metadata, n, x.shape[1]), bias)
