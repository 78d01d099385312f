"""The program end to end on a tiny model: table, record, page, checkpoint, and the same from Python."""

import json
import math

import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

import oneshot
from oneshot.data import choose
from oneshot.measure import perplexity
from oneshot.prune import loop, shared_inputs
from oneshot.report import page
from oneshot.report.record import KEYS


@pytest.fixture(scope="module")
def compared(place):  # noqa: F811
    """(results folder, {(method, pattern): record}, checkpoints) of three methods in two patterns, pictures and all."""
    results = place / "compared"
    argv = tiny.flags(place, method="magnitude,wanda,sparsegpt", pattern="0.5,2:4", results=results,
                      save=place / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_pictures", lambda records, real=page._pictures: real(records) if len(records) > 1
                      else [])  # the page of all runs is drawn in full
        assert tiny.main(*argv) == 0
    return results, tiny.records(results), place / "checkpoints"


def plain_perplexity(folder, text, window=tiny.WINDOW):
    """Perplexity the plain way: the folder loaded by transformers alone, its own loss, window by window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"])
    windows = ids[: len(ids) // window * window].view(-1, window)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]
    return math.exp(sum(losses) / len(losses))


# ---------------------------------------------------------------- table, record, page

def test_every_combination_has_its_record(compared):
    _, records, _ = compared
    assert set(records) == {("dense", "dense"), *((m, p) for m in ("magnitude", "wanda", "sparsegpt")
                                                  for p in ("0.5", "2:4"))}
    assert all(r["status"] == "finished" and r["warnings"] == [] for r in records.values())


def test_record_says_what_was_done(compared, place):  # noqa: F811
    record = compared[1]["sparsegpt", "2:4"]
    assert list(record) == [key for key in KEYS if key not in ("damage", "prompts", "say", "sensitivity")]
    assert len(record["layers"]) == 7 * tiny.BLOCKS and len(record["blocks"]) == tiny.BLOCKS
    row = record["layers"][-1]
    assert (row["name"], row["shape"], row["pattern"]) == (f"model.layers.{tiny.BLOCKS - 1}.mlp.down_proj", [32, 48],
                                                           "2:4")
    assert row["zeros"] == row["target_zeros"] == 768 and row["surplus"] == 0
    assert 0 < row["relative_error"] < 1 and row["seconds"] > 0 and row["info"]["damping"] > 0
    assert {s["name"]: s["reason"] for s in record["skipped"]} == {
        "model.embed_tokens.weight": "embedding", "lm_head.weight": "output head"}
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    assert record["model"] | {"fingerprint": 0} == {
        "name": "model", "family": "llama", "parameters": sum(p.numel() for p in model.parameters()), "fingerprint": 0,
        "prunable": tiny.BLOCKS * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48), "dtype": "float32", "blocks": tiny.BLOCKS,
        "in_blocks": sum(p.numel() for p in model.model.layers.parameters())}
    assert record["sparsity"] == 0.5
    assert record["data"]["calibration"]["windows"] == 8 and record["data"]["calibration"]["tokens"] == 8 * tiny.WINDOW
    windows = (place / "evaluation.txt").stat().st_size // tiny.WINDOW
    how = record["metric_info"]["evaluation/ppl"]
    nats = how.pop("by_window")
    assert how == {"window": tiny.WINDOW, "windows": windows, "tokens": windows * (tiny.WINDOW - 1)}
    assert len(nats) == windows and math.exp(sum(nats) / windows) == pytest.approx(record["metrics"]["evaluation/ppl"])
    assert {"torch", "transformers", "commit", "device", "threads", "date"} <= set(record["environment"])
    assert set(record["seconds"]) == {"load", "data", "prune", "evaluate", "total"}
    assert record["seconds"]["total"] >= record["seconds"]["prune"] > 0
    assert 50e6 < record["peak_memory_bytes"] < 50e9
    assert record["settings"]["solver"] == {"sparsegpt": {"damping": 0.01, "block_size": 128}}
    assert not {"save", "results", "progress", "overwrite"} & set(record["settings"])


def test_fingerprint_is_of_the_dense_weights(compared):
    _, records, _ = compared
    assert len({r["model"]["fingerprint"] for r in records.values()}) == 1
    assert len({r["run_id"] for r in records.values()}) == len(records)


def test_dense_row(compared, place):  # noqa: F811
    dense = compared[1]["dense", "dense"]
    assert dense["layers"] == [] and dense["sparsity"] == 0 and dense["data"]["calibration"] is None
    assert dense["metrics"]["evaluation/ppl"] == pytest.approx(
        plain_perplexity(place / "model", place / "evaluation.txt"), rel=1e-5)


def test_one_page_compares_them(compared):
    [page] = compared[0].glob("*.html")
    text = page.read_text()
    assert page.name.startswith("compare-") and text.count("<svg") >= 3 and "<script" not in text
    for record in compared[1].values():
        assert record["run_id"] in text


def test_checkpoint_loads_plainly_and_measures_the_same(compared, place):  # noqa: F811
    _, records, folders = compared
    values = set()
    for method, pattern in (("wanda", "0.5"), ("sparsegpt", "2:4")):
        value = records[method, pattern]["metrics"]["evaluation/ppl"]
        folder = folders / f"{method}-{pattern.replace(':', 'of')}"
        assert plain_perplexity(folder, place / "evaluation.txt") == pytest.approx(value, rel=1e-5)
        assert json.loads((folder / "oneshot.json").read_text())["record"]["metrics"]["evaluation/ppl"] == value
        assert records[method, pattern]["run_id"] in (folder / "report.html").read_text()
        values.add(value)
    assert len(values | {records["dense", "dense"]["metrics"]["evaluation/ppl"]}) == 3


def test_checkpoint_changes_only_what_was_pruned(compared, place):  # noqa: F811
    dense, pruned = tiny.weights(place / "model"), tiny.weights(compared[2] / "magnitude-2of4")
    assert set(dense) == set(pruned)
    for name, W in pruned.items():
        linear = name.endswith("proj.weight")
        assert torch.equal(W, dense[name]) != linear
        if linear:
            assert torch.equal(W[W != 0], dense[name][W != 0]) and int((W == 0).sum()) == W.numel() // 2


@pytest.mark.usefixtures("plain_pages")
def test_table_at_the_end(place, tmp_path, capfd):  # noqa: F811
    assert tiny.main(*tiny.flags(place, results=tmp_path)) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert f"ppl @{tiny.WINDOW}" in lines[0] and "/ dense" in lines[0]
    assert "dense" in lines[2] and "wanda" in lines[3] and "50.00 %" in lines[3]
    assert lines[-1] == f"report: {next(tmp_path.glob('*.html'))}"
    [dense] = [line for line in lines if line.startswith("left dense: ")]
    assert "of the blocks'" in dense and "embedding" in dense and "output head" in dense
    assert [line.split(":")[0] for line in err.splitlines()] == ["device", "wanda 2", "dense"]  # no one else's remarks


# ---------------------------------------------------------------- families and dtypes

@pytest.mark.usefixtures("plain_pages")
@pytest.mark.parametrize(("kind", "dtype", "method"), [
    ("gpt2", torch.float32, "sparsegpt"), ("llama", torch.bfloat16, "sparsegpt"), ("llama", torch.float16, "wanda")])
def test_other_families_and_stored_dtypes(place, tmp_path, kind, dtype, method):  # noqa: F811
    """GPT-2's Conv1D weights lie transposed; half precision is pruned in float32 and measured as stored."""
    tiny.save_model(tmp_path / "model", kind, dtype)
    argv = tiny.flags(place, "--no-dense", model=tmp_path / "model", method=method, results=tmp_path / "runs",
                      save=tmp_path / "out")
    assert tiny.main(*argv) == 0
    [record] = tiny.records(tmp_path / "runs").values()
    assert record["model"]["dtype"] == str(dtype).removeprefix("torch.") and record["sparsity"] == 0.5
    for row in record["layers"]:
        W = tiny.weights(tmp_path / "out")[row["name"] + ".weight"]
        W = W.T if kind == "gpt2" else W
        assert W.dtype == dtype and list(W.shape) == row["shape"]
        assert int((W.reshape(-1, 4) != 0).sum(1).max()) == 2
    assert plain_perplexity(tmp_path / "out", place / "evaluation.txt") == pytest.approx(
        record["metrics"]["evaluation/ppl"], rel=1e-5)


