"""The packed format (reference.py) and the fragment order (fragment.py)."""

import itertools

import pytest
import torch
from oneshot_kernels import Packed, is_24, pack, unpack
from oneshot_kernels.gpu.fragment import from_fragments, to_fragments

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 4), (7, 36), (5, 172), (16, 512), (33, 260)]


def random_24(n, k, dtype, seed=0):
    """2:4 with every pattern of zero, one and two nonzeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).view(n, k // 4, 4)
    order = torch.rand(weight.shape, generator=generator).argsort(-1)
    kept = torch.randint(0, 3, (n, k // 4, 1), generator=generator)
    return torch.where(order < kept, weight, 0.0).view(n, k).to(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_round_trip_is_bit_exact(n, k, dtype):
    weight = random_24(n, k, dtype)
    before = weight.clone()
    values, metadata, shape = pack(weight)
    assert shape == (n, k) and values.shape == (n, k // 2) and values.dtype == dtype
    assert metadata.shape == (n, -(-k // 8)) and metadata.dtype == torch.uint8
    assert same_bits(unpack(values, metadata), weight) and same_bits(weight, before)


def test_the_bytes_are_the_documented_ones():
    """By hand: a group with positions 1 and 3, one with a nonzero at 2 (fills up with 0), one that is all zero."""
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    values, metadata, _ = pack(weight)
    assert values.tolist() == [[5, 7, 0, 9, 0, 0]]
    assert metadata.tolist() == [[(1 | 3 << 2) | (0 | 2 << 2) << 4, 0 | 1 << 2]]


def test_size_is_0_5625_of_dense():
    weight = random_24(64, 256, torch.bfloat16)
    values, metadata, _ = pack(weight)
    assert (values.nbytes + metadata.nbytes) / weight.nbytes == 0.5625


def test_zeros_come_back_positive_and_nans_with_their_payload():
    weight = torch.tensor([[-0.0, 1.0, -0.0, 0.0]], dtype=torch.float16)
    restored = unpack(*pack(weight)[:2])
    assert torch.equal(restored, weight) and not torch.signbit(restored).any()
    bits = torch.tensor([[0x7E5A, 0, -0x0200, 0]], dtype=torch.int16)  # two different NaNs
    assert torch.equal(unpack(*pack(bits.view(torch.float16))[:2]).view(torch.int16), bits)


def test_what_is_not_24_is_refused_with_its_place():
    weight = random_24(6, 40, torch.float32)
    assert is_24(weight)
    weight[4, 12:15] = 1.0
    assert not is_24(weight)
    with pytest.raises(ValueError, match=r"row 4, columns 12\.\.15"):
        pack(weight)


def test_the_place_is_right_beyond_the_first_chunk_of_rows(monkeypatch):
    monkeypatch.setattr("oneshot_kernels.reference._CHUNK", 80)
    weight = random_24(7, 40, torch.float32)
    assert same_bits(unpack(*pack(weight)[:2]), weight)
    weight[5, 0:4] = 1.0
    with pytest.raises(ValueError, match=r"row 5, columns 0\.\.3"):
        pack(weight)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 6), "divisible by 4"),
        (torch.zeros(8), "matrix"),
        (torch.zeros(0, 4), "non-empty"),
        (torch.zeros(4, 4, dtype=torch.float64), "convert the weight"),
    ],
)
def test_what_the_format_has_no_room_for_is_refused(weight, message):
    assert not is_24(weight)
    with pytest.raises(ValueError, match=message):
        pack(weight)


def test_damaged_metadata_is_refused_with_its_place():
    values, metadata, _ = pack(random_24(4, 16, torch.float16))
    with pytest.raises(ValueError, match="must be values"):
        unpack(values, metadata[:, :1])
    metadata[2, 1] = 0x4F  # group 2: positions 3 and 3
    with pytest.raises(ValueError, match="row 2, group 2"):
        unpack(values, metadata)


@pytest.mark.parametrize("row_blocks", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(2, 4), (34, 36), (20, 172), (32, 512)])
def test_fragments_come_back_byte_for_byte(n, k, row_blocks):
    packed = pack(random_24(n, k, torch.bfloat16))
    values, metadata = to_fragments(packed, row_blocks)
    tiles = row_blocks * -(-n // row_blocks // 16)
    blocks = -(-k // 256)
    assert values.shape == (tiles, 8 * blocks, 32, 8) and metadata.shape == (tiles, blocks, 32, 4)
    back = from_fragments(values, metadata, n, k, row_blocks)
    assert same_bits(back.values, packed.values) and same_bits(back.metadata, packed.metadata)


def test_fragment_order_is_the_documented_one():
    """The map in fragment.py, element by element."""
    packed = pack(random_24(32, 512, torch.bfloat16))
    values, metadata = to_fragments(packed)
    values, words, kept = values.tolist(), (metadata.long() & 0xFFFFFFFF).tolist(), packed.values.tolist()
    for row, group in itertools.product(range(32), range(128)):
        tile, r, g = row // 16, row % 16 // 8, row % 8
        block, h, q = group // 8, group % 8 // 4, group % 4
        register = 2 * h + r
        pair = values[tile][block][4 * g + q][2 * register : 2 * register + 2]
        assert pair == kept[row][2 * group : 2 * group + 2]
        word, selector = block % 8 // 2, block % 2
        code = words[tile][block // 8][4 * g + 2 * selector + h][word] >> (16 * r + 4 * q) & 15
        assert code == packed.metadata[row, group // 2] >> (4 * (group % 2)) & 15


def test_fragments_take_16_bit_weights_only():
    with pytest.raises(ValueError, match="float16 and bfloat16"):
        to_fragments(pack(random_24(16, 64, torch.float32)))
    with pytest.raises(ValueError, match="equal parts"):
        to_fragments(pack(random_24(7, 64, torch.float16)), row_blocks=2)
    assert isinstance(pack(random_24(7, 64, torch.float16)), Packed)
