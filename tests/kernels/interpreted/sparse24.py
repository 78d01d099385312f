"""What the interpreted tests share: random problems, and the rule a kernel is judged by."""

import torch
import torch.nn.functional as F
from oneshot_kernels import pack
from oneshot_kernels.gpu.selftest import random_24, relative_error
from oneshot_kernels.reference import linear, rms_norm

FLOAT32_ROUNDING = torch.finfo(torch.float32).eps


def problem(n, k, m, dtype, *, bias=False, residual=False, norm=False, swiglu=False):
    """(x (M, K), Packed, extras of reference.linear): random, x followed in memory by NaNs that no mask may let in."""
    generator = torch.Generator().manual_seed(n * k + m)
    rows = 2 * n if swiglu else n
    weight = random_24(rows, k, dtype, generator)
    weight[torch.rand(rows, k, generator=generator) < 0.1] = 0  # groups with fewer than two nonzeros
    poisoned = torch.full((m * k + 4096,), torch.nan, dtype=dtype)
    x = poisoned[: m * k].view(m, k)
    x.copy_(torch.randn(m, k, generator=generator))
    extras = {
        "bias": torch.randn(rows, generator=generator).to(dtype) if bias else None,
        "residual": torch.randn(m, n, generator=generator).to(dtype) if residual else None,
        "norm_gain": (torch.rand(k, generator=generator) + 0.5).to(dtype) if norm else None,
        "norm_eps": 1e-5,
        "swiglu": swiglu,
    }
    return x, pack(weight), extras


def plain_torch(x, packed, *, bias, residual, norm_gain, norm_eps, swiglu):
    """The same computation as a user of dense torch gets it: 16-bit inputs and norm, float32 accumulation."""
    from oneshot_kernels import unpack

    h = x if norm_gain is None else rms_norm(x, norm_gain, norm_eps)
    y = F.linear(h.float(), unpack(packed.values, packed.metadata).float(), None if bias is None else bias.float())
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.float()


def assert_as_good_as_torch(y, x, packed, extras):
    """At most twice plain torch's error (flash-attention's rule), on float32 outputs, plus one float32 rounding."""
    truth = linear(x, packed, **extras)
    assert y.dtype == torch.float32 and y.shape == truth.shape
    limit = 2 * relative_error(plain_torch(x, packed, **extras), truth) + FLOAT32_ROUNDING
    assert relative_error(y, truth) <= limit
