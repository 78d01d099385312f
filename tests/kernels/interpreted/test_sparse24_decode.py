"""The decode kernel against float64, under Triton's interpreter."""

import pytest
import torch
from oneshot_kernels.gpu.decode import Config, decode
from oneshot_kernels.gpu.fragment import to_fragments
from sparse24 import assert_as_good_as_torch, problem

BF16, FP16 = torch.bfloat16, torch.float16
TWO_TILES = Config(row_tiles=2, warps=4, stages=2)
STAGED = Config(warps=4, direct_x=False)  # x through shared memory, as for every K that is not whole
CASES = [  # N, K, tokens, dtype, extras, launch parameters
    (16, 256, 1, BF16, {}, None),
    (7, 4, 9, BF16, {"bias": True}, None),
    (40, 36, 5, FP16, {"bias": True, "residual": True}, TWO_TILES),  # 3 row tiles, 2 per program
    (17, 172, 9, BF16, {"norm": True}, None),
    (16, 512, 8, FP16, {"norm": True, "bias": True}, TWO_TILES),
    (
        20,
        512,
        3,
        BF16,
        {"swiglu": True, "norm": True, "bias": True},
        None,
    ),  # gate and up each end inside a tile
    (40, 36, 2, FP16, {"swiglu": True, "residual": True}, TWO_TILES),
    (17, 11 * 256, 2, BF16, {"norm": True}, None),  # 11 blocks for 8 warps, as 43 in Llama-2-7B's down_proj
    (16, 3 * 256, 2, BF16, {"norm": True}, STAGED),
    (16, 512, 9, FP16, {}, STAGED),
    (16, 3 * 256, 11, BF16, {}, Config(warps=2)),
    (16, 256, 17, FP16, {}, None),
    (16, 256, 64, BF16, {"residual": True}, None),
    (20, 1024 + 36, 33, BF16, {"norm": True, "residual": True}, None),  # five token tiles, the last with one token
    (16, 11008, 1, BF16, {"bias": True}, None),
]


@pytest.mark.parametrize(("n", "k", "m", "dtype", "options", "config"), CASES)
def test_decode_is_as_good_as_torch(n, k, m, dtype, options, config):
    x, packed, extras = problem(n, k, m, dtype, **options)
    fragments = to_fragments(packed, 2 if extras["swiglu"] else 1)
    y = decode(x, *fragments, n, **extras, out_dtype=torch.float32, config=config)
    assert_as_good_as_torch(y, x, packed, extras)


def test_decode_rounds_to_the_dtype_of_x():
    x, packed, extras = problem(16, 64, 3, FP16)
    fragments = to_fragments(packed)
    wide = decode(x, *fragments, 16, **extras, out_dtype=torch.float32)
    assert torch.equal(decode(x, *fragments, 16, **extras), wide.half())


def test_x_may_start_at_an_odd_element():
    x, packed, _extras = problem(16, 64, 3, BF16)
    odd = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(3, 64)
    assert odd.storage_offset() == 1
    fragments = to_fragments(packed)
    assert torch.equal(decode(odd, *fragments, 16), decode(x, *fragments, 16))


def test_too_many_tokens_are_refused():
    x, packed, _extras = problem(16, 64, 65, BF16)
    with pytest.raises(ValueError, match="1 to 64 tokens, got 65"):
        decode(x, *to_fragments(packed), 16)
