"""`oneshot prune --quantise`: behind every chain, alone, killed and resumed, refused; record, bytes, proof."""

import json

import pytest
import tiny
import torch
from rounding import LINEAR, command, the_record
from safetensors.torch import load_file, save_file
from tiny import place, plain_pages  # noqa: F401

import oneshot
from oneshot import checkpoint, models, report
from oneshot.checkpoint import verify
from oneshot.quantise import grids
from oneshot.settings import flags

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.fixture(scope="module")
def saved(place, tmp_path_factory):  # noqa: F811
    """{name: folder} of a model pruned by 2:4; rounded behind that; rounded to nearest; jointly."""
    at = tmp_path_factory.mktemp("saved")
    more = {"pruned": {"quantise": None}, "gptq": {}, "rtn": {"quantiser": "rtn"}, "joint": {"quantiser": "joint"}}
    with tiny.no_pictures():
        for name, changed in more.items():
            assert command(place, save=at / name, results=at / f"{name}.runs", **changed) == 0
    return {name: at / name for name in more}


def linears(folder):
    return {name.removesuffix(".weight"): W for name, W in tiny.weights(folder).items()
            if name.endswith("_proj.weight")}


def manifest(folder):
    return json.loads((folder / "oneshot.json").read_text())


# --- what is stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "rtn", "joint"])
def test_every_stored_weight_lies_on_its_grid(saved, name):
    """Read off the files alone: 2:4, and whole multiples of the scales."""
    scales, entries = load_file(saved[name] / "scales.safetensors"), manifest(saved[name])["tensors"]
    assert set(scales) == set(entries) == set(linears(saved[name]))
    for linear, W in linears(saved[name]).items():
        assert ((W != 0).reshape(-1, 4).sum(1) <= 2).all() and scales[linear].dtype == torch.float16
        s = scales[linear].float().repeat_interleave(32, 1)[:, : W.shape[1]]
        codes = (W / s).round()
        assert torch.equal(codes * s, W) and codes.min() >= -8 and codes.max() <= 7
        assert entries[linear]["grid"] == "int4:32" and entries[linear]["pattern"] == "2:4"


@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_no_zero_comes_back_and_those_that_come_are_counted(saved, name):
    before, after = linears(saved["pruned"]), linears(saved[name])
    rows = {row["name"]: row for row in the_record(saved[name].parent / f"{name}.runs")["layers"]}
    for linear, W in after.items():
        assert not W[before[linear] == 0].any()
        row, zeros = rows[linear], int((W == 0).sum())
        assert row["rounded_to_zero"] == int(((W == 0) & (before[linear] != 0)).sum())
        assert row["zeros"] == zeros == row["target_zeros"] + row["surplus"] and row["grid"] == "int4:32"
    assert any(row["rounded_to_zero"] for row in rows.values())


