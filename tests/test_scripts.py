"""The scripts do what they say, at toy size."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import tables
from safetensors.torch import load_file
from tiny import plain_pages  # noqa: F401

from oneshot import models

ROOT = Path(__file__).parent.parent


def test_tables_are_not_stale():
    assert tables.main(["--check"]) == 0, "run python scripts/tables.py"


def test_tables_notice_a_change(tmp_path):
    (tmp_path / "README.md").write_text("before\n\n" + tables.START.format("pruning") + "\nold\n"
                                        + tables.END.format("pruning") + "\nafter\n")
    arguments = ["--runs", str(tmp_path / "none"), "--root", str(tmp_path)]
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def test_bench_prune(tmp_path):
    import bench_prune

    bench_prune.main(["--toy", "--out", str(tmp_path)])
    out = json.loads((tmp_path / "bench_prune.json").read_text())
    for run in out["runs"].values():
        assert run["published"]["forward"] > 0 and run["oneshot"]["forward"] > 0
    assert "column loop" in (tmp_path / "bench_prune.md").read_text()


@pytest.mark.skipif(not (models.DEMO / "config.json").is_file(), reason="the demo model is not trained yet")
def test_packed_runs(tmp_path, plain_pages, capsys):  # noqa: F811
    import packed_runs

    small = ["--only", "demo", "--dtype", "float16", "--method", "magnitude", "--windows", "2"]
    assert packed_runs.main([*small, "--results", str(tmp_path / "results")]) == 0, capsys.readouterr().err
    text = (tmp_path / "results" / "packed.json").read_text()
    row, = json.loads(text)["models"]
    assert row["packed_linears"] == row["linears"] == 35 and row["ratio"] == 0.5625
    assert [p["windows"] for p in row["perplexity"]] == [2, 2]
    assert all(p["dense"] == pytest.approx(p["packed"], rel=1e-6) for p in row["perplexity"])
    assert str(tmp_path) not in text and tempfile.gettempdir() not in text
    assert tables.main(["--runs", str(tmp_path / "none"), "--root", str(tmp_path)]) == 0
    assert f"| demo | float16 | builtin:prose @256 | {row['perplexity'][0]['dense']:.4f} |" in (
        tmp_path / "results" / "tables.md").read_text()


def test_packed_runs_says_which_claim_is_broken():
    import packed_runs

    good = {"model": "m", "dtype": "bfloat16", "linears": 2, "packed_linears": 2, "ratio": 0.5625,
            "perplexity": [{"text": "t", "relative_difference": 1e-9}], "faults": {"packed": [], "twin": []}}
    assert packed_runs.faults(good) == []
    for change, word in (({"packed_linears": 1}, "1 of 2"), ({"ratio": 0.6}, "0.6000x"),
                         ({"faults": {"twin": ["w: 3 values"]}}, "w: 3 values"),
                         ({"perplexity": [{"text": "t", "relative_difference": float("nan")}]}, "perplexity on t")):
        told, = packed_runs.faults(good | change)
        assert told.startswith("m bfloat16: ") and word in told


@pytest.fixture
def train(tmp_path, monkeypatch):
    import train_demo_model

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The number {i} is followed by {i + 1}, and so it goes on." for i in range(2000)))

    def go(name, **changes):
        flags = {"data": text, "out": tmp_path / name, "work": tmp_path / f"{name}_work", "vocab": 300, "hidden": 32,
                 "intermediate": 64, "layers": 1, "heads": 2, "kv-heads": 1, "seqlen": 16, "batch-size": 2, "steps": 4,
                 "checkpoint-every": 2, **changes}
        monkeypatch.setattr(sys, "argv", ["train", *(s for k, v in flags.items() for s in (f"--{k}", str(v)))])
        train_demo_model.main()
        return load_file(tmp_path / name / "model.safetensors"), json.loads(
            (tmp_path / name / "training.json").read_text())

    return go, train_demo_model


def test_training_resumes_where_it_stopped(train, monkeypatch):
    go, module = train
    whole, record = go("whole")
    replace, calls = module.os.replace, []

    def killed(*args):
        replace(*args)
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        go("resumed")
    monkeypatch.setattr(module.os, "replace", replace)
    resumed, again = go("resumed")
    assert len(calls) == 1 and again["schedules"] == [[0, 4]]
    assert record["held_out_loss"] == again["held_out_loss"]
    assert all(whole[k].equal(resumed[k]) for k in whole)


def test_training_says_when_the_schedule_changed(train):
    go, _ = train
    go("changed", steps=2)
    assert go("changed", steps=4)[1]["schedules"] == [[0, 2], [2, 4]]


def test_training_refuses_missing_data(train, tmp_path):
    with pytest.raises(SystemExit, match="no such text file"):
        train[0]("missing", data=tmp_path / "nothing.txt")
