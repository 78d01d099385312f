"""scripts/bench/integers.py and its table: a row is measured once, the page says what the rows say, a rotated
model computes the same."""

import json

import integers
import integers_table
import pytest
import rotation
import torch
from tiny import plain_pages  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

DEMO = {"demo": ["--model", "demo", "--evaluate", "builtin:prose", "--seqlen", "32", "--nsamples", "4"]}
EVERY = integers_table.WAYS


def row(way, excess, stored, seed=0):
    return {"model": "demo", "seed": seed, "way": way, "flags": EVERY[way], "excess": excess, "metric": "text/ppl",
            "window": 64, "dense_ppl": 10.0, "stored": stored, "bits": stored / 100, "seconds": 2.0,
            "rounded_to_zero": 3, "environment": {"device": "cpu", "threads": 1, "torch": "2", "commit": "abc",
                                                  "dirty": False, "date": "today"}}


def test_the_page_says_what_the_rows_say(tmp_path):
    rows = [row(integers_table.NEAREST, 0.4, 325), row(integers_table.NEAREST, 0.6, 325, seed=1),
            row("int3 by GPTQ", 0.3, 326), row("int8 by GPTQ", 0.01, 800)]
    (tmp_path / "integers.json").write_text(json.dumps({"rows": rows}))
    assert integers_table.main(["--out", str(tmp_path)]) == 0 and (tmp_path / "integers.svg").is_file()
    assert "At 3.25 bits the least is lost by **int3 by GPTQ**, 0.3000 nats" in (tmp_path / "integers.md").read_text()
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in (tmp_path / "integers.md").read_text().splitlines() if line.startswith("| ")}
    assert lines["int3 by GPTQ"][2:4] == ["0.3000", "40 %"] and lines["int8 by GPTQ"][3] == "-"
    assert lines[integers_table.NEAREST][2:4] == ["0.5000 ± 0.1414", "-"]
    assert list(lines)[2] == "int8 by GPTQ"  # most bits first, behind the head


def test_speeds_and_tasks_stand_beside_the_rows(tmp_path):
    rows = [row("dense", 0, 1600), row("int4 by GPTQ", 0.1, 425), row("int3 by GPTQ", 0.3, 326)]
    rows[1]["tasks"] = {"foundry_piqa/acc": {"value": 0.5, "stderr": 0.05, "samples": 100, "chance": 0.5}}
    speed = {"model": "demo", "threads": 1, "way": "dense int4", "tokens_per_second": 123.4,
             "environment": {"commit": "fed", "device": "cpu"}}
    (tmp_path / "integers.json").write_text(json.dumps({"rows": rows}))
    other = speed | {"threads": 2, "tokens_per_second": 9}
    (tmp_path / "cpu_decode.json").write_text(json.dumps({"rows": [speed, other]}))
    assert integers_table.main(["--out", str(tmp_path), "--check"]) == 1
    assert integers_table.main(["--out", str(tmp_path)]) == 0
    assert integers_table.main(["--out", str(tmp_path), "--check"]) == 0
    text = (tmp_path / "integers.md").read_text()
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in text.splitlines() if line.startswith("| ")}
    assert lines["int4 by GPTQ"][-2:] == ["123", "0.500 ± 0.050"] and lines["int3 by GPTQ"][-2:] == ["-", "-"]
    assert "commit fed" in text and "piqa 100 documents, chance 0.50" in text


def test_the_page_here_is_not_stale():
    assert integers_table.main(["--check"]) == 0, "run scripts/tables/integers_table.py"


def test_a_rotated_model_computes_the_same_with_other_weights():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=6, vocab_size=50, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).double().eval()
    for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    ids = torch.randint(50, (3, 9))
    before = {name: value.clone() for name, value in model.state_dict().items() if "proj" in name}
    with torch.no_grad():
        logits = model(ids).logits
        rotation.rotate(model)
        assert torch.allclose(model(ids).logits, logits, rtol=1e-4, atol=1e-6)  # its norms compute in float32
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "proj" in name)


def test_only_models_of_llamas_form_are_rotated():
    with pytest.raises(ValueError, match="Llama's form"):
        rotation.rotate(LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                     num_attention_heads=2, vocab_size=9, attention_bias=True)))


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


@pytest.mark.parametrize("argv", [["--only", "nope"], ["--ways", "nope"], ["--healed", "nope"]])
def test_bad_input_is_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integers, "flags_of", lambda shared: DEMO)
    ways = ["--ways", "2:4 by ALPS, healed on text", "--eval-windows", "2", "--seeds", "0"]
    assert integers.main(["--only", "demo", *ways, *argv, "--out", str(tmp_path)]) == 2
    assert f"error: {argv[0]} nope: " in capsys.readouterr().err
