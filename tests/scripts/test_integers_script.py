"""scripts/bench/integers.py: a row is measured once, the page says what the rows say, bytes are compared with bytes."""

import json
from pathlib import Path

import integers
import pytest
from tiny import plain_pages  # noqa: F401

DEMO = {"demo": ["--model", "demo", "--evaluate", "builtin:prose", "--seqlen", "32", "--nsamples", "4"]}
EVERY = integers.WAYS["main"] | integers.WAYS["more"]


def row(way, excess, stored, seed=0):
    return {"model": "demo", "seed": seed, "way": way, "flags": EVERY[way], "excess": excess, "metric": "text/ppl",
            "window": 64, "dense_ppl": 10.0, "stored": stored, "bits": stored / 100, "seconds": 2.0,
            "rounded_to_zero": 3, "environment": {"device": "cpu", "threads": 1, "torch": "2", "commit": "abc",
                                                  "dirty": False, "date": "today"}}


def test_the_page_says_what_the_rows_say(tmp_path):
    rows = [row(integers.NEAREST, 0.4, 325), row(integers.NEAREST, 0.6, 325, seed=1), row("int3 by GPTQ", 0.3, 326),
            row("int8 by GPTQ", 0.01, 800)]
    (tmp_path / "integers.json").write_text(json.dumps({"rows": rows}))
    assert integers.main(["--out", str(tmp_path), "--page"]) == 0
    assert "At 3.25 bits the least is lost by **int3 by GPTQ**, 0.3000 nats" in (tmp_path / "integers.md").read_text()
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in (tmp_path / "integers.md").read_text().splitlines() if line.startswith("| ")}
    assert lines["int3 by GPTQ"][2:4] == ["0.3000", "40 %"] and lines["int8 by GPTQ"][3] == "-"
    assert lines[integers.NEAREST][2:4] == ["0.5000 ± 0.1414", "-"]
    assert list(lines)[2] == "int8 by GPTQ"  # most bits first, behind the head


def test_the_page_here_is_not_stale():
    folder = Path(__file__).parents[2] / "results" / "bench"
    if rows := integers.read(folder / "integers.json"):
        assert integers.page(rows) == (folder / "integers.md").read_text(encoding="utf-8"), "run it with --page"


@pytest.mark.usefixtures("plain_pages")
def test_a_row_is_measured_once_and_takes_what_its_way_says(tmp_path, monkeypatch):
    monkeypatch.setattr(integers, "flags_of", lambda shared: DEMO)
    ways = "2:4, then int4 by GPTQ;int4 to nearest, then 2:4 by Wanda;int3 by GPTQ"
    argv = ["--only", "demo", "--seeds", "0", "--ways", ways, "--out", str(tmp_path), "--eval-windows", "2"]
    assert integers.main(argv) == 0
    before = (tmp_path / "integers.json").read_text()
    rows = {r["way"]: r for r in json.loads(before)["rows"]}
    assert set(rows) == set(ways.split(";")) and len({r["stored"] for r in rows.values()}) == 1
    assert all(r["excess"] > 0 and r["bits"] == pytest.approx(3.25, abs=0.05) for r in rows.values())
    assert integers.main(argv) == 0 and (tmp_path / "integers.json").read_text() == before


@pytest.mark.parametrize("argv", [["--only", "nope"], ["--ways", "nope"]])
def test_bad_input_is_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integers, "flags_of", lambda shared: {"demo": []})
    assert integers.main(["--only", "demo", *argv, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {argv[0]}")
