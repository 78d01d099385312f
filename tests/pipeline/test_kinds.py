"""What goes in, what comes out: every kind of checkpoint is pruned into one that anybody loads, or refused in one line.

Also writes the table in the README: `ONESHOT_WRITE=1 python -m pytest tests/pipeline/test_kinds.py`.
"""

import json
import os
import re
import shutil
from pathlib import Path

import families
import gguf_files
import pytest
import tiny
import torch
from kinds import (
    adapter,
    built,
    config,
    encoder_decoder,
    fp8,
    mtp,
    multimodal,
    mxfp4,
    pickles,
    remote_code,
    saved,
    tensors,
)
from safetensors.torch import load_file
from tiny import plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM

import oneshot
from oneshot import models
from oneshot.checkpoint import verify
from oneshot.runtime.files import write_text

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- kinds: written by tests/pipeline/test_kinds.py -->", "<!-- kinds: end -->"


def claimed(method):
    """A checkpoint whose config says it is quantised."""
    return lambda folder: config(saved(folder, "llama"), quantization_config={"quant_method": method, "bits": 4})


def gguf(folder):
    pytest.importorskip("gguf")
    folder.mkdir()
    return gguf_files.write(folder / "model.gguf")


MAMBA2 = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8,
          "n_groups": 1, "chunk_size": 16, "pad_token_id": 0}
JETMOE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8,
          "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
          "pad_token_id": 0}
KINDS = {  # kind: (makes the folder, further flags, the dtypes that come out or words of the refusal)
    "bf16": (lambda f: saved(f, "llama", torch.bfloat16), (), {"BF16"}),
    "fp16": (lambda f: saved(f, "llama", torch.float16), (), {"F16"}),
    "sharded": (lambda f: saved(f, "llama", max_shard_size="10KB"), (), {"F32"}),
    "tied embeddings": (lambda f: saved(f, "llama-tied-bias"), (), {"F32"}),
    "Conv1D (GPT-2)": (lambda f: saved(f, "gpt2"), (), {"F32"}),
    "block FP8": (fp8, (), {"BF16"}),
    "MXFP4 (GPT-OSS)": (mxfp4, (), {"BF16"}),
    "GPTQ": (claimed("gptq"), (), "quantised (gptq)"),
    "AWQ": (claimed("awq"), (), "quantised (awq)"),
    "bitsandbytes": (claimed("bitsandbytes"), (), "quantised (bitsandbytes)"),
    "GGUF": (gguf, (), {"BF16"}),
    "LoRA adapter": (adapter, (), "merge the adapter first"),
    "pickles": (pickles, (), "save it as safetensors first"),
    "multimodal, loaded in part": (multimodal, (), "would be lost"),
    "encoder-decoder": (encoder_decoder, (), "is an encoder-decoder model"),
    "layers beyond the config (MTP)": (mtp, (), {"F32"}),
    "remote code": (remote_code, ("--trust-remote-code",), {"F32"}),
    "MoE, experts fused on disk (GPT-OSS)": (lambda f: saved(f, "gpt_oss"), (), {"F32"}),
    "MoE, experts apart on disk (Mixtral)": (lambda f: saved(f, "mixtral"), (), {"F32"}),
    "MoE, all tokens to all experts (Llama-4)": (lambda f: saved(f, "llama4"), (), {"F32"}),
    "MoE of a kind unknown (JetMoE)": (lambda f: built(f, "jetmoe", JETMOE), (), "cannot be seen one by one"),
    "hybrid (Jamba)": (lambda f: saved(f, "jamba"), (), {"F32"}),
    "blocks that share weights (Zamba2)": (lambda f: built(f, "zamba2", families.ZAMBA2), (), {"F32"}),
    "state space (Mamba2)": (lambda f: built(f, "mamba2", MAMBA2), (), {"F32"}),
}
NOT_ON_DISK = {"block FP8": "stored by fp8", "MXFP4 (GPT-OSS)": "stored by mxfp4", "GGUF": "is a GGUF file",
               "remote code": "brings code of its own", "blocks that share weights (Zamba2)": "share weights"}
FOUND = {}  # kind: what came out, for the README


def dtypes_of(folder):
    from oneshot.models.intake import headers

    return headers(sorted(folder.glob("*.safetensors")), str(folder))


