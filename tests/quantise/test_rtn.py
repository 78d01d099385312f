"""Round-to-nearest against a plain loop; bytes as counted by hand; the rows of a run."""

import itertools
import math

import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401

from oneshot import models
from oneshot.prune.patterns import parse
from oneshot.quantise import grids
from oneshot.quantise.grids import Integers, equal_bits, widths
from oneshot.quantise.rtn import quantise_model, round_to_nearest


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("C", [1, 40, 128, 300])
def test_as_a_plain_loop_does(bits, C):
    W = torch.randn(3, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W[1] = 0
    got, lost = round_to_nearest(W, Integers(bits))
    assert lost == 0
    for r in range(3):
        for start in range(0, C, 128):
            group = W[r, start : start + 128].tolist()
            largest = max(map(abs, group))
            s = torch.tensor(largest / ((2**bits - 1) / 2)).half().item()
            for i, w in enumerate(group):
                code = min(2 ** (bits - 1) - 1, max(-(2 ** (bits - 1)), round(w / s))) if s else 0
                assert got[r, start + i].item() == pytest.approx(s * code, abs=1e-12)
                assert abs(got[r, start + i].item() - w) <= 0.5 * s + largest / 2**10  # half a step, s in float16
            assert len(set(got[r, start : start + 128].tolist())) <= 2**bits
    tiny_weights = -got.float() / 1e9  # no float16 scale is so small
    assert torch.equal(round_to_nearest(tiny_weights, Integers(bits))[0], torch.zeros(3, C))
    assert round_to_nearest(W / 1e9, Integers(bits))[1] == 2 * math.ceil(C / 128)


@pytest.mark.parametrize(("pattern", "R", "C", "itemsize", "want"), [
    ("dense", 8, 256, 2, 4096), ("2:4", 8, 256, 2, 2304), ("2:4", 8, 256, 4, 4352), ("4:8", 8, 256, 2, 2048 + 224),
    ("1:4", 8, 256, 2, 1024 + 128), ("0.5", 8, 256, 2, 2048 + 256), ("0.29", 1, 100, 2, 142 + 13),
    ("0.01", 8, 256, 2, 4096), ("4:4", 8, 256, 2, 4096), ("int8", 8, 256, 2, 2048 + 32), ("int4", 8, 192, 4, 768 + 32),
    ("int5", 1, 10, 2, 7 + 2)])
def test_bytes(pattern, R, C, itemsize, want):
    found = grids.parse(pattern).bytes(R, C) if "int" in pattern else parse(pattern).bytes(R, C, itemsize)
    assert found == want


def test_equal_bytes():
    """Bits a weight at 16 bits: 9, 9, 8.875, 7.4, 5.8, 4.5, 1.8; an eighth of a bit is the scales'."""
    asked = {"2:4": 8, "0.5": 8, "4:8": 8, "0.6": 7, "0.7": 5, "1:4": 4, "0.95": None, "dense": None}
    assert {text: equal_bits(parse(text)) for text in asked} == asked
    assert widths(["2:4", "0.7", "0.95"]) == ["int8", "int5", "int4"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_the_prunable_linears_change(tmp_path, kind):
    """Along the inputs, whichever way they are stored."""
    model, _ = models.load(tiny.save_model(tmp_path, kind, torch.bfloat16))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = list(models.all_weights(model))
    want = [round_to_nearest(w.get(), Integers(4))[0].bfloat16() for w in weights]
    assert quantise_model(model, Integers(4)) == []
    assert all(torch.equal(w.get().bfloat16(), W) for w, W in zip(weights, want, strict=True))
    touched = {id(w.parameter) for w in weights}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in touched), name


def test_too_large_and_too_small_weights_are_said(tmp_path):
    model, _ = models.load(tiny.save_model(tmp_path))
    first, second = itertools.islice(models.all_weights(model), 2)
    first.set(first.get() * 1e-12)
    assert [first.name in w and "vanished" in w for w in quantise_model(model, Integers(8))] == [True]
    second.set(second.get() + 1e8)
    with pytest.raises(ValueError, match=second.name):
        quantise_model(model, Integers(8))


@pytest.mark.usefixtures("plain_pages")
def test_rows_of_a_run(place, tmp_path, capfd):  # noqa: F811
    assert tiny.main(*tiny.flags(place, "--quantised", "--divergence", pattern="2:4,0.7", results=tmp_path)) == 0
    found = tiny.records(tmp_path)
    assert set(found) == {("wanda", "2:4"), ("wanda", "0.7"), ("rtn", "int8"), ("rtn", "int5"), ("rtn", "int4"),
                          ("dense", "dense")}
    kl = [found["rtn", f"int{b}"]["metrics"]["evaluation/kl"] for b in (8, 5, 4)]
    assert 0 < kl[0] < kl[1] < kl[2] < found["wanda", "2:4"]["metrics"]["evaluation/kl"]
    share = {key: r["bytes"]["stored"] / r["bytes"]["dense"] for key, r in found.items()}
    assert share["dense", "dense"] == 1 and share["wanda", "2:4"] == 0.5 + 1 / 32  # float32
    assert share["rtn", "int8"] == pytest.approx(8 / 32 + 16 / 32 / 35, rel=0.05)  # rows of 32 and 48 inputs
    assert len({r["model"]["fingerprint"] for r in found.values()}) == 1
    assert found["rtn", "int4"]["data"]["calibration"] is None and found["rtn", "int4"]["layers"] == []
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith("model") and "bytes" in line for line in lines)
    assert [line.split()[1:3] for line in lines[2:8]] == [
        ["dense", "dense"], ["wanda", "0.7"], ["wanda", "2:4"], ["rtn", "int8"], ["rtn", "int5"], ["rtn", "int4"]]


def test_it_is_no_method(place, tmp_path, capfd):  # noqa: F811
    assert tiny.main(*tiny.flags(place, method="rtn", results=tmp_path / "runs")) == 2
    assert "--method rtn" in capfd.readouterr().err
