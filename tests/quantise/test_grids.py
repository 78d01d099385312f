"""Grids: what is on one stays where it is, the nearest value is taken, GGUF's bits, bytes counted by hand."""

import pytest
import torch

from oneshot.prune.patterns import NM, parse
from oneshot.quantise import grids
from oneshot.quantise.grids import GGUF, Integers

ALL = ["int8", "int4", "int4:64", "int4:32", "int5", "int3:row", "int2:64", "int8:row", "int16", "q8_0", "q4_0"]


def weight(R=5, C=320, seed=0, dtype=torch.float64):
    W = torch.randn(R, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    W[1] = 0
    W[2, :64] *= 1e-3
    return W.to(dtype)


@pytest.mark.parametrize("text", ALL)
def test_the_text_is_read_back(text):
    assert str(grids.parse(text)) == text
    assert grids.parse("int4:128") == grids.parse("int4") == Integers(4, 128)


@pytest.mark.parametrize("text", ["int1", "int17", "int4:0", "int4:", "int4:64:2", "4", "q5_0", "int", "int4:rows", ""])
def test_what_is_no_grid_is_refused(text):
    with pytest.raises(ValueError, match="no such integers"):
        grids.parse(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", ALL)
def test_values_are_on_the_grid_and_stay_there(text, dtype):
    grid, W = grids.parse(text), weight(dtype=dtype)
    s = grid.scales(W)
    codes = grid.round(W, s)
    value = grid.value(codes, s)
    assert s.shape == (5, -(-320 // grid.width(320))) and torch.equal(s.half().to(dtype), s)
    assert codes.min() >= grid.low and codes.max() <= grid.high and torch.equal(codes, codes.round())
    assert not value[1].any() and s.dtype == codes.dtype == value.dtype == dtype
    assert torch.equal(grid.round(value, s), codes)
    step = grid.spread(s.abs(), 320)
    room = grid.spread(torch.cat([p.abs().amax(1, keepdim=True) for p in grid.groups(W)], 1), 320) / 2**10
    assert bool(((value - W).abs() <= (0.5 if text != "q4_0" else 1) * step + room).all())  # q4_0 cuts off on one side


@pytest.mark.parametrize("text", ["int4", "int3:64", "int8:row"])
def test_no_code_is_nearer(text):
    grid, W = grids.parse(text), weight(3, 128)
    s = grid.scales(W)
    value, step = grid.value(grid.round(W, s), s), grid.spread(s, 128)
    for code in range(grid.low, grid.high + 1):
        assert bool(((value - W).abs() <= (code * step - W).abs() + 1e-12).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_gguf_gives_these_bits(bits):
    gguf = pytest.importorskip("gguf")
    kind = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}[bits]
    halves = torch.arange(-16, 16).float().mul_(0.5).repeat(1, 10)  # ties, and the same largest twice
    for W in (weight(64, 320, 1, torch.float32), weight(4, 64, 2, torch.float32) * 1e4, halves):
        grid = GGUF(bits)
        s = grid.scales(W)
        codes = grid.round(W, s)
        theirs = gguf.quants.quantize(W.numpy(), kind)
        blocks = torch.from_numpy(theirs.copy()).view(len(W), -1, 34 if bits == 8 else 18)
        assert torch.equal(blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float(), s)
        data = blocks[..., 2:]
        if bits == 8:
            read = data.view(torch.int8).flatten(1)
        else:
            read = torch.cat((data & 15, data >> 4), -1).flatten(1).to(torch.int8) - 8
        assert torch.equal(read, codes.to(torch.int8))
        assert torch.equal(torch.from_numpy(gguf.quants.dequantize(theirs, kind)), grid.value(codes, s))
        assert theirs.nbytes == grid.bytes(*W.shape)


def test_gguf_wants_whole_blocks():
    with pytest.raises(ValueError, match="divisible by 32"):
        GGUF(4).check(3, 48)
    GGUF(4).check(3, 64)
    Integers(4).check(3, 48)


@pytest.mark.parametrize(("text", "pattern", "R", "C", "want"), [
    ("int4", None, 8, 256, 1024 + 32), ("int4:64", None, 8, 256, 1024 + 64), ("int4:row", None, 8, 200, 800 + 16),
    ("int8:row", None, 3, 5, 15 + 6), ("int3:64", None, 2, 100, 75 + 8), ("q8_0", None, 2, 64, 2 * 2 * 34),
    ("q4_0", None, 2, 64, 2 * 2 * 18), ("int4:64", "2:4", 8, 256, 512 + 256 + 64),
    ("int8:row", "2:4", 8, 256, 1024 + 256 + 16), ("int8", "0.5", 8, 256, 1024 + 256 + 32),
    ("int4", "0.5", 8, 256, 512 + 256 + 32), ("int2", "2:4", 8, 256, 512 + 32),
    ("int4", "dense", 8, 256, 1024 + 32), ("q4_0", "2:4", 2, 64, 2 * 2 * 18)])
def test_bytes(text, pattern, R, C, want):
    assert grids.parse(text).bytes(R, C, parse(pattern) if pattern else None) == want


def test_two_of_four_int4_takes_as_much_as_int3():
    """3 bits a weight: half of 4, and a bit for the positions."""
    assert Integers(4, 64).bytes(64, 512, NM(2, 4)) == Integers(3, 64).bytes(64, 512)
