"""`oneshot.prune` in Python: token ids, models as others leave them, what is refused."""

import families
import pytest
import torch
from tiny import place, plain_pages  # noqa: F401

import oneshot
from oneshot import data, models
from oneshot.pipeline import compress
from oneshot.prune.patterns import parse


def test_python_takes_token_ids_and_solver_settings(place):  # noqa: F811
    model, _ = oneshot.load(str(place / "model"))
    ids = torch.randint(3, 20, (4, 16), generator=torch.Generator().manual_seed(0))
    record = oneshot.prune(model, method="sparsegpt", pattern=0.25, calibration=ids, progress=False,
                           parts={"sparsegpt.damping": 0.5})
    assert record["settings"]["solver"]["sparsegpt"]["damping"] == 0.5
    assert record["data"]["calibration"]["sha256"] == data.given(ids).sha256
    assert record["sparsity"] == 0.25


def test_python_on_a_model_that_asks_for_gradients_and_drops_out():
    """As `from_pretrained` and a training loop leave it; models.load gives neither."""
    frozen, model = families.tiny("gpt2"), families.tiny("gpt2")
    model.train().requires_grad_(True)
    model.transformer.drop.eval()
    modes, ids = [m.training for m in model.modules()], torch.randint(3, 20, (12, 16))
    for one in (frozen, model):
        oneshot.prune(one, method="wanda", pattern="2:4", calibration=ids, heal="block,distil", progress=False,
                      batch_size=4, parts={"block.steps": 2, "distil.steps": 2})
    assert all(torch.equal(p, q) for p, q in zip(frozen.parameters(), model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_python_knows_the_demo_model():
    model, tokenizer = oneshot.load("demo")
    record = oneshot.prune(model, tokenizer, method="magnitude", pattern="2:4", progress=False, layer_errors=False,
                           nsamples=1, seqlen=16)
    assert record["model"]["name"] == "demo" == record["settings"]["model"]
    assert not [w for w in record["warnings"] if "suits the demo model" in w]


@pytest.mark.parametrize(("words", "settings"), [
    ("--effort 5: goes with --method best", {"effort": 5}),
    ("nsample", {"nsample": 3}), ("save", {"save": "out"}), ("tokenizer", {}), ("--pattern", {"pattern": "2:5"}),
    ("wanda.dampin", {"parts": {"wanda.dampin": 1}}), ("--method", {"method": "wander"}),
    ("tokenizer: x is a name", {"tokenizer": "x"}), ("3: no such setting of a part", {"parts": {3: 1}}),
    ("64 positions", {"calibration": torch.ones(1, 65, dtype=torch.long)}),
    ("integers", {"calibration": torch.ones(1, 8)})], ids=lambda x: x if isinstance(x, str) else "")
def test_python_refuses_what_the_command_line_refuses(place, words, settings):  # noqa: F811
    model, _ = oneshot.load(str(place / "model"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if words not in ("tokenizer", "64 positions", "integers"):
        settings = {"calibration": torch.ones(1, 8, dtype=torch.long)} | settings
    with pytest.raises(ValueError, match=words):
        oneshot.prune(model, **{"method": "wanda", "pattern": "2:4", "progress": False} | settings)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", [None, 5, b"demo", ["demo"]])
def test_python_loads_folders_files_and_names(name):
    with pytest.raises(ValueError, match="give a folder, a file or a name"):
        oneshot.load(name)


def test_python_refuses_what_is_no_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=32))
    for model, words in ((t5, "is an encoder-decoder model"), (torch.nn.Linear(4, 4), "Linear, no transformers model"),
                         ("demo", "str, no transformers model")):
        with pytest.raises(ValueError, match=f"^--model: .*{words}"):
            oneshot.prune(model, calibration=torch.ones(1, 8, dtype=torch.long), progress=False)


def test_zeros_are_counted_on_what_is_there_after_all_healing():
    model = families.tiny("llama")
    record = oneshot.prune(model, calibration=torch.randint(3, families.VOCAB, (8, families.T)), method="wanda",
                           progress=False, batch_size=4)
    row, weight = record["layers"][0], next(models.all_weights(model))
    W = weight.get()
    W[tuple(W.nonzero()[0])] = 0  # what training or rounding may do
    weight.set(W)
    plan = {row["name"]: parse("2:4")}
    compress.prove_patterns(model, plan, record["layers"])
    assert weight.name == row["name"] and row["zeros"] == row["target_zeros"] + 1 and row["surplus"] == 1


def test_python_refuses_an_adapter():
    """A PeftModel, and a model that transformers' own `add_adapter` was called on, say so by their `peft_config`."""
    model = families.tiny("llama")
    model.peft_config = {"default": {}}
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="PeftModel; merge the adapter first"):
        oneshot.prune(model, method="magnitude", calibration=torch.randint(3, 20, (4, 16)), progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
