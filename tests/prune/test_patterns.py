"""Patterns: exact counts, ties, the text form; each mask against the naive reference."""

from dataclasses import FrozenInstanceError

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import groups, removed_of

from oneshot.prune import patterns
from oneshot.prune.patterns import NM, Dense, Unstructured

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)
SHARES = st.integers(0, 100).map(lambda k: k / 100)
GROUPS = st.sampled_from([None, "matrix", "row", 1, 3, 8])
RATIOS = [(2, 4), (1, 4), (3, 4), (4, 8), (3, 5), (0, 3), (4, 4), (1, 1)]


@st.composite
def scores(draw, m=1):
    """A score matrix (R, C) of few different values, so that ties abound; m divides C."""
    R, C = draw(st.integers(1, 6)), draw(st.integers(1, 6)) * m
    values = draw(st.lists(st.integers(0, draw(st.integers(0, 5))), min_size=R * C, max_size=R * C))
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.float64]))).view(R, C)


def naive_keep(pattern, score):
    """Group by group by the reference: the lowest go, among equals the lower index."""
    keep = torch.ones(score.shape, dtype=torch.bool)
    for rows, columns in groups(pattern, *score.shape):
        part = score[rows, columns]
        keep[rows, columns] = ref.remove_lowest(part, removed_of(pattern, part.numel()))
    return keep


def assert_keep(pattern, score):
    before = score.clone()
    mask = pattern.keep(score)
    assert mask.dtype == torch.bool and torch.equal(score, before)
    assert torch.equal(mask, naive_keep(pattern, score))
    assert int((~mask).sum()) == pattern.zeros(*score.shape)


# --- the mask -----------------------------------------------------------------------------------------------


@EXAMPLES
@given(scores(), SHARES, GROUPS, st.booleans())
def test_unstructured_keep_is_the_naive_one(score, sparsity, group, by_columns):
    """Also of a matrix that lies by columns in memory."""
    assert_keep(Unstructured(sparsity, group), score.T.contiguous().T if by_columns else score)


@EXAMPLES
@given(st.data(), st.sampled_from(RATIOS))
def test_n_of_m_keep_is_the_naive_one(data, ratio):
    assert_keep(NM(*ratio), data.draw(scores(m=ratio[1])))


@pytest.mark.parametrize("pattern", [Unstructured(0.57), Unstructured(0.3, "row"), Unstructured(0.7, 128),
                                     NM(2, 4), NM(3, 5)], ids=repr)
def test_keep_on_many_scores(pattern):
    gen = torch.Generator().manual_seed(0)
    assert_keep(pattern, torch.rand(7, 260, generator=gen))
    assert_keep(pattern, torch.rand(260, 7, generator=gen).T)  # held transposed, as sparsegpt does
    assert_keep(pattern, torch.randint(0, 4, (7, 260), generator=gen).float())


@pytest.mark.parametrize("size, sparsity, removed", [
    (100, 0.29, 29), (100, 0.57, 57), (1000, 0.001, 1), (10, 0, 0), (10, 0.0, 0), (10, 0.99, 9), (10, 1, 10),
    (1, 0.5, 0), (7, 0.5, 3), (7, 0.999, 6), (10**6, 1 - 1e-9, 10**6 - 1), (3 * 11008 * 4096, 0.7, 94686412)])
def test_counts_are_decimal(size, sparsity, removed):
    assert patterns.count(sparsity, size) == removed
    assert Unstructured(sparsity).zeros(1, size) == removed
    if size <= 1000:
        assert int((~Unstructured(sparsity).keep(torch.rand(1, size))).sum()) == removed


@pytest.mark.parametrize("group, n", [(None, 45), ("matrix", 45), ("row", 45), (4, 45), (3, 43), (99, 45)])
def test_zeros_of_each_group(group, n):
    """9 x 10 at one half: rows of 10 give 9 x 5; columns 3+3+3+1 give 13+13+13+4 = 43."""
    assert Unstructured(0.5, group).zeros(9, 10) == n


