"""The papers' tables: a row that cannot run says why, before anything is loaded; one that can stands beside ours."""

import argparse
import importlib
from pathlib import Path

import paper as shared
import pytest
from tiny import place  # noqa: F401

from oneshot import report

SCRIPTS = ("alps", "sparsegpt", "wanda")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, an empty cache, and no model that is loaded."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere")
    shared.out_of_reach.cache_clear()


def go(name, results, capsys, *argv):
    """(exit code, {row: cells}, stderr) of one script."""
    paper = importlib.import_module(name).PAPER if isinstance(name, str) else name
    code = shared.main(paper, [*map(str, argv), "--results", str(results)])
    out, err = capsys.readouterr()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:3] == "| f"
             or line[:3] == "| m"]
    return code, {" ".join(line[:3]): line[3:] for line in lines if line[0] != "model"}, err


@pytest.mark.parametrize("name", SCRIPTS)
def test_offline_every_row_says_why(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shared, "attempt", lambda cfg: pytest.fail("was run"))
    code, table, _ = go(name, tmp_path / "runs", capsys)
    paper = importlib.import_module(name).PAPER
    assert code == 0 and len(table) == len(shared.rows_of(paper)) >= 20
    for published, ours, difference, note in table.values():
        assert float(published.split(" ")[0]) > 3 and (ours, difference) == ("-", "-")
        assert note.startswith("not run: ") and ("not on this machine" in note or "no method" in note)


@pytest.mark.parametrize("name", SCRIPTS)
def test_published_numbers_are_those_of_the_papers_shape(name):
    """Every method costs more perplexity than dense, and more at 70 % than at 60 % than at 50 %."""
    paper = importlib.import_module(name).PAPER
    for cells in paper.perplexity.values():
        for method, values in cells.items():
            if method == "dense":
                continue
            means = {p: v[0] if isinstance(v, tuple) else v for p, v in values.items()}
            assert all(v > cells["dense"] for v in means.values())
            ordered = [means[p] for p in ("0.5", "0.6", "0.7") if p in means]
            assert ordered == sorted(ordered) and means.get("4:8", 0) < means.get("2:4", 1e9)


def test_windows_and_seeds_of_the_papers():
    papers = {name: importlib.import_module(name).PAPER for name in SCRIPTS}
    assert {name: (p.window, p.seeds) for name, p in papers.items()} == {
        "alps": (2048, 5), "sparsegpt": (2048, 1), "wanda": (4096, 1)}
    assert all(p.flags == {"calibration": "c4", "evaluate": "wikitext2", "nsamples": 128} for p in papers.values())


@pytest.fixture
def paper(place):  # noqa: F811
    """A paper about the tiny model: the folder `place` holds it as `model`."""
    flags = {"calibration": str(place / "calibration.txt"), "evaluate": str(place / "evaluation.txt"), "nsamples": 4}
    numbers = {"facebook/model": {"dense": 40.0, "magnitude": {"2:4": (50.0, 0.5)}, "wanda": {"2:4": 50.0},
                                  "nobodys": {"2:4": 50.0}}}
    return shared.Paper("Tiny", "nowhere", 16, (shared.Model("facebook/model", 3e4, 32, 48, 3),), numbers, 2, flags)


def test_what_can_run_stands_beside(place, paper, tmp_path, capsys):  # noqa: F811
    code, table, err = go(paper, tmp_path / "runs", capsys, "--models", place)
    assert code == 0 and "[4/4]" in err
    records = [report.read(f) for f in (tmp_path / "runs").glob("*.json")]
    assert len(records) == 1 + 2 + 2 and {r["settings"].get("seed") for r in records} == {None, 0, 1}
    own = [r["metrics"]["evaluation/ppl"] for r in records if r["settings"]["method"] == "wanda"]
    mean = sum(own) / 2
    published, ours, difference, note = table["facebook/model wanda 2:4"]
    assert published == "50.00" and ours.startswith(f"{report.number(mean)} ± ")
    assert difference == f"{100 * (mean / 50 - 1):+.1f} %"
    assert "2 seeds" in note and "calibrated on calibration.txt" in note and "measured on evaluation.txt" in note
    assert table["facebook/model magnitude 2:4"][0] == "50.00 ± 0.5"
    assert "calibrated" not in table["facebook/model dense dense"][3]
    assert table["facebook/model nobodys 2:4"][3] == "not run: no method nobodys in this version"


