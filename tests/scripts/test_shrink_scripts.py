"""scripts/bench/shrink.py, shrink_speed.py and their tables: what is measured once, what a share is, no stale page."""

import json

import pytest
import shrink
import shrink_speed
import shrink_table


def row(way, excess, seed=0, asked=0.7, **more):
    return {"model": "demo", "seed": seed, "asked": asked, "way": way,
            "flags": (shrink.WAYS["main"] | shrink.WAYS["ingredients"])[way], "excess": excess, "metric": "text/ppl",
            "window": 64, "dense_ppl": 10.0, "cpu_seconds": 2.0, "environment": {
                "device": "cpu", "threads": 1, "torch": "2", "transformers": "5", "commit": "abc",
                "dirty": False}} | more


def test_less_is_against_the_best_baseline_with_the_same_seed(tmp_path):
    rows = [row("flap", 0.5), row("wanda-sp", 0.4), row("shortgpt", 0.8), row("oneshot", 0.1),
            row("oneshot", 0.3, seed=1), row("flap", 1.0, seed=1), row("wanda-sp", 0.9, seed=1),
            row("shortgpt", 0.6, seed=1), row("flap, as published", 0.45), row("flap, as published", 0.7, seed=1)]
    best = shrink_table.least(rows)
    assert best == {(0.7, 0): 0.4, (0.7, 1): 0.6}
    assert shrink_table.less(rows, best, "oneshot", 0.7) == pytest.approx([0.75, 0.5])
    (tmp_path / "demo.json").write_text(json.dumps({"rows": rows}))
    assert shrink_table.main(["--out", str(tmp_path), "--check"]) == 1
    assert shrink_table.main(["--out", str(tmp_path)]) == 0 == shrink_table.main(["--out", str(tmp_path), "--check"])
    text = (tmp_path / "shrink.md").read_text()
    assert "0.200 ± 0.141 (2) [-62 %]" in text and "0.7, oneshot: 62 % less" in text and "met" in text


def test_rows_of_other_flags_are_not_shown(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps({"rows": [row("flap", 0.5, flags={"tries": 9})]}))
    with pytest.raises(ValueError, match="--out"):
        shrink_table.rows_of(tmp_path)


def test_the_page_here_is_not_stale():
    if (shrink_table.ROOT / "results" / "shrink" / "shrink.md").is_file():
        assert shrink_table.main(["--check"]) == 0, "run python scripts/tables/shrink_table.py"


@pytest.mark.parametrize("share, blocks, layers", [("0.7", 5, "4"), ("0.5", 5, "3"), ("0.8", 5, "4"),
                                                   ("0.7", 30, "21")])
def test_shortgpt_drops_as_many_blocks_as_the_budget_allows(share, blocks, layers):
    words = shrink.given(shrink.WAYS["main"]["shortgpt"], share, blocks)
    assert words[words.index("--layers") + 1] == layers and "--order" in words


def test_with_no_block_to_spare_it_is_neurons_alone():
    words = shrink.given(shrink.WAYS["main"]["shortgpt"], "0.9", 5)
    assert "--layers" not in words and "--order" not in words and words[-2:] == ["--tries", "1"]


def test_a_row_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shrink, "flags_of", lambda shared: {"demo": ["--model", "demo", "--evaluate", "builtin:prose",
                                                                     "--seqlen", "32", "--nsamples", "4"]})
    argv = ["--only", "demo", "--seeds", "0", "--shares", "0.7", "--ways", "flap;oneshot", "--out", str(tmp_path),
            "--eval-windows", "2"]
    assert shrink.main(argv) == 0
    before = (tmp_path / "demo.json").read_text()
    rows = json.loads(before)["rows"]
    assert {r["way"] for r in rows} == {"flap", "oneshot"} and all(r["excess"] > 0 and r["share"] <= 0.71 for r in rows)
    assert shrink.main(argv) == 0 and (tmp_path / "demo.json").read_text() == before


@pytest.mark.parametrize("argv", [["--only", "nope"], ["--ways", "nope"]])
def test_bad_input_is_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shrink, "flags_of", lambda shared: {"demo": []})
    assert shrink.main(["--only", "demo", *argv, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {argv[0]}")


def test_speeds_are_of_cuts_that_leave_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setattr(shrink_speed, "SHAPES", {"tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64}})
    monkeypatch.setattr(shrink_speed.latency, "PROMPT", 16)
    assert shrink_speed.main(["--shapes", "tiny", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["speeds"]
    assert len(rows) == 6 and all(r["share"] <= r["asked"] for r in rows)
    text, first = (tmp_path / "speed.md").read_text(), rows[0]["dense"]["decode1"]
    assert f"{first['median']:.1f} ({first['low']:.1f} to {first['high']:.1f}) -> " in text and "GFLOP a token" in text
    assert shrink_speed.main(["--shapes", "huge", "--out", str(tmp_path)]) == 2
