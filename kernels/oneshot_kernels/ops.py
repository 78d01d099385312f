"""The operator `oneshot_kernels::linear`: one opaque node for torch.compile, which chooses the kernel inside.

    M, N, K   tokens, outputs, inputs        rows   rows of the weight: N, or 2N with SwiGLU

There is no host synchronisation and no data-dependent Python (except for the self-test at a variant's first call), and
temporaries come from torch's allocator, so CUDA graphs can capture it after one warm-up call.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from . import dispatch, reference
from .cpu import layout, library
from .cpu import linear as cpu_linear
from .gpu import prefill
from .gpu.fragment import K_BLOCK, K_PAD, ROWS, from_fragments, padded_rows

if dispatch.triton is not None:
    from .gpu import decode, expand, selftest


def compute(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_gain: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    swiglu: bool = False,
    prefill_copy: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., K) times a packed weight -> (..., out_features) in x's dtype, as defined by `reference.linear`.

    values, metadata: row-major as on disk (2-D), in tiles (3-D, CPU), or in fragment order (4-D, GPU). bias: (rows,).
    residual: (..., out_features). norm_gain: (K,). prefill_copy: cuSPARSELt's copy of the weight, or None.

    Raises ValueError if shapes or dtypes do not match.
    """
    k = x.shape[-1]
    if values.ndim == 3 and residual is None and norm_gain is None:
        y = _in_tiles(x, values, metadata, out_features * (2 if swiglu else 1), bias)
        if y is not None:
            return F.silu(y[..., :out_features]) * y[..., out_features:] if swiglu else y
    _check(x, values, out_features, bias, residual, norm_gain, swiglu)
    flat = x.reshape(-1, k).contiguous()
    if flat.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    if residual is not None:
        residual = residual.reshape(-1, out_features).contiguous()
    if values.ndim == 2 and dispatch.uses_fragments(values.dtype, values.device):
        warnings.warn(
            "2:4 weights on the GPU are still row-major, which is slow: call Sparse24Linear.prepare()",
            stacklevel=2,
        )
    problem = make_problem(flat, values, out_features, swiglu, prefill_copy)
    choice = dispatch.choose(problem)
    if choice.path == "decode":
        norm = norm_gain is not None
        variant = selftest.variant(choice.config, flat.shape[0], k, x.dtype, x.device, norm, swiglu)
        if not selftest.trusted(variant):
            choice = dispatch.fallback(problem)
    extras = {
        "bias": bias,
        "residual": residual,
        "norm_gain": norm_gain,
        "norm_eps": norm_eps,
        "swiglu": swiglu,
    }
    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another than x's
        y = run(choice, flat, values, metadata, out_features, prefill_copy=prefill_copy, **extras)
    return y.view(*x.shape[:-1], out_features)


linear = torch.library.custom_op("oneshot_kernels::linear", compute, mutates_args=())


@linear.register_fake
def _(x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, out_features: int, *args: Any,
      **kwargs: Any) -> torch.Tensor:
    """The shape and dtype of the result, for torch.compile."""
    return x.new_empty(*x.shape[:-1], out_features)


