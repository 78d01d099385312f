"""The middle kernel and scratch expansion, under Triton's interpreter."""

import pytest
import torch
from oneshot_kernels import unpack
from oneshot_kernels.gpu.expand import Config, expand, matmul
from oneshot_kernels.gpu.fragment import to_fragments
from sparse24 import assert_as_good_as_torch, problem

BF16, FP16 = torch.bfloat16, torch.float16
CASES = [  # N, K, tokens, dtype, extras, launch parameters
    (16, 256, 1, BF16, {}, None),
    (7, 4, 9, BF16, {"bias": True}, None),
    (40, 36, 5, FP16, {"residual": True}, Config(split=2)),  # one K step for two parts
    (33, 172, 70, BF16, {"bias": True, "residual": True}, None),
    (40, 260, 65, FP16, {"bias": True}, Config(rows=32, tokens=32, columns=64)),
    (24, 11 * 256, 66, BF16, {"bias": True, "residual": True}, Config(split=4, columns=128)),
]


@pytest.mark.parametrize(("n", "k", "m", "dtype", "options", "config"), CASES)
def test_matmul_is_as_good_as_torch(n, k, m, dtype, options, config):
    x, packed, extras = problem(n, k, m, dtype, **options)
    added = {"bias": extras["bias"], "residual": extras["residual"]}
    y = matmul(x, *to_fragments(packed), n, **added, out_dtype=torch.float32, config=config)
    assert_as_good_as_torch(y, x, packed, extras)


@pytest.mark.parametrize(("n", "k"), [(16, 256), (7, 4), (40, 36), (33, 172), (48, 520)])
def test_expand_is_bit_exact(n, k):
    _, packed, _ = problem(n, k, 1, BF16)
    dense = unpack(packed.values, packed.metadata)
    assert torch.equal(expand(*to_fragments(packed), n, k).view(torch.int16), dense.view(torch.int16))
