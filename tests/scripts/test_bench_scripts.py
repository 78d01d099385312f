"""scripts/bench at toy size, but for best.py (test_best.py), CPU kernels (test_cpu_bench_scripts.py) and a GPU's."""

import csv
import json
import re
import tempfile

import column_loop
import common
import one_side
import packed
import products
import prune
import pytest
import solvers
import tables
import tiny
import torch
import versions
import versus_llmcompressor
from transformers import AutoModelForCausalLM
from variants import needs_compiler

from oneshot import calibrate, models
from oneshot.pipeline import run
from oneshot.prune import patterns
from oneshot.prune import solvers as ours
from oneshot.runtime import environment


def plain(text):
    """A table without its padding."""
    return re.sub(" +", " ", text)


def test_prune(tmp_path, capsys):
    assert prune.main(["--toy", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    out = json.loads((tmp_path / "prune.json").read_text())
    assert list(out["runs"]) == ["sparsegpt 0.5", "sparsegpt 2:4", "wanda 0.5"]
    for timed in out["runs"].values():
        assert timed["published"]["forward"] > 0 and timed["oneshot"]["forward"] > 0
        assert set(timed["published"]) == set(timed["oneshot"]) == set(prune.PARTS)
    page = (tmp_path / "prune.md").read_text()
    assert "## The column loop alone" in page and "| 176 x 64 | 2:4 |" in plain(page)
    assert capsys.readouterr().out == page
    (tmp_path / "prune.md").unlink()
    assert prune.main(["--page", "--out", str(tmp_path)]) == 0 and (tmp_path / "prune.md").read_text() == page


def test_both_sides_prune_a_copy(monkeypatch):
    """The model is left as it was, and what is timed is pruned."""
    seen = []
    real = prune.ours_block

    def look(block, *args):
        real(block, *args)
        seen.extend(float((w.get() == 0).float().mean()) for w in block.weights)
    monkeypatch.setattr(prune, "ours_block", look)
    args = prune.parse_args(["--toy"])
    monkeypatch.setattr(models, "walk", remembered := Walk(models.walk))
    prune.measure(args)
    assert len(seen) == 3 * 7 and all(share == pytest.approx(0.5, abs=0.01) for share in seen)
    assert all(torch.equal(w.get(), before) for w, before in remembered.weights)


class Walk:
    """models.walk, with the weights of every block that it yields as they were then."""

    def __init__(self, real):
        self.real, self.weights = real, []

    def __call__(self, *args, **kwargs):
        for block in self.real(*args, **kwargs):
            self.weights += [(w, w.get().clone()) for w in block.weights]
            yield block


def test_the_page_needs_its_numbers(tmp_path, capsys):
    for script in (prune, solvers):
        assert script.main(["--page", "--out", str(tmp_path)]) == 2
        assert ".json" in capsys.readouterr().err


def test_patterns_as_the_published_code_takes_them():
    assert common.removed(patterns.parse("0.7")) == (0.7, 0, 0)
    assert common.removed(patterns.parse("3:4")) == (0.25, 1, 4)  # it counts those that go


def test_the_published_loop_runs_windows_in_their_order():
    model, _ = models.load("demo", dtype="float32")
    ids = torch.arange(3, 27).view(3, 8)
    activations = calibrate.capture(model, ids, batch_size=1)
    _, blocks = models.blocks(model)
    call, inputs = common.caller(activations, 0), list(activations.hidden)
    twice = [[call(blocks[0], x) for x in inputs] for _ in range(2)]
    whole = calibrate.capture(model, ids, batch_size=3)
    calibrate.replay(blocks[0], whole, 0)
    for out in twice:
        torch.testing.assert_close(torch.cat(out), whole.hidden[0])


def test_solvers(tmp_path):
    assert solvers.main(["--toy", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "solvers.json").read_text())["rows"]
    assert {r["method"] for r in rows} >= set(ours.names()["solver"]) - {"gradient", "taylor"} and len(rows) % 4 == 0
    assert all(r["seconds"] > 0 and r["error"] > 0 for r in rows)
    assert all(r["error"] == 1 for r in rows if r["method"] == "sparsegpt")
    swaps = [r for r in rows if r["method"].endswith("+swaps")]
    assert swaps and all(r["floor_flops"] is None for r in swaps)  # rows leave its rounds: rounds say no floor
    assert "| alps |" in plain((tmp_path / "solvers.md").read_text())


def test_products(tmp_path, capsys):
    assert products.main(["--toy", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "products.csv").open()))
    assert [row["shape"] for row in rows] == ["16x8x4", "1x8x4"]
    assert all(float(row["times_plain"]) > 0 and float(row["ours_error"]) < 1e-5 for row in rows)


@needs_compiler
def test_column_loop(tmp_path, capsys):
    assert column_loop.main(["--toy", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    rows = [line.split(",") for line in (tmp_path / "column_loop.csv").read_text().splitlines()]
    assert rows[0] == column_loop.HEAD and [row[:2] for row in rows[1:]] == [["64x64", "2:4"], ["64x64", "0.5"]]
    assert all(float(second) > 0 for row in rows[1:] for second in row[2:8])
    assert all(row[column_loop.HEAD.index("masks_differ")] == "0" for row in rows[1:])


def test_packed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.page, "of_one", lambda record: "")
    small = ["--only", "demo", "--dtype", "float16", "--method", "magnitude", "--windows", "2"]
    assert packed.main([*small, "--out", str(tmp_path / "results" / "bench")]) == 0, capsys.readouterr().err
    text = (tmp_path / "results" / "bench" / "packed.json").read_text()
    row, = json.loads(text)["models"]
    assert row["packed_linears"] == row["linears"] == 35 and row["ratio"] == 0.5625
    assert [p["windows"] for p in row["perplexity"]] == [2, 2]
    assert all(p["dense"] == pytest.approx(p["packed"], rel=1e-6) for p in row["perplexity"])
    assert str(tmp_path) not in text and tempfile.gettempdir() not in text
    section = plain(tables.with_packed("", tmp_path))
    assert f"| demo | float16 | builtin:prose @256 | {row['perplexity'][0]['dense']:.4f} |" in section


def test_packed_says_which_claim_is_broken():
    good = {"model": "m", "dtype": "bfloat16", "linears": 2, "packed_linears": 2, "ratio": 0.5625,
            "perplexity": [{"text": "t", "relative_difference": 1e-9}], "faults": {"packed": [], "twin": []}}
    assert packed.faults(good) == []
    for change, word in (({"packed_linears": 1}, "1 of 2"), ({"ratio": 0.6}, "0.6000x"),
                         ({"faults": {"twin": ["w: 3 values"]}}, "w: 3 values"),
                         ({"perplexity": [{"text": "t", "relative_difference": float("nan")}]}, "perplexity on t")):
        told, = packed.faults(good | change)
        assert told.startswith("m bfloat16: ") and word in told


def test_without_the_small_models_it_says_so(tmp_path, capsys):
    assert packed.main(["--shared", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --shared") and "not part of the repository" in err and err.count("\n") == 1


@pytest.mark.parametrize("computes", [torch.float32, torch.bfloat16])
def test_one_side_prunes_and_says_what_it_took(computes, tmp_path, monkeypatch):
    """Ours; llm-compressor's needs an environment of its own, and is refused where there is none."""
    tiny.save_model(tmp_path / "model")
    torch.save(torch.randint(3, 20, (4, 16)), tmp_path / "tokens.pt")
    seen, real = set(), torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda own, x: seen.add(x.dtype) or real(own, x))
    one_side.main(["oneshot", str(tmp_path / "model"), str(tmp_path / "tokens.pt"), "wanda", "bfloat16",
                   str(computes).removeprefix("torch."), str(tmp_path / "out")])
    assert seen == {computes}
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["cpu_seconds"] > 0 and measured["peak_bytes"] >= measured["loaded_bytes"] > 2**20
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(patterns.NM(2, 4).holds(w.get()) for w in models.all_weights(pruned))
    rows = [measured | {"sparsity": 0.5, "ppl": 20.0},
            measured | {"side": "llmcompressor", "sparsity": 0.5, "ppl": 21.0,
                        "cpu_seconds": 3 * measured["cpu_seconds"]},
            measured | {"side": "llmcompressor", "computes": "float16", "sparsity": 0.5, "ppl": 21.0}]
    page = versus_llmcompressor.markdown({
        "rows": rows, "environment": environment.environment("cpu"), "nsamples": 4, "seqlen": 16, "eval_windows": 2,
        "dense_ppl": 9.5})
    assert "takes 3.00 times the processor time and 1.00 times the memory" in page and "dense 9.50" in page
    assert "oneshot has 0.952 times its perplexity: met." in page
    rows[1] |= {"cpu_seconds": measured["cpu_seconds"], "ppl": 19.0}
    assert "MISSED: time, perplexity." in versus_llmcompressor.markdown({
        "rows": rows, "environment": environment.environment("cpu"), "nsamples": 4, "seqlen": 16, "eval_windows": 2,
        "dense_ppl": 9.5})
    assert page.count("takes") == 1  # beside what computes alike
    assert versus_llmcompressor.main(["--peer", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2


@pytest.mark.skipif(not (versions.ROOT / ".git").exists(), reason="no git repository: nothing to take versions from")
def test_two_versions_run_in_turn(tmp_path, capsys):
    flags = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--toy", "--rounds", "1"]
    assert versions.main(["--before", "absent", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --before absent: ") and err.count("\n") == 1 and not (tmp_path / "work").exists()
    assert versions.main(["--before", "HEAD", *flags]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "versions.json").read_text())
    (before,), (after,) = found["runs"]["before"], found["runs"]["after"]
    assert found["commits"]["before"] == found["commits"]["after"] and before["ppl"] == after["ppl"]
    assert sum(before[part] for part in (*versions.PARTS, "other")) == pytest.approx(before["prune"])
    assert before["process"] > before["prune"] and before["peak_bytes"] > 2**27
    table = plain((tmp_path / "out" / "versions.md").read_text())
    assert f"| ppl | {before['ppl']:.2f} | {before['ppl']:.2f} | 1.00 |" in table
    assert table.count("asked 2: MISSED") == 1  # nobody halves the memory of the same commit
    assert versions.main(["--page", "--out", str(tmp_path / "out")]) == 0
    assert plain((tmp_path / "out" / "versions.md").read_text()) == table
    assert versions.main(["--page", "--out", str(tmp_path)]) == versions.main(["--out", str(tmp_path)]) == 2