def test_ties_remove_the_lower_index_first():
    ones = torch.ones(2, 4)
    assert Unstructured(0.5).keep(ones).tolist() == [[False] * 4, [True] * 4]
    assert Unstructured(0.5, "row").keep(ones).tolist() == [[False, False, True, True]] * 2
    assert Unstructured(0.5, 2).keep(ones).tolist() == [[False, False, False, False], [True] * 4]
    assert NM(3, 4).keep(ones).tolist() == [[False, True, True, True]] * 2
    signed = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    assert Unstructured(0.5).keep(signed).tolist() == [[False, False, True, True]]


def test_infinite_scores_stay_and_count():
    score = torch.tensor([[torch.inf, 1.0, torch.inf, torch.inf]])
    for pattern in (Unstructured(0.5), Unstructured(0.5, "row"), NM(2, 4)):
        assert pattern.keep(score).tolist() == [[False, False, True, True]]


# --- holds --------------------------------------------------------------------------------------------------


@EXAMPLES
@given(st.data(), st.sampled_from([Unstructured(s, g) for s in (0.3, 0.5, 0.9) for g in (None, "row", 4)]
                                  + [NM(*r) for r in RATIOS]))
def test_holds_agrees_with_keep(data, pattern):
    """What keep leaves has the pattern; with any one removed weight put back it has it no more."""
    score = data.draw(scores(m=getattr(pattern, "m", 1)))
    mask = pattern.keep(score)
    assert pattern.holds(mask * 3.0) and pattern.holds(torch.zeros(score.shape))
    removed = (~mask).nonzero().tolist()
    if removed:
        i, j = data.draw(st.sampled_from(removed))
        W = mask * 3.0
        W[i, j] = -1e-30
        assert not pattern.holds(W)


def test_holds_counts_negative_zero_as_zero_and_nan_as_weight():
    W = torch.tensor([[1.0, -0.0, 0.0, 2.0]])
    assert NM(2, 4).holds(W) and Unstructured(0.5).holds(W)
    W[0, 1] = torch.nan
    assert not NM(2, 4).holds(W) and not Unstructured(0.5).holds(W)


def test_holds_judges_every_group():
    W = torch.tensor([[0.0, 0, 0, 1], [0, 1, 1, 1]])  # half of the matrix, not half of each row
    assert Unstructured(0.5).holds(W) and Unstructured(0.5, "matrix").holds(W)
    assert not Unstructured(0.5, "row").holds(W) and not NM(2, 4).holds(W)
    assert Unstructured(0.5, 1).holds(W[:, :1]) and not Unstructured(0.5, 1).holds(W)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_holds_on_the_stored_dtype(dtype):
    W = torch.tensor([[1.0, 1e-30, 1e-30, 2.0]]).to(dtype)
    assert NM(2, 4).holds(W) == (dtype == torch.float16)  # there 1e-30 underflows: zeros come, never go


def test_dense():
    W = torch.ones(3, 5)
    pattern = Dense()
    assert pattern.keep(W).all() and pattern.holds(W) and pattern.zeros(3, 5) == 0 and pattern.sparsity == 0
    assert pattern.with_default_group("row") is pattern
    pattern.check(3, 5)


# --- shapes, groups -----------------------------------------------------------------------------------------


def test_width_must_be_divisible():
    for call in (lambda: NM(2, 4).check(8, 10), lambda: NM(2, 4).keep(torch.ones(8, 10))):
        with pytest.raises(ValueError, match=r"2:4.*divisible by 4.*10"):
            call()
    NM(2, 4).check(3, 8)
    Unstructured(0.5, 128).check(3, 7)
    assert not NM(2, 4).holds(torch.zeros(8, 10))


def test_default_group_gives_way_to_the_users():
    assert Unstructured(0.5).with_default_group("row") == Unstructured(0.5, "row")
    assert Unstructured(0.5, 64).with_default_group("row") == Unstructured(0.5, 64)
    assert NM(2, 4).with_default_group("row") == NM(2, 4)