def test_the_record_says_what_was_done(saved):
    record = the_record(saved["gptq"].parent / "gptq.runs")
    assert record["settings"]["quantise"] == "int4:32" and record["settings"]["rounding"] == {
        "gptq": {"damping": 0.01, "order": True, "search": True}}
    assert "quantiser" not in record["settings"]
    grid = grids.parse("int4:32")
    want = sum(grid.bytes(*row["shape"]) - row["shape"][0] * row["shape"][1] // 4 + row["shape"][0]
               * -(-row["shape"][1] // 8) for row in record["layers"])
    assert record["bytes"]["stored"] == want
    assert all(row["rounding_error"] > 0 and row["info"]["gptq.damping"] == 0.01 for row in record["layers"])
    assert all("round" in block["seconds"] and block["rounding"]["relative_error"] > 0 for block in record["blocks"])
    assert report.method_of(record) == "sparsegpt, gptq" and report.pattern_of(record) == "2:4 int4:32"
    joint = the_record(saved["joint"].parent / "joint.runs")
    assert joint["settings"]["quantiser"] == "joint" and joint["bytes"] == record["bytes"]
    assert all(row["grid"] == "int4:32" and "rounding_error" not in row for row in joint["layers"])
    plain = the_record(saved["pruned"].parent / "pruned.runs")
    assert not {"quantise", "quantiser", "rounding"} & set(plain["settings"]) and "grid" not in plain["layers"][0]


def test_gptq_costs_less_than_rounding_to_nearest(saved):
    errors = {name: [row["rounding_error"] for row in the_record(saved[name].parent / f"{name}.runs")["layers"]]
              for name in ("gptq", "rtn")}
    assert sum(errors["gptq"]) < 0.8 * sum(errors["rtn"])


def test_ids_of_runs_without_it_are_as_before():
    cfg = flags.build({"method": "sparsegpt", "pattern": "2:4", "device": "cpu"})
    assert cfg.run_id("a", "b") == "demo-sparsegpt-2of4-71f35807"  # as it was before there was --quantise
    assert flags.build({"method": "sparsegpt", "pattern": "2:4", "device": "cpu", "quantise": "int4"}).run_id(
        "a", "b") != cfg.run_id("a", "b")


# --- verify -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "rtn", "joint"])
def test_verify_proves_the_grid(saved, name, capsys):
    assert verify.main([str(saved[name])]) == 0
    assert "2:4 int4:32" in capsys.readouterr().out


def off_grid(folder):
    tiny.change_weights(folder, lambda t: t[f"{LINEAR}.weight"].mul_(1.01))


def other_scales(folder):
    scales = load_file(folder / "scales.safetensors")
    scales[LINEAR] *= 0.97
    save_file(scales, folder / "scales.safetensors")


def no_scales(folder):
    (folder / "scales.safetensors").unlink()


def fewer_scales(folder):
    scales = load_file(folder / "scales.safetensors")
    scales[LINEAR] = scales[LINEAR][:, :1].contiguous()
    save_file(scales, folder / "scales.safetensors")


@pytest.mark.parametrize(("change", "says"), [
    (off_grid, "weights are not on the grid int4:32"), (other_scales, "weights are not on the grid int4:32"),
    (no_scales, "its scales are missing"), (fewer_scales, "do not fit int4:32")])
def test_verify_finds_what_is_off_the_grid(saved, tmp_path, capsys, change, says):
    folder = tiny.copy(saved["gptq"], tmp_path / "spoilt")
    change(folder)
    assert verify.main([str(folder), "--quiet"]) == 1
    assert f"{LINEAR}: " in (out := capsys.readouterr().out) and says in out


def test_verify_finds_another_grid_than_was_asked_for(saved):
    data = manifest(saved["gptq"])
    data["tensors"][LINEAR]["grid"] = "int4:64"
    faults = checkpoint.claims.check(data)
    assert [f.name for f in faults] == [LINEAR, LINEAR] and "the settings ask for int4:32" in str(faults[1])


# --- on its own, behind other chains ------------------------------------------------------------------------


def test_a_pruned_model_is_rounded_on_its_own(saved, place, tmp_path):  # noqa: F811
    """`--method keep` gives what pruning and rounding in one run give."""
    assert command(place, model=saved["pruned"], method="keep", save=tmp_path / "out", results=tmp_path / "runs") == 0
    for linear, W in linears(tmp_path / "out").items():
        assert torch.equal(W, linears(saved["gptq"])[linear])
    record = the_record(tmp_path / "runs")
    assert report.method_of(record) == "keep, gptq" and report.pattern_of(record) == "2:4 int4:32"
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0


def test_the_dense_model_is_rounded(place, tmp_path):  # noqa: F811
    at = {"method": "dense", "evaluate": place / "evaluation.txt"}
    assert tiny.main(*tiny.flags(place, quantise="int3", save=tmp_path / "out", results=tmp_path / "runs", **at)) == 0
    found = {report.method_of(r): r for f in (tmp_path / "runs").glob("*.json") for r in [report.read(f)]}
    assert set(found) == {"dense", "gptq"} and report.pattern_of(found["gptq"]) == "int3"
    assert report.is_rounded(found["gptq"]) and not report.is_dense(found["gptq"])
    assert found["gptq"]["metrics"]["evaluation/ppl"] != found["dense"]["metrics"]["evaluation/ppl"]
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0
    sizes = found["gptq"]["bytes"]
    assert sizes["stored"] == sum(grids.parse("int3").bytes(*r["shape"]) for r in found["gptq"]["layers"])
    text = report.tables.table(list(found.values()))
    assert "MB" in text and "gptq" in text


def test_behind_healing_with_mixed_patterns(place, tmp_path):  # noqa: F811
    """Dense linears are rounded too; block and whole-model healing come first."""
    more = {"method": "wanda+refit", "pattern": "0.5", "keep_dense": "*.o_proj", "heal": "block,distil",
            "block.steps": 2, "distil.steps": 2, "quantise": "int8:row", "nsamples": 12}
    assert command(place, save=tmp_path / "out", results=tmp_path / "runs", **more) == 0
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0
    record = the_record(tmp_path / "runs")
    assert {row["pattern"] for row in record["layers"]} == {"0.5", "dense"} and set(record["heal"]) == {"distil"}
    assert report.method_of(record) == "wanda+refit, block, distil, gptq"


def test_behind_a_smaller_model(place, tmp_path):  # noqa: F811
    more = {"method": "sparsegpt", "pattern": "dense", "shrink": 0.7, "tries": 1, "nsamples": 12}
    assert command(place, save=tmp_path / "out", results=tmp_path / "runs", **more) == 0
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0
    assert report.pattern_of(the_record(tmp_path / "runs")) == "0.7 left int4:32"


def test_from_python(place):  # noqa: F811
    model, tokenizer = oneshot.load(place / "model")
    text = {"calibration": place / "calibration.txt", "nsamples": 4, "seqlen": tiny.WINDOW, "progress": False}
    record = oneshot.prune(model, tokenizer, method="dense", quantise="int2:32", parts={"gptq.damping": 0.1}, **text)
    assert record["settings"]["rounding"] == {"gptq": {"damping": 0.1, "order": True, "search": True}}
    assert record["layers"][0]["grid"] == "int2:32"
    W = next(models.all_weights(model)).get()
    assert all(len(row.unique()) <= 4 for row in W)


def test_a_rounded_model_is_read_again_without_a_word(saved, place, tmp_path):  # noqa: F811
    """Its scales are no part of the model: nothing is lost where another run starts from it."""
    assert command(place, model=saved["gptq"], method="keep", quantise=None, results=tmp_path) == 0
    assert not [w for w in the_record(tmp_path)["warnings"] if "safetensors" in w]
