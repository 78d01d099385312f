"""The scripts do what they say, at toy size."""

import csv
import json
import re
import sys
import tempfile
from pathlib import Path

import figures
import pytest
import tables
import test_accuracy
import test_report
from safetensors.torch import load_file
from tiny import plain_pages  # noqa: F401

from oneshot import report

ROOT = Path(__file__).parent.parent


def test_tables_are_not_stale():
    assert tables.main(["--check"]) == 0, "run python scripts/tables.py"


def test_tables_notice_a_change(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "README.md").write_text("before\n\n" + tables.START.format("pruning") + "\nold\n"
                                        + tables.END.format("pruning") + "\nafter\n")
    arguments = ["--runs", str(tmp_path / "none"), "--root", str(tmp_path)]
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


@pytest.fixture
def sweep_of_records(tmp_path):
    """A folder of invented records: seeds, two windows counts of one text, and a run that failed."""
    runs = [*test_report.sweep(), test_report.record("wanda", "0.5", 33.0, window=512)]
    other = test_report.record("wanda", "0.5", 44.0, sha="9c" * 32, seed=5)  # as many tokens of another text
    failed = {"schema": 1, "run_id": "x-failed", "status": "failed", "error": "it broke", "settings": {"model": "demo"},
              "metrics": {}}
    for r in [*runs, other, failed]:
        if "data" in r:
            r["model"] |= {"parameters": 100_000, "dtype": "bfloat16"}
            if r["settings"]["method"] == "dense":
                r["data"]["calibration"] = None
            r["environment"] |= {"device": "cpu", "torch": "2", "transformers": "5"}
        report.write(r, tmp_path / "runs" / f"{r['run_id']}.json")
    return tmp_path


def test_tables_give_mean_and_spread_over_seeds(sweep_of_records):
    assert tables.main(["--runs", str(sweep_of_records / "runs"), "--root", str(sweep_of_records)]) == 0
    lines = list(csv.DictReader((sweep_of_records / "results" / "tables.csv").open()))
    [line] = [x for x in lines if x["method"] == "wanda" and x["pattern"] == "0.6"]
    assert float(line["mean"]) == pytest.approx((20 + 20.125) / 2) and line["runs"] == "2"
    assert float(line["std"]) == pytest.approx(0.125 / 2**0.5)
    halves = [x for x in lines if x["method"] == "wanda" and x["pattern"] == "0.5"]
    assert sorted((x["runs"], float(x["mean"])) for x in halves) == [("1", 33.0), ("1", 44.0), ("2", 20.0625)]
    assert len({x["metric"] for x in halves}) == 3, "windows and texts stay apart"
    text = (sweep_of_records / "README.md").read_text()
    assert "20.06 ± 0.09" in text and "it broke" not in text
    assert "failed: it broke" in (sweep_of_records / "results" / "tables.md").read_text()
    every = list(csv.DictReader((sweep_of_records / "results" / "runs.csv").open()))
    assert len(every) == 22 and sum(x["status"] == "failed: it broke" for x in every) == 1


def test_figures_are_written_for_each_table(sweep_of_records):
    out = sweep_of_records / "figures"
    assert figures.main(["--runs", str(sweep_of_records / "runs"), "--out", str(out), "--formats", "svg,png"]) == 0
    names = sorted(f.name for f in out.iterdir())
    assert len(names) == 2 * (3 + 1 + 1)  # each text's bytes, the errors; one text met several patterns
    assert {"demo-builtin-ppl-512-on-text-bytes.svg", "demo-builtin-ppl-512-on-text-bytes.png"} < set(names)
    assert [name for name in names if "sparsity.svg" in name] == [
        "demo-builtin-ppl-256--60-windows--7a7a7a7a--on-text-sparsity.svg"]
    assert "demo-on-text-error.svg" in names


def test_rounded_runs_stand_beside_the_pruned_ones_but_have_no_sparsity():
    rounded = test_report.record("rtn", ppl=12.5, blocks=0)
    rounded["settings"]["pattern"], rounded["data"]["calibration"] = "int8", None
    runs = [test_report.record("dense", ppl=10.0), rounded, test_report.record("wanda", ppl=15.0),
            test_report.record("wanda", "0.5", ppl=14.0)]
    (rows,) = tables.groups(runs).values()
    assert rows == runs
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.figures, "fig_perplexity", lambda rows, metric: seen.update(sparsity=rows))
        patch.setattr(figures.frontier, "fig_bytes", lambda rows, *_: seen.update(bytes=rows))
        figures.draw(runs)
    assert rounded in seen["bytes"] and rounded not in seen["sparsity"]


@pytest.mark.parametrize("script", [tables, figures])
def test_bad_input_of_tables_and_figures(script, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{")
    for argv, word in ((["--runs", str(tmp_path / "absent")], "absent"), (["--run", "x"], "--run"),
                       (["--runs", str(tmp_path / "runs")], "a.json")):
        assert script.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_the_readme_of_the_scripts_names_each():
    text = (ROOT / "scripts" / "README.md").read_text()
    missing = [f.name for f in (ROOT / "scripts").glob("[a-z]*.py") if f.name not in text]
    assert not missing
    assert all((ROOT / "scripts" / name).exists() for name in re.findall(r"scripts/([\w/]+\.\w+)", text))


def test_bench_prune(tmp_path):
    import bench_prune

    bench_prune.main(["--toy", "--out", str(tmp_path)])
    out = json.loads((tmp_path / "bench_prune.json").read_text())
    for run in out["runs"].values():
        assert run["published"]["forward"] > 0 and run["oneshot"]["forward"] > 0
    assert "column loop" in (tmp_path / "bench_prune.md").read_text()


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
    (tmp_path / "none").mkdir()
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


def test_bench_solvers(tmp_path):
    import bench_solvers

    from oneshot.prune import solvers

    bench_solvers.main(["--toy", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "bench_solvers.json").read_text())["rows"]
    assert {r["method"] for r in rows} >= set(solvers.names()["solver"]) and len(rows) % 4 == 0
    assert all(r["seconds"] > 0 and r["error"] > 0 for r in rows)
    assert all(r["error"] == 1 for r in rows if r["method"] == "sparsegpt")
    swaps = [r for r in rows if r["method"].endswith("+swaps")]
    assert swaps and all(r["floor_flops"] is None for r in swaps)  # rows leave its rounds: rounds say no floor
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


def test_tasks_have_a_section_of_their_own_and_stay_out_of_the_readme(tmp_path):
    for method, answers in (("dense", [1, 1, 0, 1]), ("wanda", [0, 1, 0, 1])):
        r = test_accuracy.run(method, answers)
        r["settings"] |= {"tasks": "letters", "task_limit": 4}
        r["model"] |= {"parameters": 100_000}
        r["data"]["calibration"] = None if method == "dense" else {"source": "c4.jsonl (3 documents); joined"}
        r["environment"] |= {"device": "cpu", "torch": "2", "transformers": "5", "lm_eval": "0.4"}
        report.write(r, tmp_path / "runs" / f"{r['run_id']}.json")
    assert tables.main(["--runs", str(tmp_path / "runs"), "--root", str(tmp_path)]) == 0
    text = (tmp_path / "results" / "tables.md").read_text()
    assert "calibrated on c4.jsonl (3 documents); at most the first 4 documents" in text
    assert "| letters acc | " in text and "0.500° (-0.250 ± 0.250 ~)" in text and "2 of 2 values" in text
    assert "letters" not in (tmp_path / "README.md").read_text()