def run(
    choice: dispatch.Choice,
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    n: int,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_gain: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    swiglu: bool = False,
    prefill_copy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run one path on x (M, K), contiguous -> (M, n). What the decode kernel fuses is done by torch in other paths.

    choice: the path and its launch parameters. Other arguments as for `linear`.
    """
    if choice.path == "decode":
        extras = {
            "bias": bias,
            "residual": residual,
            "norm_gain": norm_gain,
            "norm_eps": norm_eps,
            "swiglu": swiglu,
        }
        return decode.decode(x, values, metadata, n, config=choice.config, **extras)
    if norm_gain is not None:
        x = reference.rms_norm(x, norm_gain, norm_eps)
    if swiglu:
        gate, up = _gate_and_up(choice, x, values, metadata, n, bias, prefill_copy)
        y = F.silu(gate) * up
    else:
        y = _product(choice, x, values, metadata, n, bias, prefill_copy)
    return y if residual is None else y + residual


def _in_tiles(x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, rows: int,
              bias: torch.Tensor | None) -> torch.Tensor | None:
    """The product where the compiled kernel takes it, in as little Python as can be; None for anything unusual."""
    k = x.shape[-1]
    flat = x.reshape(-1, k)
    fits = x.dtype == values.dtype and (bias is None or (bias.dtype == x.dtype and tuple(bias.shape) == (rows,)))
    if not fits or not dispatch.takes_tiles(flat.shape[0], rows, k, x.dtype, values.shape, library.threads()):
        return None
    return cpu_linear.linear(flat.contiguous(), values, metadata, rows, bias).view(*x.shape[:-1], rows)


def make_problem(x: torch.Tensor, values: torch.Tensor, out_features: int, swiglu: bool,
                 prefill_copy: torch.Tensor | None) -> dispatch.Problem:
    """The Problem of multiplying x (M, K) by this weight."""
    rows = out_features * (2 if swiglu else 1)
    fragments, has_copy = values.ndim == 4, prefill_copy is not None
    return dispatch.Problem(x.shape[0], rows, x.shape[1], x.dtype, values.device, fragments, has_copy, swiglu,
                            *dispatch.on_cpu(values))


def _gate_and_up(choice: dispatch.Choice, x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, n: int,
                 bias: torch.Tensor | None,
                 prefill_copy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves (M, n) of an unfused SwiGLU; padding rows that either half has in fragment order are cut off."""
    padded = choice.path in ("middle", "scratch") and values.ndim == 4
    rows = padded_rows(2 * n, row_blocks=2) if padded else 2 * n
    y = _product(choice, x, values, metadata, rows, None, prefill_copy, row_blocks=2)
    if bias is None:
        return y[:, :n], y[:, rows // 2 : rows // 2 + n]
    return y[:, :n] + bias[:n], y[:, rows // 2 : rows // 2 + n] + bias[n:]


def _product(choice: dispatch.Choice, x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, rows: int,
             bias: torch.Tensor | None, prefill_copy: torch.Tensor | None, row_blocks: int = 1) -> torch.Tensor:
    """x (M, K) times the weight, by any path but decode -> (M, rows)."""
    if choice.path == "middle":
        return expand.matmul(x, values, metadata, rows, bias=bias, config=choice.config)
    if choice.path == "sparselt":
        return prefill.sparselt(x, prefill_copy, rows, bias=bias, algorithm=choice.config)
    if choice.path == "scratch":
        return prefill.through_scratch(x, values, metadata, rows, bias=bias)
    if choice.path == "tiles":
        return cpu_linear.linear(x, values, metadata, rows, bias)
    if choice.path == "expand":
        return cpu_linear.through_dense(x, values, metadata, rows, bias)
    if values.ndim == 4:
        values, metadata, _ = from_fragments(values, metadata, rows, x.shape[1], row_blocks)
    return F.linear(x, reference.unpack(values, metadata), bias)


def _check(x: torch.Tensor, values: torch.Tensor, out_features: int, bias: torch.Tensor | None,
           residual: torch.Tensor | None, norm_gain: torch.Tensor | None, swiglu: bool) -> None:
    """Raise ValueError if shapes or dtypes do not match."""
    rows, k = out_features * (2 if swiglu else 1), x.shape[-1]
    if values.ndim == 2:
        fits = tuple(values.shape) == (rows, k // 2) and k % 4 == 0
    elif values.ndim == 3:
        fits = tuple(values.shape) in layout.shapes(rows, k, cpu_linear.lanes())
    else:
        tiles = padded_rows(rows, 2 if swiglu else 1) // ROWS
        fits = tuple(values.shape[:2]) == (tiles, -(-k // K_PAD) * K_PAD // K_BLOCK)
    if not fits:
        raise ValueError(f"x has {k} features and {rows} rows are asked for; the packed weight has another shape")
    tensors = {"x": x, "bias": bias, "residual": residual, "norm_gain": norm_gain}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != values.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the packed weight {values.dtype}: convert one of them")
    shapes = {
        "bias": (bias, (rows,)),
        "residual": (residual, (*x.shape[:-1], out_features)),
        "norm_gain": (norm_gain, (k,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
