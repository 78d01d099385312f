"""Products: how float32 matrices are multiplied while a command computes.

    GPU   with full precision, or with `--tf32` with 10 bits of mantissa
    CPU   in float32. On AMD's processors torch's MKL leaves AVX-512 alone; oneDNN, which torch has as well, uses it:
          2.2 times as fast on a Zen 5 core, at most about twice the rounding error (a single row is slower). torch
          gives it the products once it may round them to bfloat16, which oneDNN does only where there are units for
          that (AMX); a trial says whether it does. What was bfloat16 anyway (`of`) these units multiply exactly
"""

import contextlib
import functools
from collections.abc import Iterator

import torch

from . import environment

ERROR = 1e-5  # of a product of float32 matrices, relative; rounding to bfloat16 has 2e-3


@contextlib.contextmanager
def float32(tf32: bool = False) -> Iterator[None]:
    """Within the context, float32 products are as fast as their precision allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if by_onednn() else "high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def of(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within the context, float32 copies of numbers in `dtype` are multiplied on `device` with each other.

    On a CPU with units for bfloat16 (AMX) those multiply what was bfloat16 exactly and add in float32: faster than
    float32 products, and no less precise (tests/calibrate/test_statistics.py).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 and device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def by_onednn() -> bool:
    """Whether oneDNN is to multiply: on an AMD processor with AVX-512, and no GPU, whose products would be rounded."""
    can = environment.processor()
    if torch.cuda.is_available() or not can.get("avx512_bf16") or "AMD" not in can.get("cpu_name", ""):
        return False
    generator, before = torch.Generator().manual_seed(0), torch.get_float32_matmul_precision()
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    try:
        torch.set_float32_matmul_precision("medium")
        found, want = (a @ b).double(), a.double() @ b.double()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool((found - want).norm() <= ERROR * want.norm())
