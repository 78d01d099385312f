"""--keep-dense: by name, or the most harmful ones of a record; recorded, proved, part of the run's identity."""

import json

import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401

import oneshot
from oneshot.checkpoint import verify
from oneshot.pipeline.plan import kept_dense
from oneshot.prune import allocate

NAMES = [f"model.layers.{b}.{linear}" for b in range(3) for linear in
         ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.down_proj.0")]


def run(place, out, *more, **changed):  # noqa: F811
    """Prune the tiny model; the record."""
    flags = tiny.flags(place, "--no-dense", *more, **{"evaluate": "none", "save": out} | changed)
    assert tiny.main(*flags) == 0
    return json.loads((out / "oneshot.json").read_text())["record"]


@pytest.mark.parametrize("spec, kept", [
    (None, set()), ("*.q_proj", {n for n in NAMES if n.endswith("q_proj")}),
    ("model.layers.0.*, *.experts.*", {n for n in NAMES if ".layers.0." in n or ".experts." in n})])
def test_globs(spec, kept):
    assert kept_dense(spec, NAMES) == kept


@pytest.mark.parametrize("spec, words", [("*.q", "matches none of the model's 9 linears"), ("*", "keeps all linears"),
                                         ("no.json:3", "No such file"), ("no.json:0", "at least 1")])
def test_refusals_name_the_entry(spec, words):
    with pytest.raises(ValueError, match=f"^--keep-dense {spec.partition(':')[0].replace('*', '.')}.*{words}"):
        kept_dense(spec, NAMES)


def test_units_of_a_record(tmp_path):
    """A linear, a kind of linear in all blocks, all experts of a layer."""
    units = ["model.layers.1.mlp.down_proj", "self_attn.q_proj", "model.layers.2.mlp.experts.down_proj"]
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"model": {"fingerprint": "x"}, "sensitivity": [{"name": u} for u in units]}))
    kept = [kept_dense(f"{file}:{n}", NAMES) for n in (1, 2, 3)]
    assert kept[0] == {units[0]} and kept[1] - kept[0] == {n for n in NAMES if n.endswith("q_proj")}
    assert kept[2] - kept[1] == {"model.layers.2.mlp.experts.down_proj.0"}


@pytest.mark.usefixtures("plain_pages")
def test_what_is_kept_is_dense_recorded_and_proved(place, tmp_path):  # noqa: F811
    record = run(place, tmp_path / "out", "--keep-dense", "*.down_proj")
    kept = [row for row in record["layers"] if row["name"].endswith("down_proj")]
    assert len(kept) == 3 and all(row["pattern"] == "dense" and row["zeros"] == 0 for row in kept)
    assert {row["pattern"] for row in record["layers"] if row not in kept} == {"2:4"}
    assert any(w.startswith("--keep-dense: 3 of 21 linears stay dense") for w in record["warnings"])
    assert record["settings"]["keep_dense"] == "*.down_proj" and verify.verify(tmp_path / "out").faults == []
    before, after = tiny.weights(place / "model"), tiny.weights(tmp_path / "out")
    assert all(torch.equal(before[f"{row['name']}.weight"], after[f"{row['name']}.weight"]) for row in kept)


@pytest.mark.usefixtures("plain_pages")
@pytest.mark.parametrize("method", [name for name in allocate.names() if name != "sensitivity"])
def test_with_every_allocation(method, place, tmp_path):  # noqa: F811
    pattern, more = ("2:4", ["--mix.budget", "0.9"]) if method == "mix" else ("0.5", [])
    record = run(place, tmp_path / "out", "--keep-dense", "model.layers.1.*", "--allocate", method, *more,
                 pattern=pattern)
    for row in record["layers"]:
        assert (row["pattern"] == "dense" and row["zeros"] == 0) or row["block"] != 1
    rest = [row for row in record["layers"] if row["block"] != 1]
    zeros, size = (sum(f(row) for row in rest) for f in (lambda r: r["zeros"], lambda r: r["shape"][0] * r["shape"][1]))
    assert method == "mix" or zeros / size == pytest.approx(0.5, abs=0.03)


@pytest.mark.usefixtures("plain_pages")
def test_a_records_content_is_part_of_the_identity(place, tmp_path, capsys):  # noqa: F811
    assert tiny.main(*tiny.flags(place, "--no-dense", sensitivity="linear", results=tmp_path / "r")) == 0
    file, = (tmp_path / "r").glob("*.json")
    first = run(place, tmp_path / "a", "--keep-dense", f"{file}:2")
    told = json.loads(file.read_text())
    assert {row["name"] for row in first["layers"] if row["pattern"] == "dense"} == {
        row["name"] for row in told["sensitivity"][:2]}
    told["sensitivity"].reverse()
    file.write_text(json.dumps(told))
    second = run(place, tmp_path / "b", "--keep-dense", f"{file}:2")
    assert first["run_id"] != second["run_id"]
    file.write_text(json.dumps(told | {"model": told["model"] | {"fingerprint": "another"}}))
    assert tiny.main(*tiny.flags(place, "--no-dense", "--keep-dense", f"{file}:2", evaluate="none")) == 2
    assert "was measured on another model" in capsys.readouterr().err


def test_python(place):  # noqa: F811
    model, tokenizer = oneshot.load(place / "model")
    record = oneshot.prune(model, tokenizer, method="magnitude", pattern="0.5", keep_dense="*.o_proj",
                           calibration=str(place / "calibration.txt"), nsamples=4, seqlen=16, progress=False)
    kept = [row for row in record["layers"] if row["pattern"] == "dense"]
    assert len(kept) == 3 and all(row["name"].endswith("o_proj") for row in kept)
