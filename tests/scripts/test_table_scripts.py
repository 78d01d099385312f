"""scripts/tables, on invented records and on those of results/; and what holds for every script."""

import ast
import csv
import importlib
import re
from pathlib import Path

import best_table
import figures
import folder_tables
import heal_table
import pytest
import reporting
import tables
import test_accuracy

from oneshot import report
from oneshot.models import gguf
from oneshot.report import section

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
PROGRAMS = [file for file in SCRIPTS if "__main__" in file.read_text()]


# ------------------------------------------------------------------ tables

def test_tables_are_not_stale():
    assert tables.main(["--check"]) == 0, "run python scripts/tables/tables.py"
    assert best_table.main(["--check"]) == 0, "run python scripts/tables/best_table.py"
    assert heal_table.main(["--check"]) == 0, "run python scripts/tables/heal_table.py"
    assert folder_tables.main(["--check"]) == 0, "run python scripts/tables/folder_tables.py"


@pytest.mark.parametrize("program", [tables.PROGRAM, "scripts/tables.py"])
def test_tables_notice_a_change(tmp_path, program):
    """Also in a section that bears an older program's name."""
    (tmp_path / "none").mkdir()
    (tmp_path / "README.md").write_text(section.replace("before\n", "pruning", program, "old") + "\nafter\n")
    arguments = ["--runs", str(tmp_path / "none"), "--root", str(tmp_path)]
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("written by") == 1 and f"pruning: written by {tables.PROGRAM} -->" in text


def test_the_readme_has_the_sweep_on_a_real_model_and_says_how_it_computed(tmp_path):
    """Its own section, of its own records; the note only where all runs are such."""
    for compute, said in (("stored", True), ("auto", False)):
        for r in reporting.sweep():
            r["settings"]["compute"] = compute if r["settings"]["method"] == "wanda" else "stored"
            r["environment"] |= {"device": "cpu", "torch": "2", "transformers": "5"}
            report.write(r, tmp_path / "results" / "real" / f"{r['run_id']}.json")
        text = tables.with_real("before\n<!-- real: written by x -->\n<!-- real: end -->\nafter\n", tmp_path)
        assert text.startswith("before\n") and text.endswith("after\n") and "| wanda " in text
        assert "one record a run in `results/real`" in text and ("--compute stored" in text) == said
        assert "Seed 0, 1, cpu" in text and "commit abc1234" in text
        assert "calibrated on text; measured on 60 windows" in text
    assert tables.with_real("as it was", tmp_path / "none") == "as it was"


def test_a_folders_table_says_how_it_came_about_and_shows_its_pictures(tmp_path):
    folder = tmp_path / "damage"
    for method in ("dense", "wanda", "rtn"):
        r = reporting.record(method, ppl=20.0, model="smollm2", blocks=0)
        r["settings"]["pattern"] = {"rtn": "int4", "dense": "dense"}.get(method, "2:4")
        r["environment"] |= {"device": "cpu (a processor)", "torch": "2", "transformers": "5"}
        report.write(r, folder / f"{r['run_id']}.json")
    (folder / "a-damage-2of4.svg").touch()
    (folder / "a-bytes.svg").touch()
    assert folder_tables.main(["--results", str(tmp_path), "--check"]) == 1
    assert folder_tables.main(["--results", str(tmp_path)]) == 0 == folder_tables.main(
        ["--results", str(tmp_path), "--check"])
    text = (folder / "table.md").read_text()
    assert "Seed 0, cpu (a processor), torch 2, transformers 5, commit abc1234" in text
    assert "builtin ppl @256: 60 windows." in text and f"smollm2: {gguf.on_grid()}." in text and "| wanda " in text
    assert "](a-damage-2of4.svg)" in text and "[a-bytes](a-bytes.svg)" in text
    for file in folder.glob("*rtn*.json"):
        file.unlink()
    assert gguf.on_grid() not in folder_tables.page(folder)  # nothing is rounded


def test_the_built_in_models_figures_are_not_in_the_readme():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 50 and not [row for row in rows if re.search(r"\|\s+demo", row)]


