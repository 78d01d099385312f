"""Check the decode kernel on the GPU itself, once per process and compiled variant.

The kernel relies on which lane gets which element of an inline-assembly operand. Triton does not guarantee that, so
with a new Triton, driver or GPU it could silently compute wrong results. A small product is compared with float64.
"""

import functools
import warnings
from dataclasses import dataclass, replace

import torch
import triton

from .. import reference
from ..reference import random_24, relative_error
from .decode import TOKEN_TILE, Config, decode, shape_flags
from .fragment import K_PAD, ROWS, to_fragments
from .mma_sp import INTERPRET

LIMIT = 2e-2
"""Largest accepted relative error. In bfloat16 it is 2e-3, with norm or gate 6e-3; with a wrong lane it is about 1."""


@dataclass(frozen=True)
class Variant:
    """The properties of a launch that affect compilation, and so could change the layout."""

    config: Config
    tokens: int
    dtype: torch.dtype
    device: torch.device
    norm: bool
    swiglu: bool
    whole_k: bool
    even_warps: bool


def variant(config: Config, tokens: int, k: int, dtype: torch.dtype, device: torch.device, norm: bool,
            swiglu: bool) -> Variant:
    """The Variant that a call with this many tokens and k inputs uses."""
    warps, whole_k, even_warps = shape_flags(k, config)
    tile_tokens = -(-tokens // TOKEN_TILE) * TOKEN_TILE
    return Variant(replace(config, warps=warps), tile_tokens, dtype, device, norm, swiglu, whole_k, even_warps)


def measure(v: Variant) -> float:
    """The relative error of one compiled variant on a random problem that exercises every part of it."""
    device, dtype, swiglu = v.device, v.dtype, v.swiglu
    generator = torch.Generator(device=device).manual_seed(0)
    n = 2 * ROWS * v.config.row_tiles
    k = (2 * v.config.warps + (not v.even_warps)) * K_PAD - (0 if v.whole_k else 252)
    packed = reference.pack(random_24(2 * n if swiglu else n, k, dtype, generator))
    x = torch.randn(v.tokens, k, generator=generator, device=device).to(dtype)
    extras = {
        "bias": torch.randn(packed.shape[0], generator=generator, device=device).to(dtype),
        "residual": torch.randn(v.tokens, n, generator=generator, device=device).to(dtype),
        "norm_gain": torch.rand(k, generator=generator, device=device).to(dtype) + 0.5 if v.norm else None,
        "norm_eps": 1e-5,
        "swiglu": swiglu,
    }
    y = decode(x, *to_fragments(packed, 2 if swiglu else 1), n, config=v.config, **extras)
    return relative_error(y, reference.linear(x, packed, **extras))


@functools.cache
def trusted(v: Variant) -> bool:
    """Whether this variant computes correct results on this GPU; if not, it warns, once.

    Raises RuntimeError when first called during CUDA graph capture, where results cannot be compared.
    """
    if INTERPRET:
        return True
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call of a 2:4 layer at a new number of tokens cannot happen inside CUDA graph capture: "
            "run the model once with the same shapes before capturing"
        )
    error = measure(v)
    if error <= LIMIT:
        return True
    warnings.warn(
        f"2:4 decode kernel FAILED its self-test on {torch.cuda.get_device_name(v.device)}: relative error {error:.3g} "
        f"for {v}. The slower middle kernel runs instead. Please report this, with torch {torch.__version__} and "
        f"triton {triton.__version__}",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
