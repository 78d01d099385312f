"""gpu.py, part four: what others offer for the same layer, as rows of the table.

    dense       F.linear on the bfloat16 weight                       int8   torch's weight-only product, a scale a row
    sparselt    cuSPARSELt, the best algorithm its search finds       int4   torch's tinygemm, groups of 128
    cutlass     torch's CUTLASS 2:4

The last two are dense: fewer bits instead of fewer weights. They round the weights, so their error is another matter.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_measure import Bench
from oneshot_kernels.gpu import prefill, tune
from oneshot_kernels.gpu.selftest import relative_error

LIMITS = {"int8": 2e-2, "int4": 0.2}
"""Largest error relative to float64 of a baseline that may be timed, `tune.LIMIT` for the exact ones."""
BYTES = {"dense": 1.0, "int8": 1 / 2, "int4": 17 / 64}
"""Weight bytes over the dense ones; whatever is 2:4 reads 9 / 16."""
GROUP = 128


def int8(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (M, K) -> (M, N) with the weight (N, K) in int8, one scale a row."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
    q = (weight.float() / scale).round().to(torch.int8)
    scale = scale.flatten().to(weight.dtype)
    return lambda x: torch._weight_int8pack_mm(x, q, scale)


def int4(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """x (M, K) bfloat16 -> (M, N) with the weight (N, K) in 4 bits: (q - 8) · scale + zero in each group."""
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8)
    q = ((groups - low) / scale).round().to(torch.int32).view(n, k)
    scale_and_zero = torch.cat((scale, low + 8 * scale), dim=-1).transpose(0, 1).contiguous().to(weight.dtype)
    if weight.is_cuda:  # two to a byte, the first in the high half
        packed = torch._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8), 8)
        return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, scale_and_zero)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scale_and_zero)


def cutlass(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch's semi-structured tensor behind F.linear."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    sparse = SparseSemiStructuredTensorCUTLASS.from_dense(weight)
    return lambda x: F.linear(x, sparse)


def sparselt(x: torch.Tensor, weights: list[torch.Tensor]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """One call for each weight, all with the algorithm found best on the first."""
    n, blobs = weights[0].shape[0], [prefill.compress(w) for w in weights]
    algorithm = prefill.best_algorithm(x, blobs[0], n)
    return [functools.partial(prefill.sparselt, blob=b, n=n, algorithm=algorithm) for b in blobs]


def baselines(bench: Bench, shape: tune.Shape, tokens: int) -> list[dict]:
    """A row for each baseline; one that fails or computes something else says so in its row and is not timed."""
    weight, x = bench.weight(shape.rows, shape.k), bench.randn(tokens, shape.k)
    truth = x.double() @ weight.double().T
    dense = [weight.clone() for _ in range(bench.copies(weight.nbytes))]
    methods = {
        "dense": lambda: [functools.partial(F.linear, weight=w) for w in dense],
        "sparselt": lambda: sparselt(x, dense),
        "cutlass": lambda: [cutlass(w) for w in dense],
        "int8": lambda: [int8(w) for w in dense],
        "int4": lambda: [int4(w) for w in dense],
    }
    rows = []
    for method, make in methods.items():
        common = {"stage": "table", "n": shape.rows, "k": shape.k, "tokens": tokens, "method": method}
        try:
            calls = [functools.partial(call, x) for call in make()]
            tune.poison(tokens, shape.rows, bench.dtype, bench.device)
            error = relative_error(calls[0](), truth)
            if not error <= LIMITS.get(method, tune.LIMIT):
                raise RuntimeError(f"relative error {error:.3g}")
            rows.append({**common, "error": error, "us": bench.time(calls)})
        except (RuntimeError, NotImplementedError, AttributeError) as failure:
            if method == "dense":
                raise
            rows.append({**common, "config": f"failed: {failure}".splitlines()[0][:120]})
    return rows