def check_on_disk(kind, argv, out, capsys):
    """With `--offload disk` the same comes out, tensor by tensor, or the same refusal, or one of its own."""
    outcome, other = KINDS[kind][2], out.with_name("from-disk")
    code = tiny.main(*(other if part is out else part for part in argv), "--offload", "disk")
    err = capsys.readouterr().err
    refused = NOT_ON_DISK.get(kind) or (outcome if isinstance(outcome, str) else None)
    if refused:
        assert code == 2 and refused in err.splitlines()[-1] and not other.exists()
        return
    assert code == 0, err
    want, found = tiny.weights(out), tiny.weights(other)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in want.items())
    assert verify.main([str(other), "--quiet", "--offload", "disk"]) == 0


@pytest.mark.usefixtures("plain_pages")
@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind, tmp_path, capsys):
    make, more, outcome = KINDS[kind]
    text = tiny.save_text(tmp_path / "text.txt", 1)
    model, out = make(tmp_path / "in"), tmp_path / "out"
    argv = ["--model", model, "--method", "wanda", "--pattern", "2:4", "--calibration", text, "--evaluate", "none",
            "--nsamples", 8, "--seqlen", 16, "--no-dense", "--no-progress", "--results", tmp_path / "runs",
            "--save", out]
    code, err = tiny.main(*argv, *more), capsys.readouterr().err
    check_on_disk(kind, [*argv, *more], out, capsys)
    if isinstance(outcome, str):
        assert code == 2 and outcome in err and not out.exists()
        assert err.splitlines()[-1].startswith("error: --model")
        FOUND[kind] = "refused: " + re.sub(r"^error: --model( \S+)?: ", "", err.splitlines()[-1])
        return
    assert code == 0, err
    record = json.loads((out / "oneshot.json").read_text())["record"]
    inside, entries = dtypes_of(model) if model.is_dir() else {}, dtypes_of(out)
    weights = {n: e for n, e in entries.items() if len(e.shape) > 1}
    assert {e.dtype for e in weights.values()} == outcome
    assert verify.main([str(out), "--quiet", *more]) == 0
    left = [w for w in record["warnings"] if "not in what is saved" in w]
    lost = {n for n in inside if n not in entries and not n.endswith(("_scale_inv", "_blocks", "_scales"))}
    assert bool(left) == bool(lost), (lost, left)
    again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=bool(more), dtype="auto")
    assert sum(int((p == 0).sum()) for p in again.parameters()) >= record["sparsity"] * record["model"]["prunable"]
    more = "; what the class does not take is a warning" * bool(left)
    FOUND[kind] = f"{', '.join(sorted(outcome))}, all proved{more}"


def test_an_offloaded_model_is_refused(tmp_path):
    model = families.tiny("llama")
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"offloaded .* load the model without offload"):
        oneshot.prune(model, method="magnitude", calibration=torch.zeros(2, 8, dtype=torch.long), progress=False)
    FOUND["offloaded by accelerate (Python)"] = "refused: load the model without offload"


def test_the_readme_says_so():
    if set(FOUND) != {*KINDS, "offloaded by accelerate (Python)"}:
        pytest.skip("only some of the kinds ran")
    from oneshot.report import table

    head = ["what goes in", "what comes out"]
    body = table.render(head, [[kind, text] for kind, text in FOUND.items()], "markdown", text=head)
    section, text = f"{START}\n{body}{END}", README.read_text(encoding="utf-8")
    assert START in text, "the README has no table of kinds"
    now = text[: text.index(START)] + section + text[text.index(END) + len(END):]
    if os.environ.get("ONESHOT_WRITE"):
        write_text(now, README)
    assert now == text or os.environ.get("ONESHOT_WRITE"), "stale: ONESHOT_WRITE=1 python -m pytest " + __file__


def test_gguf_is_the_same_model(tmp_path):
    pytest.importorskip("gguf")
    model, tokenizer = oneshot.load(gguf_files.write(tmp_path / "model.gguf"))
    want = families.tiny("llama").to(torch.bfloat16)
    for name, p in model.state_dict().items():
        if "q_proj" not in name and "k_proj" not in name:
            assert torch.equal(p, want.state_dict()[name]), name
    assert tokenizer("abc")["input_ids"][-3:] == [3, 4, 5] and models.source_of(model).quantised == "GGUF F32"