def test_patterns_are_values():
    assert len({NM(2, 4), NM(2, 4), Unstructured(0.5), Unstructured(0.5), Unstructured(0.5, "row")}) == 3
    for pattern in (Unstructured(0.5), NM(2, 4)):
        with pytest.raises(FrozenInstanceError):
            pattern.group = "row"
    assert NM(2, 4).sparsity == 0.5 and NM(1, 4).sparsity == 0.75 and NM(3, 4).group is None


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, pattern", [
    ("0.5", Unstructured(0.5)), (" 0.29 ", Unstructured(0.29)), ("0", Unstructured(0.0)),
    (".7", Unstructured(0.7)), ("1e-3", Unstructured(0.001)), (0.5, Unstructured(0.5)),
    ("2:4", NM(2, 4)), ("4:8", NM(4, 8)), ("3:5", NM(3, 5)), ("4:4", NM(4, 4)), ("dense", Dense())])
def test_parse(text, pattern):
    assert patterns.parse(text) == pattern


@pytest.mark.parametrize("sparsity", [0.5, 0.29, 0.0, 0.999, 1 / 3, 0.53172845, 2 / 3, 1e-7, 1 - 1e-9])
def test_text_names_the_same_pattern(sparsity):
    """The manifest keeps the text: read back, it must ask for the same count."""
    assert patterns.parse(str(Unstructured(sparsity))) == Unstructured(sparsity)


def test_text_is_short():
    assert [str(p) for p in (Unstructured(0.5), Unstructured(0), Unstructured(0.0), NM(2, 4), Dense())] == \
        ["0.5", "0", "0", "2:4", "dense"]


@pytest.mark.parametrize("text", ["1", "1.0", "-0.1", "1.5", "nan", "inf", "", "half", "2:", ":4", "5:4",
                                  "-1:4", "0:0", "0:4", "2:4:8", "2.5:4", "2/4"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="--pattern") as caught:
        patterns.parse(text)
    assert text in str(caught.value)


def test_groups_are_parsed():
    assert [patterns.parse("0.5", g).group for g in (None, "matrix", "row", "128", 64)] == \
        [None, "matrix", "row", 128, 64]
    for group in ("column", "0", "-4", "1.5", "", "²"):
        with pytest.raises(ValueError, match="--group"):
            patterns.parse("0.5", group)


# --- bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, per_weight", [
    (NM(2, 4), 0.5625 * 2), (NM(4, 8), 1 + 7 / 64), (NM(1, 4), 0.5 + 2 / 32), (NM(6, 8), 1.5 + 5 / 64),
    (NM(4, 4), 2), (NM(0, 4), 0), (Dense(), 2), (Unstructured(0.5), 1 + 1 / 8), (Unstructured(0.7, "row"), 0.725)])
def test_bytes_of_a_weight(pattern, per_weight):
    """Bytes a weight at 16 bits: values kept, and the places of a group's kept ones in whole bits."""
    assert pattern.bytes(16, 640, 2) == pytest.approx(16 * 640 * per_weight)


@pytest.mark.parametrize("R, C", [(1, 4), (3, 12), (5, 20), (7, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_of_2_4_are_those_of_the_kernels(R, C, dtype):
    from oneshot_kernels.reference import pack
    W = torch.ones(R, C, dtype=dtype) * NM(2, 4).keep(torch.rand(R, C, generator=torch.Generator().manual_seed(0)))
    packed = pack(W)
    assert NM(2, 4).bytes(R, C, dtype.itemsize) == packed.values.nbytes + packed.metadata.nbytes


def test_bytes_are_whole_rows_and_a_whole_bitmap():
    assert NM(1, 3).bytes(2, 9, 2) == 6 * 2 + 2 * 1  # 3 groups of 2 bits a row
    assert Unstructured(0.29).bytes(3, 7, 4) == (21 - 6) * 4 + 3
    assert Dense().bytes(3, 7, 4) == 84
