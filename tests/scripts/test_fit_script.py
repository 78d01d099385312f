"""scripts/bench/fit.py: ways compared at the same heal tokens, rows once, the page from the rows."""

import json
from pathlib import Path

import fit as bench
import pytest
import tiny
from tiny import plain_pages  # noqa: F401

from oneshot.pipeline.fit import ending
from oneshot.pipeline.fit.ledger import Round


def row(way, **more):
    return {"model": "demo", "seed": 0, "way": way, "met": True, "shares": {"parameters": 0.7, "bytes": 0.7},
            "tokens": 2000, "dense_ppl": 10.0, "ppl": 20.0, "seconds": 60.0,
            "rounds": [["4 blocks", {"parameters": 0.7}, 20.0, True], ["2 blocks", {"parameters": 0.5}, 30.0, False]],
            "environment": {"commit": "abc", "dirty": False, "device": "cpu"}} | more


def test_the_page_is_made_of_the_rows(tmp_path):
    rows = [row("step by step", plain={"int8": {"ppl": 10.1, "bytes": 0.53, "latency": 0.61}}),
            row("shrink", shares={"parameters": 0.7})]
    rows += [row("0.6x", met=False, stopped="text/ppl 30, asked <= 25")]
    (tmp_path / "demo.json").write_text(json.dumps({"rows": rows}))
    assert bench.main(["--page", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "fit.md").read_text()
    assert "commit abc; cpu" in text and "0.693" in text and "int8 10.100 at 0.53 and 0.61x" in text and "2,000" in text
    assert "one shot      `oneshot fit --step 100%`" in text
    assert text.endswith("- demo, seed 0, 0.6x: target not met (text/ppl 30, asked <= 25). Taken back: 2 blocks at "
                         "0.500 of the parameters: ppl 30.000.\n") and text.count("\n- ") == 1


def test_tokens_are_those_of_the_rounds_that_trained():
    def made(name, **plan):
        empty = {"drop": [], "heads": [], "widths": [], "sparse": [], "grids": []}
        return Round(name, {}, 0.1, plan=empty | plan)
    kept = [made("round-1", drop=[1]), made("round-2", grids=[[0, "int8"]]), made("round-3", sparse=[0]),
            made("final", sparse=[0])]
    assert bench.trained(kept, {"tokens": "1k", "final": "5k"}) == 7000


@pytest.mark.usefixtures("plain_pages")
def test_every_way_is_measured_once_on_a_tiny_model(tmp_path, monkeypatch):
    place = tiny.make(tmp_path / "place")
    flags = ["--model", place / "model", "--pattern", "2:4", "--seqlen", "16", "--nsamples", "8", "--calibration",
             place / "calibration.txt", "--evaluate", place / "evaluation.txt"]
    monkeypatch.setattr(bench.small_models, "flags_of", lambda shared: {
        name: list(map(str, flags)) for name in ("tiny", "other")})
    monkeypatch.setattr(bench, "TOKENS", {"tiny": "200"})
    monkeypatch.setattr(bench, "GOALS", {"a goal": {"target": "bytes=0.6", "floor": "TEXT/ppl<=9x", "allow": "int8"}})
    monkeypatch.setattr(bench, "WAYS", {"tiny": bench.TOYS, "other": ("a goal",)})
    monkeypatch.setattr(bench, "HEAL", {name: ["--heal-seqlen", "16", "--heal-batch", "32"] for name in bench.WAYS})
    monkeypatch.setattr(bench, "STEP", "60%")
    monkeypatch.setattr(ending.figures, "save", lambda figure, path: None)
    argv = ["--only", "tiny,other", "--seeds", "0", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"),
            "--flags", "--eval-windows 4"]
    assert bench.main(argv) == 0
    rows = {r["way"]: r for name in ("tiny", "other") for r in bench.rows_of(tmp_path / "out" / f"{name}.json")}
    assert list(rows) == [*bench.TOYS, "a goal"]
    assert rows["one shot"]["tokens"] == rows["shrink"]["tokens"] == rows["step by step"]["tokens"] == 600
    assert all(rows[way]["shares"]["parameters"] <= bench.SHARE for way in bench.TOYS[:3])
    assert rows["all forms"]["shares"]["bytes"] <= bench.BYTES and len(rows["step by step"]["rounds"]) == 3
    assert all(rows[way]["tokens"] == (600 if "2:4" in way or "cut" in way else 0) for way in bench.RECIPES)
    assert rows["int4"]["shares"]["bytes"] < rows["2:4, int8"]["shares"]["bytes"] < 0.5
    assert rows["a goal"]["shares"]["bytes"] <= 0.6 and rows["a goal"]["asked"]["floor"] == "evaluation/ppl<=9x"
    scaled = {name: json.loads((tmp_path / "work" / "other-0-a-goal" / name / "oneshot.json").read_text())["record"][
        "settings"].get("scale_columns", False) for name in ("round-1", "plain-int8")}
    assert scaled == {"round-1": True, "plain-int8": False}
    assert rows["a goal"]["tokens"] == 0 and rows["cut, int8"]["shares"]["parameters"] <= 0.78
    monkeypatch.setattr(bench, "one", None)
    assert bench.main(argv) == 0


def test_the_page_here_is_not_stale():
    folder = Path(__file__).parents[2] / "results" / "fit"
    if (folder / "fit.md").is_file():
        assert (folder / "fit.md").read_text(encoding="utf-8") == bench.page(folder), "run scripts/bench/fit.py --page"