@pytest.mark.usefixtures("plain_pages")
def test_surplus_zeros_are_listed(place, tmp_path):  # noqa: F811
    """A row that was zero before holds more zeros than were asked for."""
    name = "model.layers.0.mlp.up_proj"
    model = tiny.copy(place / "model", tmp_path / "model")
    tiny.change_weights(model, lambda tensors: tensors[f"{name}.weight"][5].zero_())
    assert tiny.main(*tiny.flags(place, "--no-dense", model=model, results=tmp_path / "runs", evaluate="none")) == 0
    [record] = tiny.records(tmp_path / "runs").values()
    surplus = {row["name"]: row["surplus"] for row in record["layers"] if row["surplus"]}
    assert surplus == {name: 16}
    assert record["sparsity"] == pytest.approx(0.5 + 16 / record["model"]["prunable"])
    assert "Surplus zeros" in next((tmp_path / "runs").glob("*.html")).read_text()


# ---------------------------------------------------------------- warnings, wanda's flags

@pytest.mark.usefixtures("plain_pages")
def test_warnings_reach_record_and_terminal(place, tmp_path, capfd):  # noqa: F811
    same = place / "calibration.txt"
    argv = tiny.flags(place, "--no-dense", results=tmp_path, nsamples=1, evaluate=same.parent / "." / same.name)
    assert tiny.main(*argv) == 0
    [record] = tiny.records(tmp_path).values()
    flatters, few = (next(w for w in record["warnings"] if word in w) for word in ("flatters", "fewer than the 48"))
    out = capfd.readouterr().out
    assert f"warning: {flatters}" in out and f"warning: {few}" in out


