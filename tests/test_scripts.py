"""The scripts do what they say, at toy size."""

import json
import sys
from pathlib import Path

import pytest
import tables
from safetensors.torch import load_file

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


def test_bench_solvers(tmp_path):
    import bench_solvers

    from oneshot import solvers

    bench_solvers.main(["--toy", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "bench_solvers.json").read_text())["rows"]
    assert {r["method"] for r in rows} >= set(solvers.names()["solver"]) and len(rows) % 4 == 0
    assert all(r["seconds"] > 0 and r["error"] > 0 for r in rows)
    assert all(r["error"] == 1 for r in rows if r["method"] == "sparsegpt")
    assert "| alps |" in (tmp_path / "bench_solvers.md").read_text()


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
