"""Benchmarks of whole models on a CPU: rows, pages, what is refused, llama.cpp beside them."""

import importlib.util
import json

import common
import cpu_decode
import cpu_forms
import cpu_kernels
import cpu_prompt
import cpu_quality
import cpu_table
import families
import gguf_files
import llama_server
import pytest
import torch
from variants import needs_compiler

import oneshot
from oneshot import models
from oneshot.checkpoint import gguf
from oneshot.prune import patterns


def test_threads_that_sleep_are_not_timed(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert common.thread_counts("1", toy=False) == [1]
    assert common.thread_counts("2,1,2", toy=True) == [1, 2]
    with pytest.raises(ValueError, match="OMP_WAIT_POLICY=passive"):
        common.thread_counts("1,2", toy=False)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert common.thread_counts("1,2", toy=False) == [1, 2]


@pytest.mark.parametrize("script", [cpu_kernels, cpu_decode, cpu_prompt])
def test_a_bench_of_the_cpu_refuses_threads_that_sleep(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert script.main(["--threads", "1,2", "--out", str(tmp_path)]) == 2
    assert "OMP_WAIT_POLICY=passive" in capsys.readouterr().err and not list(tmp_path.iterdir())


@needs_compiler
def test_cpu_decode(tmp_path, monkeypatch, capsys):
    threads, ways = torch.get_num_threads(), "dense bf16;2:4 bf16;dense int8;2:4 int8;2:4 int4;cut int8"
    monkeypatch.setitem(cpu_forms.SHAPES["toy"], "vocab_size", families.tiny("llama").config.vocab_size)
    monkeypatch.setattr(cpu_decode, "READ", 1 << 20)
    for part in (families.tiny("llama"), oneshot.load("demo")[1]):
        part.save_pretrained(tmp_path / "cut")
    small = ["--toy", "--threads", "1", "--out", str(tmp_path), "--cut", str(tmp_path / "cut"), "--ways"]
    assert cpu_decode.main([*small, ways]) == 0, capsys.readouterr().err
    assert torch.get_num_threads() == threads
    rows = {row["way"]: row for row in json.loads((tmp_path / "cpu_decode.json").read_text())["rows"]}
    assert list(rows) == ["transformers", *ways.split(";"), *(f"{way}, alone" for way in ways.split(";"))]
    assert all(row["tokens_per_second"] > 0 and row["bytes"] > 0 for row in rows.values())
    assert rows["2:4 bf16"]["bytes"] < rows["dense bf16"]["bytes"] == rows["transformers"]["bytes"]
    assert rows["2:4 int8"]["bytes"] < rows["dense int8"]["bytes"] < rows["dense bf16"]["bytes"]
    assert rows["2:4 int4"]["bytes"] < rows["2:4 int8"]["bytes"] and rows["transformers"]["same"] == 8
    assert all((row["gap"] is None) == (row["same"] in (8, None)) for row in rows.values())
    assert all((row["gap"] or 0.0) < 0.02 for row in rows.values())  # random weights: within rounding in bfloat16
    assert cpu_table.main(["--check", "--out", str(tmp_path)]) == 1
    assert cpu_table.main(["--out", str(tmp_path)]) == 0 == cpu_table.main(["--check", "--out", str(tmp_path)])
    text = (tmp_path / "cpu_decode.md").read_text()
    assert all(f"| {way} " in text for way in rows) and "1 thread\n" in text
    assert cpu_decode.main([*small, "2:5"]) == 2


def test_a_form_is_compared_with_its_own_weights_stored_dense():
    model = cpu_forms.random_model("toy")
    with torch.no_grad():
        for weight in models.all_weights(model):
            weight.set(weight.get() * patterns.NM(2, 4).keep(weight.get().abs()))
    made = cpu_forms.formed(model, "int4", "2:4", rounds=True)
    dense, [name, *_] = cpu_forms.unpacked(made, model), [w.name.removesuffix(".weight") for w in
                                                           models.all_weights(model)]
    assert {type(m) for m in dense.modules()} == {type(m) for m in model.modules()}
    before, after = model.get_submodule(name).weight, dense.get_submodule(name).weight
    want = cpu_kernels.codes.value(*cpu_kernels.codes.round_groups(before)).bfloat16()
    assert torch.equal(after, want) and not torch.equal(after, before)
    assert not torch.equal(dense.lm_head.weight, model.lm_head.weight)
    assert dense.model.norm.weight is model.model.norm.weight  # what is not rounded is not copied
    assert torch.equal(cpu_forms.unpacked(cpu_forms.formed(model, "bf16", "2:4", False), model).lm_head.weight,
                       model.lm_head.weight)


def test_where_texts_part_the_logits_say_how_near_it_was():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.5], [0.0, 0.0, 1.0]])
    told = cpu_decode.Told([2, 0, 2], logits)
    assert cpu_decode.parted([2, 0, 2], told) == (3, None) and cpu_decode.parted([2], told) == (1, None)
    assert cpu_decode.parted([2, 2, 2], told) == (1, 0.5) and cpu_decode.parted([0, 0, 2], told) == (0, 2.0)