def test_a_second_time_the_records_are_taken(place, paper, tmp_path, capsys, monkeypatch):  # noqa: F811
    words = ["--models", place, "--only", "WANDA", "--seeds", "1"]
    first = go(paper, tmp_path / "runs", capsys, *words)
    monkeypatch.setattr("oneshot.pipeline.run.work", lambda *args: pytest.fail("computed again"))
    assert go(paper, tmp_path / "runs", capsys, *words)[1] == first[1] and len(first[1]) == 1


def test_a_run_that_fails_is_a_row(place, paper, tmp_path, capsys):  # noqa: F811
    code, table, _ = go(paper, tmp_path / "runs", capsys, "--models", place,
                        "--calibration", tmp_path / "absent.txt", "--only", "wanda")
    assert code == 0 and "not run: --calibration" in table["facebook/model wanda 2:4"][3]


def test_list_runs_nothing(place, paper, tmp_path, capsys):  # noqa: F811
    code, table, _ = go(paper, tmp_path / "runs", capsys, "--models", place, "--list", "--only", "wanda")
    assert code == 0 and [cells[3] for cells in table.values()] == ["can be run"] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("device", "there", "words"), [
    ("cpu", 10, ["GiB of memory, 10 GiB are free"]), ("cpu", 1000, ["hours on a CPU", "--slow"])])
def test_size(place, tmp_path, capsys, monkeypatch, device, there, words):  # noqa: F811
    """A model that is here but too large for memory, or for patience."""
    (tmp_path / "Llama-2-7b-hf").symlink_to(place / "model")
    monkeypatch.setattr(shared, "free", lambda place: there * 2**30)
    monkeypatch.setattr(shared, "attempt", lambda cfg: pytest.fail("was run"))
    slow = ["--slow"] if there == 10 else []
    _, table, _ = go("wanda", tmp_path / "runs", capsys, "--models", tmp_path, "--only", "7b", "wanda", "2:4",
                     "--calibration", "builtin", "--evaluate", "builtin", "--device", device, *slow)
    [cells] = table.values()
    assert not [word for word in words if word not in cells[3]], cells


def test_needs_grow_with_the_model_and_free_memory_is_known():
    small, large = (shared.Model("m", n, h, 4 * h, 24) for n, h in ((1e9, 2048), (7e9, 4096)))
    args = argparse.Namespace(models=None, seeds=1, results=Path("runs"))
    paper = importlib.import_module("alps").PAPER
    cfg = shared.configure(paper, shared.Row(small, "wanda", "2:4", 1.0, None), args, ["--device=cpu"])[0]
    assert 2e9 < shared.needs(small, cfg)["cpu"] < shared.needs(large, cfg)["cpu"] < 40e9
    free = shared.free("cpu")
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize(("argv", "words"), [
    (["--only", "gpt-5"], ["--only gpt-5", "facebook/opt-125m"]), (["--seeds", "0"], ["--seeds 0"]),
    (["--models", "/no/where"], ["--models"]), (["--nsample", "3"], ["--nsample", "--nsamples"]),
    (["--pattern", "2:4"], ["--pattern", "--only"]), (["--save=x"], ["--save"]),
    (["--device", "abacus"], ["--device"])])
def test_bad_flags(tmp_path, capsys, argv, words):
    code, table, err = go("sparsegpt", tmp_path / "runs", capsys, *argv)
    assert code == 2 and not table and err.count("\n") == 1, err
    assert not [word for word in words if word not in err], err