@pytest.mark.parametrize("content, words", [(b"GGUF", "cannot be loaded"), (b"", "cannot be loaded")])
def test_damaged_gguf(content, words, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=f"^--model .*model.gguf: {words}"):
        oneshot.load(tmp_path / "model.gguf")


def test_python_on_a_model_that_transformers_dequantised(tmp_path):
    """What the user's own `save_pretrained` writes then is what was pruned."""
    model = AutoModelForCausalLM.from_pretrained(fp8(tmp_path / "in"), dtype="auto")
    record = oneshot.prune(model, method="magnitude", pattern="2:4", calibration=torch.zeros(2, 8, dtype=torch.long),
                           progress=False)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert record["sparsity"] >= 0.5 and "quantization_config" not in json.loads(
        (tmp_path / "out" / "config.json").read_text())
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_side_files_are_copied(tmp_path):
    model = saved(tmp_path / "in", "llama")
    for name in ("preprocessor_config.json", "LICENSE", "tokenizer.model", "my_notes.txt"):
        (model / name).write_text("{}")
    text, out = tiny.save_text(tmp_path / "text.txt", 1), tmp_path / "out"
    assert tiny.main("--model", model, "--method", "magnitude", "--pattern", "2:4", "--calibration", text, "--evaluate",
                     "none", "--no-dense", "--no-progress", "--results", tmp_path / "runs", "--save", out) == 0
    names = {f.name for f in out.iterdir()}
    assert {"preprocessor_config.json", "LICENSE", "tokenizer.model"} <= names and "my_notes.txt" not in names


def test_what_is_saved_is_compared_with_the_model(tmp_path, monkeypatch, capsys):
    """A library that drops or renames a tensor while saving is noticed before the folder counts as finished."""
    from transformers import LlamaForCausalLM

    model, out, real = saved(tmp_path / "in", "llama"), tmp_path / "out", LlamaForCausalLM.save_pretrained

    def losing(self, folder, *args, **kwargs):
        real(self, folder, *args, **kwargs)
        tensors(Path(folder), lambda found: found.pop("model.norm.weight"))
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", losing)
    with pytest.raises(RuntimeError, match=r"1 tensors are missing, such as \['model.norm.weight'\]"):
        tiny.main("--model", model, "--method", "magnitude", "--pattern", "2:4", "--evaluate", "none", "--no-dense",
                  "--calibration", tiny.save_text(tmp_path / "text.txt", 1), "--no-progress", "--results",
                  tmp_path / "runs", "--save", out)
    assert not (out / "oneshot.json").exists()


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../outside.safetensors", "/etc/x.safetensors",
                                   ".hidden.safetensors", "sub/model.safetensors"])
def test_an_index_names_safetensors_inside_the_folder_only(shard, tmp_path):
    folder = saved(tmp_path / "in", "llama")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"its index names {re.escape(shard)}"):
        oneshot.load(folder)


@pytest.mark.parametrize("changes, words", [
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ({"quantization_config": {"quant_method": "mine"}}, r"quantised \(mine\)"),
    ({"quantization_config": {"bits": 4}}, "unnamed method"), ({"rms_norm_eps": None}, "cannot be loaded"),
    ({"hidden_size": 64.5}, "cannot be loaded"), ({"model_type": ["llama"]}, "cannot be loaded"),
    ({"vocab_size": 70}, r"is \(64, 32\) in its files, \(70, 32\) by its config")])
def test_configs_that_cannot_be_trusted(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        oneshot.load(config(saved(tmp_path / "in", "llama"), **changes))


def test_integers_where_floats_are_due_are_refused(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = tensors(saved(tmp_path / "in", "llama"), lambda t: t.update({name: (t[name] * 10).to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{name} is stored as I8"):
        oneshot.load(folder)


def test_missing_tokenizer_and_missing_shard_say_so(tmp_path):
    folder = saved(tmp_path / "in", "llama", max_shard_size="10KB")
    shutil.copytree(folder, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="no tokenizer in this folder"):
        oneshot.load(tmp_path / "bare")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002\S+ is missing"):
        oneshot.load(folder)