def test_the_prompt_is_text_where_there_is_a_tokenizer():
    model, tokenizer = oneshot.load("demo")
    ids = cpu_decode.prompt(model, tokenizer)
    assert ids.shape == (1, cpu_decode.PROMPT)
    assert cpu_decode.TEXT.startswith(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    assert cpu_decode.prompt(model, None).shape == (1, cpu_decode.PROMPT)


@needs_compiler
def test_cpu_prompt(tmp_path, capsys):
    made = cpu_prompt.make("toy")
    ids = torch.arange(7)[None]
    truth, error = made["transformers f32"](ids).logits.double(), {}
    assert len(made) == len(cpu_prompt.WAYS) + 4 and not made["2:4 int8"].model.layers[0].mlp.down_proj.round_inputs
    for way, model in made.items():
        error[way] = float((model(ids).logits.double() - truth).norm() / truth.norm())
    assert error["2:4 f32"] < 1e-5 and error["2:4 bf16"] < 2 * error["transformers bf16"] < 0.05
    assert abs(error["2:4 int8"] - error["dense int8"]) < 0.01 and error["2:4 int4"] < 0.3
    assert error["2:4 int8"] < error["2:4 int8, rounded"] < 0.1
    (tmp_path / "cpu_decode.json").write_text(json.dumps({"rows": [decode_row("transformers", 10.0)]}))
    assert cpu_table.main(["--out", str(tmp_path)]) == 0 and "Prompts" not in (tmp_path / "cpu_decode.md").read_text()
    assert cpu_prompt.main(["--toy", "--threads", "1", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "cpu_prompt.json").read_text())["rows"]
    assert [row["way"] for row in rows] == list(made)
    assert all(row["tokens_per_second"] > 0 and row["tokens"] == 80 and row["threads"] == 1 for row in rows)
    assert cpu_table.main(["--out", str(tmp_path)]) == 0
    text = (tmp_path / "cpu_decode.md").read_text()
    assert "## Prompts" in text and "toy, 1 thread" in text and "(1.00x)" in text


def decode_row(way, rate, **more):
    where = {"commit": "abc", "dirty": False, "device": "cpu", "torch": "2", "date": "today"}
    return {"model": "toy", "threads": 1, "way": way, "tokens_per_second": rate, "spread": [rate, rate], "bytes": 10**6,
            "limit": 1.0, "same": None, "gap": None, "tokens": 8, "read": 1e9, "load": 0.0, "variant": "avx2",
            "environment": where, **more}


def test_the_page_of_decoding_says_how_much_of_the_lean_loop_generate_reaches(tmp_path):
    old = decode_row("dense int8", 15.0, same=2)  # from before texts were compared with their own weights'
    del old["gap"]
    rows = [decode_row("transformers", 10.0, same=8), decode_row("dense bf16", 20.0, same=8), old,
            decode_row("2:4 bf16", 30.0, same=3, gap=0.0625), decode_row("dense bf16, alone", 25.0),
            decode_row("2:4 bf16, alone", 50.0)]
    (tmp_path / "cpu_decode.json").write_text(json.dumps({"rows": rows}))
    assert cpu_table.main(["--out", str(tmp_path)]) == 0
    text = (tmp_path / "cpu_decode.md").read_text()
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in text.splitlines() if line.startswith("| ")}
    assert "generate reaches 60% to 80% of" in text
    assert lines["2:4 bf16"][3:5] == ["1.50x", "60%"] and lines["2:4 bf16"][-2:] == ["3 of 8", "0.062"]
    assert lines["dense int8"][-2:] == ["-", "-"] and lines["dense bf16"][-2:] == ["8 of 8", "-"]


def test_the_page_of_decoding_here_is_not_stale(tmp_path, capsys):
    assert cpu_table.main(["--check"]) == 0, "run python scripts/tables/cpu_table.py"
    assert cpu_table.main(["--out", str(tmp_path)]) == 2 and "cpu_decode.py" in capsys.readouterr().err