@pytest.mark.usefixtures("plain_pages")
def test_line_of_a_wanda_script(place, tmp_path):  # noqa: F811
    """--save gets the results, --save_model the weights."""
    argv = ["--model", place / "model", "--prune_method", "wanda", "--sparsity_ratio", "0.5", "--sparsity_type", "4:8",
            "--nsamples", "8", "--seed", "0", "--use_variant", "--save", tmp_path / "log", "--save_model",
            tmp_path / "model", "--calibration", place / "calibration.txt", "--evaluate", place / "evaluation.txt",
            "--seqlen", "16", "--no_progress"]
    assert tiny.main(*argv) == 0
    assert set(tiny.records(tmp_path / "log")) == {("wanda", "4:8")}
    assert not list((tmp_path / "log").rglob("*.safetensors"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == tiny.BLOCKS




def test_three_lines_of_python(place, compared):  # noqa: F811
    model, tokenizer = oneshot.load(str(place / "model"))
    record = oneshot.prune(model, tokenizer, method="sparsegpt", pattern="2:4", nsamples=8, seqlen=tiny.WINDOW,
                           batch_size=4, calibration=str(place / "calibration.txt"), progress=False)
    text = (place / "evaluation.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids[: len(ids) // tiny.WINDOW * tiny.WINDOW].view(-1, tiny.WINDOW)
    there = compared[1]["sparsegpt", "2:4"]
    assert oneshot.perplexity(model, ids)[0] == pytest.approx(there["metrics"]["evaluation/ppl"], rel=1e-6)
    assert set(record) == set(there) and record["sparsity"] == 0.5
    assert record["model"] == there["model"] and record["data"]["calibration"] == there["data"]["calibration"]
    assert [row["zeros"] for row in record["layers"]] == [row["zeros"] for row in there["layers"]]
    assert json.loads(json.dumps(record)) == record
    assert page.html([record]).startswith("<!DOCTYPE html>")


def test_one_sampling_serves_all_runs_of_a_command(place, tmp_path, monkeypatch):  # noqa: F811
    taken, real = [], choose.calibration
    monkeypatch.setattr(choose, "calibration", lambda *args: taken.append(real(*args)) or taken[-1])
    argv = tiny.flags(place, "--no-dense", method="magnitude,wanda,sparsegpt", calibration="self", evaluate="none",
                      results=tmp_path)
    assert tiny.main(*argv) == 0
    assert len(taken) == 1
    found = {r["data"]["calibration"]["sha256"] for r in tiny.records(tmp_path).values() if r["data"]["calibration"]}
    assert found == {taken[0].sha256}


@pytest.mark.parametrize("more, saved, resumes", [([], True, True), (["--shared-inputs"], True, False),
                                                  ([], False, False)])
def test_an_interrupted_command_says_what_the_next_one_will_do(place, tmp_path, monkeypatch, capsys, more, saved,  # noqa: F811
                                                               resumes):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(loop, "prune_model", stop)
    monkeypatch.setattr(shared_inputs, "prune_shared", stop)
    argv = tiny.flags(place, "--no-dense", *more, results=tmp_path / "runs", save=tmp_path / "out" if saved else None)
    assert tiny.main(*argv) == 130
    assert tiny.said(capsys.readouterr().err) == ["error: interrupted" + (
        "; the same command resumes after the last finished block" if resumes else "")]


@pytest.mark.parametrize("allocate", ["owl", "error"])
def test_nothing_is_spread_where_nothing_is_removed(place, capsys, allocate):  # noqa: F811
    assert tiny.main(*tiny.flags(place, "--no-dense", pattern="dense", allocate=allocate)) == 2
    assert f"--allocate {allocate}: spreads a sparsity" in capsys.readouterr().err


@pytest.mark.usefixtures("plain_pages")
def test_dense_is_measured_once_where_a_run_is_saved(place, tmp_path, monkeypatch):  # noqa: F811
    argv = tiny.flags(place, save=tmp_path / "out", results=tmp_path / "runs")
    assert tiny.main(*argv) == 0
    monkeypatch.setattr(perplexity, "token_losses", lambda *args, **kwargs: pytest.fail("measured again"))
    assert tiny.main(*argv) == 0


@pytest.mark.parametrize("can, compute, said", [({}, "stored", True), ({}, "auto", False),
                                                ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "stored", True),
                                                ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "stored", False),
                                                ({"amx_bf16": True, "cpu_name": "Intel Xeon"}, "stored", False)])
def test_computing_as_stored_where_that_is_slower_is_a_warning(can, compute, said, place, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    assert tiny.main(*tiny.flags(place, "--no-dense", dtype="bfloat16", compute=compute, results=tmp_path)) == 0
    [record] = tiny.records(tmp_path).values()
    assert any("slower in torch.bfloat16" in w for w in record["warnings"]) == said