def test_weights_that_are_on_no_grid_are_not_said_to_be():
    assert gguf.grid("GGUF Q4_1") == (gguf.on_grid(),) and gguf.grid("GGUF Q8_0") == (gguf.on_grid("Q8_0"),)
    assert not [told for kind in ("F32", "F16", "BF16") for told in gguf.grid(f"GGUF {kind}") if "grid" in told]
    assert gguf.beside_integers(["demo"]) == "" and gguf.on_grid() in gguf.beside_integers(["demo", "smollm2"])


@pytest.mark.parametrize("page", ["damage/table.md", "bench/cpu_quality.md", "bench/integers.md", "fit/fit.md"])
def test_rows_of_integers_of_smollm2_say_that_its_weights_are_on_a_grid(page):
    text = (ROOT / "results" / page).read_text()
    assert "int4" in text and "smollm2" in text and f"smollm2: {gguf.on_grid()}" in text


@pytest.fixture
def sweep_of_records(tmp_path):
    """A folder of invented records: seeds, two windows counts of one text, and a run that failed."""
    runs = [*reporting.sweep(), reporting.record("wanda", "0.5", 33.0, window=512)]
    other = reporting.record("wanda", "0.5", 44.0, sha="9c" * 32, seed=5)  # as many tokens of another text
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
    whole = (sweep_of_records / "results" / "tables.md").read_text()
    assert "20.06 ± 0.09" in whole and "failed: it broke" in whole
    assert "20.06 ± 0.09" not in text and "it broke" not in text  # the built-in model's tables are not the README's
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
    rounded = reporting.record("rtn", ppl=12.5, blocks=0)
    rounded["settings"]["pattern"], rounded["data"]["calibration"] = "int8", None
    runs = [reporting.record("dense", ppl=10.0), rounded, reporting.record("wanda", ppl=15.0),
            reporting.record("wanda", "0.5", ppl=14.0)]
    (rows,) = tables.groups(runs).values()
    assert rows == runs
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.figures, "fig_perplexity", lambda rows, metric: seen.update(sparsity=rows))
        patch.setattr(figures.figures, "fig_bytes", lambda rows, *_: seen.update(bytes=rows))
        figures.draw(runs)
    assert rounded in seen["bytes"] and rounded not in seen["sparsity"]


@pytest.mark.parametrize("script", [tables, figures], ids=lambda script: script.__name__)
def test_bad_input_of_tables_and_figures(script, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{")
    for argv, word in ((["--runs", str(tmp_path / "absent")], "absent"), (["--run", "x"], "--run"),
                       (["--runs", str(tmp_path / "runs")], "a.json")):
        assert script.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err


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


# ------------------------------------------------------------------ every script

@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_help_of_every_script(file, capsys):
    if file.stem == "gpu":
        pytest.importorskip("triton", reason="the kernels need Triton (pip install triton)")
    with pytest.raises(SystemExit) as ended:
        module = importlib.import_module(file.stem)
        paper = [module.PAPER] if hasattr(module, "PAPER") else []
        module.main(*paper, ["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: " in out and f"python scripts/{file.parent.name}/" in out


def test_the_readmes_name_each_script_and_what_they_name_is_there():
    for readme in (ROOT / "scripts" / "README.md", ROOT / "results" / "README.md"):
        named = re.findall(r"scripts/[\w/]+\.\w+", readme.read_text())
        assert named and all((ROOT / name).exists() for name in named), readme
    text = (ROOT / "scripts" / "README.md").read_text()
    assert not [file.name for file in SCRIPTS if file.name not in text]
    names = [file.stem for file in SCRIPTS]
    assert len(names) == len(set(names)), "tests import them by these names"


def test_results_hold_nothing_that_their_readme_does_not_name():
    text = (ROOT / "results" / "README.md").read_text()
    found = [f.relative_to(ROOT / "results") for f in (ROOT / "results").iterdir() if f.name != "README.md"]
    assert not [name for name in map(str, found) if f"`{name}" not in text]


def private(source):
    """What a source uses of other modules though its name begins with an underscore; torch's own is torch's matter."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
            found |= {name for name in names if re.search(r"(^|\.)_[a-z]", name)}
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            used = ast.unparse(node)
            found |= set() if used.split(".")[0] in ("self", "torch", "os") else {used}
    return found


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_no_script_reads_what_is_private(file):
    assert not private(file.read_text())


def test_what_is_private_is_found():
    assert private("from a import _b") == {"_b"} and private("import _a") == {"_a"} and private("a._b.c") == {"a._b"}
    assert private("self._a = torch._b(a.b)") == set()