def test_a_file_of_llama_cpp_says_whose_it_is(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(b"1")
    a, b = (tmp_path / name / "m.gguf" for name in "ab")
    found = llama_server.ways_of(f"{a},two={a},cut={b},{b}", ("one", "two", "cut"))
    assert found == {("one", "llama.cpp a/m.gguf"): a, ("two", "llama.cpp a/m.gguf"): a,
                     ("cut", "llama.cpp cut b/m.gguf"): b, ("one", "llama.cpp b/m.gguf"): b}
    assert llama_server.ways_of("", ("one",)) == {}
    for bad in (f"{a},{a}", "three=x.gguf"):
        with pytest.raises(ValueError, match=r"^--gguf "):
            llama_server.ways_of(bad, ("one", "two"))


def test_cpu_decode_beside_llama_cpp(tmp_path, monkeypatch, capsys):
    """Files of the first model, of another one and of the cut one; what they say is compared with the files' own
    weights."""
    pytest.importorskip("xllamacpp")
    file = gguf_files.write(tmp_path / "tiny.gguf")
    monkeypatch.setitem(cpu_forms.SHAPES["toy"], "vocab_size", families.tiny("llama").config.vocab_size)
    monkeypatch.setattr(cpu_decode, "READ", 1 << 20)
    for part in (families.tiny("llama"), oneshot.load("demo")[1]):
        part.save_pretrained(tmp_path / "cut")
    given = ["--toy", "--threads", "1", "--ways", "dense bf16;cut bf16", "--cut", str(tmp_path / "cut"),
             "--gguf", f"toy={file},cut={file}", "--out", str(tmp_path)]
    if cpu_decode.main(given) and "hung" in (said := capsys.readouterr().err):
        pytest.skip(said)
    rows = json.loads((tmp_path / "cpu_decode.json").read_text())["rows"]
    names = [f"llama.cpp {cut}{tmp_path.name}/tiny.gguf" for cut in ("", "cut ")]
    assert [row["way"] for row in rows if row["way"].startswith("llama.cpp")] == names
    for row in (row for row in rows if row["way"] in names):
        assert row["tokens_per_second"] > 0 and row["bytes"] == file.stat().st_size and (row["gap"] or 0.0) < 0.02
    assert cpu_decode.main([*given, "--gguf", "nowhere.gguf"]) == 2 and "--gguf nowhere.gguf" in capsys.readouterr().err


@needs_compiler
def test_cpu_quality(tmp_path, monkeypatch, capsys):
    tokenizer = oneshot.load("demo")[1]
    monkeypatch.setitem(families.FAMILIES["llama"][1], "vocab_size", len(tokenizer))
    monkeypatch.setitem(cpu_forms.SHAPES["toy"], "vocab_size", len(tokenizer))
    model, pruned, files = families.tiny("llama"), families.tiny("llama"), []
    with torch.no_grad():
        for weight in models.all_weights(pruned):
            weight.set(weight.get() * patterns.NM(2, 4).keep(weight.get().abs()))
    for part in (pruned, tokenizer):
        part.save_pretrained(tmp_path / "pruned")
    if importlib.util.find_spec("xllamacpp"):
        gguf.write(tmp_path, model, tokenizer, "gguf", {"tensors": {}}, {})
        files = [str(tmp_path / gguf.FILE)]
    monkeypatch.setattr(cpu_quality, "random_model", lambda name: model)
    (tmp_path / "cpu_decode.json").write_text(json.dumps({"rows": [
        {"model": "toy", "threads": 1, "way": way, "tokens_per_second": rate}
        for way, rate in (("transformers", 1.0), ("2:4 bf16", 2.0), ("cut int8", 3.0))]}))
    given = ["--toy", "--pruned", str(tmp_path / "pruned"), "--cut", str(tmp_path / "pruned"),
             "--gguf", ",".join(files), "--out", str(tmp_path)]
    if cpu_quality.main(given) and "hung" in (said := capsys.readouterr().err):
        pytest.skip(said)
    rows = {row["way"]: row for row in json.loads((tmp_path / "cpu_quality.json").read_text())["rows"]}
    assert {"2:4 bf16", "cut bf16", "2:4 int4, rounded"} <= set(rows) and len(rows) == 15 + len(files)
    assert rows["cut bf16"]["ppl"] == pytest.approx(rows["2:4 bf16"]["ppl"], rel=1e-3)
    assert rows["cut int8"]["bytes"] > rows["2:4 int8"]["bytes"] and rows["cut int8"]["tokens_per_second"] == 3.0
    assert "cut" in (tmp_path / "cpu_quality.svg").read_text()
    truth = rows["transformers"]["ppl"]
    assert rows["dense int8"]["ppl"] == pytest.approx(truth, rel=1e-2) != rows["2:4 bf16"]["ppl"]
    assert all(rows[f"llama.cpp {tmp_path.name}/{gguf.FILE}"]["ppl"] == pytest.approx(truth, rel=1e-4) for _ in files)
    text = (tmp_path / "cpu_quality.md").read_text()
    assert all(f"| {way} " in text for way in rows)
    assert cpu_quality.main(["--page", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "cpu_quality.md").read_text() == text
    assert cpu_quality.main(["--page", "--out", str(tmp_path / "none")]) == 2
