"""`--format gguf`: the file holds the model bit for bit, llama.cpp computes from it what transformers computes."""

import json

import families
import numpy as np
import pytest
import tiny
import torch
from llama_cpp import LlamaCpp
from tiny import plain_pages  # noqa: F401

import oneshot
from oneshot import checkpoint, models
from oneshot.checkpoint import contents, gguf, rounded, verify
from oneshot.checkpoint.gguf import blocks, family, file
from oneshot.quantise import grids
from oneshot.runtime import sealed

pytest.importorskip("gguf", reason="pip install 'oneshot[gguf]'")
SIZE = 2051  # three more than the tokenizer has, so that the vocabulary is padded
GEMMA = {**families.HEAD, "query_pre_attn_scalar": 8, "sliding_window": families.WINDOW}
SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
FAMILIES = {  # as in families.py
    "llama": ("llama", {}),
    "llama-tied-bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": SCALED}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": ("mistral", {"sliding_window": families.WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {**GEMMA, **families.SLIDING}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return oneshot.load("demo")[1]


def random_model(name, **more):
    with pytest.MonkeyPatch.context() as patch:
        kind, changes = FAMILIES[name.partition("+")[0]]
        patch.setitem(families.FAMILIES, name, (kind, {**changes, "vocab_size": SIZE, **more}))
        return families.tiny(name)


def written(folder, model, tokenizer, form="gguf"):
    """The manifest's entries for the model's file in a folder."""
    gguf.check_model(form, model, tokenizer)
    data = {"tensors": {}}
    data |= gguf.write(folder, model, tokenizer, form, data, {})
    assert not gguf.faults(folder, data, model, {})
    return data


def as_ggml_does(model):
    """Let the model compute GELU as ggml does: a table of float16."""
    for m in model.modules():
        if type(m).__name__ == "GELUTanh":
            m.forward = lambda x: torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return model


def differences(model, file, lengths):
    """The largest |log p - log p of llama.cpp| over the vocabulary, after prompts of these lengths."""
    engine = LlamaCpp(file)
    ids = torch.randint(3, SIZE, (max(lengths),), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return max(float((engine.log_probabilities(ids[:n], SIZE) - want[n - 1]).abs().max()) for n in lengths)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(name, tokenizer, tmp_path):
    """To float32's rounding, of the whole distribution, beyond the sliding window where there is one."""
    model = random_model(name)
    said = written(tmp_path, model, tokenizer)["warnings"]
    reach = family.context_of(model.config, family.family_of(model))
    assert any(f"ends at {reach} tokens" in line for line in said) == (reach < model.config.max_position_embeddings)
    steps = 1e-3 if "gemma" in name else 1e-4  # where GELU is a table, float32's rounding can pick its next entry
    assert differences(as_ggml_does(model), tmp_path / gguf.FILE, [n for n in (1, 5, 7, 24) if n < reach]) < steps


@pytest.mark.parametrize("part", ["interleave", "is_shifted", "extra"])
def test_it_would_show(part, tokenizer, tmp_path, monkeypatch):
    """What each peculiarity is there for: without it the model is another one."""
    model = random_model({"interleave": "llama", "is_shifted": "gemma2", "extra": "llama-llama3"}[part])
    without = {"interleave": lambda rows, heads: rows, "is_shifted": lambda *args: False, "extra": lambda *args: {}}
    with monkeypatch.context() as patch:
        patch.setattr(family, part, without[part])
        data = {"tensors": {}}
        data |= gguf.write(tmp_path, model, tokenizer, "gguf", data, {})
    assert gguf.faults(tmp_path, data, model, {})
    assert differences(as_ggml_does(model), tmp_path / gguf.FILE, [24]) > 1e-2


@pytest.mark.parametrize("name, dtype", [("llama", "float32"), ("llama", "bfloat16"), ("llama-llama3", "float16"),
                                         ("qwen2", "bfloat16"), ("gemma2", "float32"), ("gemma3", "bfloat16")])
def test_reads_back(name, dtype, tokenizer, tmp_path):
    """Through `--model FILE`, the same weights, Gemma's norms but for the rounding of 1 + w."""
    model = random_model(name).to(getattr(torch, dtype))
    written(tmp_path, model, tokenizer)
    again, words = oneshot.load(tmp_path / gguf.FILE, dtype=dtype)
    there = again.state_dict()
    for key, t in model.state_dict().items():
        if family.is_shifted(key, family.family_of(model)):
            t = ((t.float() + 1) - 1).to(t.dtype)
        assert torch.equal(there[key], t), key
    assert words("Once upon a time, in 1821")["input_ids"] == tokenizer("Once upon a time, in 1821")["input_ids"]


def test_biases_that_transformers_leaves_out_are_an_error(tokenizer, tmp_path):
    written(tmp_path, random_model("llama-tied-bias"), tokenizer)
    with pytest.raises(ValueError, match="transformers reads 0 of its 14 biases"):
        oneshot.load(tmp_path / gguf.FILE)


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_hold_codes_and_scales(bits):
    """Whatever they are; and of a plain rounding the very bits of `gguf.quants`."""
    import gguf as library

    grid, kind = grids.GGUF(bits), library.GGMLQuantizationType[f"Q{bits}_0"]
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(grid.low, grid.high + 1, (6, 96), generator=g).to(torch.int16)
    scales = torch.randn(6, 3, generator=g).half()
    rows = blocks.rounded(codes, scales, str(grid))
    assert torch.equal(torch.from_numpy(library.quants.dequantize(rows, kind)),
                       grid.value(codes.float(), scales.float()))
    assert all(torch.equal(a, b) for a, b in zip(blocks.unrounded(rows, str(grid)), (codes, scales), strict=True))
    W = torch.randn(6, 96, generator=g)
    s = grid.scales(W)
    assert np.array_equal(blocks.rounded(grid.round(W, s).to(torch.int16), s, str(grid)),
                          library.quants.quantize(W.numpy(), kind))


@pytest.mark.parametrize("name, change, words", [
    ("llama", {"hidden_act": "gelu"}, "activation gelu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "ask for dynamic"),
    ("qwen3", {"attention_bias": True}, "attention_bias is true"),
    ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16 instead of 8"),
    ("gemma2", {"final_logit_softcapping": None}, "softcapping"),
    ("gemma3", {"layer_types": ["full_attention"] * 7}, "not every 6. layer"),
    ("gemma3", {"tie_word_embeddings": False}, "a head of its own"),
])
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, change, words, tokenizer):
    with pytest.raises(ValueError, match=f"^--format gguf: .*{words}") as said:
        gguf.check_model("gguf", random_model(f"{name}+", **change), tokenizer)
    assert "\n" not in str(said.value)


def test_other_families_and_cut_gemmas_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^--format gguf: OPTForCausalLM is none of the families"):
        gguf.check_model("gguf", families.tiny("opt"), tokenizer)
    with pytest.raises(ValueError, match="by a layer's number"):
        gguf.check_model("gguf", random_model("gemma2"), tokenizer, shrinks=True)
    gguf.check_model("gguf", random_model("llama"), tokenizer, shrinks=True)


def test_rounding_to_another_type_is_said(tokenizer, tmp_path):
    model = random_model("llama")
    [line] = written(tmp_path, model, tokenizer, "gguf:bf16")["warnings"]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    changed = sum(int((p.bfloat16() != p).sum()) for p in matrices)
    assert f"{changed} of {sum(p.numel() for p in matrices)} weights are rounded" in line
    assert not written(tmp_path, model.bfloat16(), tokenizer, "gguf:f32")["warnings"]
    model.model.embed_tokens.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"^--format gguf:f16: model.embed_tokens.weight has weights above 65504"):
        gguf.check_model("gguf:f16", model, tokenizer)


RUN = ("--model", "demo", "--pattern", "2:4", "--calibration", "self", "--nsamples", "4", "--seqlen", "16",
       "--evaluate", "none", "--no-dense", "--no-progress")


def run(folder, *more):
    return tiny.main(*RUN, "--save", folder, "--results", folder.parent / "runs", *more)


@pytest.fixture(scope="module", params=["q4_0", "q8_0", None])
def saved(request, tmp_path_factory):
    """(folder that the command saved, what --quantise was)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneshot.report.page._pictures", lambda records: [])
        folder = tmp_path_factory.mktemp("saved") / "model"
        more = ("--quantise", request.param) if request.param else ()
        assert run(folder, "--method", "wanda", "--format", "gguf", *more) == 0
    return folder, request.param


def test_the_file_holds_the_codes_that_were_measured(saved, capsys):
    """And verify proves it."""
    import gguf as library

    folder, kind = saved
    assert verify.main([str(folder)]) == 0 and "all proved" in capsys.readouterr().out
    data = checkpoint.read_manifest(folder)
    assert data["format"] == "gguf" and data["gguf"]["types"].get(kind or "bf16") == (35 if kind else 36)
    model, _ = oneshot.load(folder)
    scales, there = rounded.read(folder), {t.name: t for t in library.GGUFReader(folder / gguf.FILE).tensors}
    for name, entry in data["tensors"].items() if kind else ():
        t = there[family.names_of(model, family.family_of(model))[f"{name}.weight"]]
        value = library.quants.dequantize(np.array(t.data), t.tensor_type)
        W = model.get_submodule(name).weight
        grid = grids.parse(kind)
        want = grid.value(rounded.codes_of(W, grid, scales[name]).float(), scales[name].float())
        heads = family.heads_of(f"{name}.weight", model.config, family.family_of(model))
        assert np.array_equal(family.separate(value, heads), want.numpy()) and entry["grid"] == kind


def test_a_finished_folder_is_known_again(saved, capsys, plain_pages):  # noqa: F811
    folder, kind = saved
    more = ("--quantise", kind) if kind else ()
    assert run(folder, "--method", "wanda", "--format", "gguf", *more) == 0
    assert "finished earlier, stored result" in capsys.readouterr().err


def test_llama_cpp_runs_what_was_saved(saved):
    """The loss of a text, position by position, as transformers has it: bf16 and integers round the activations."""
    folder, _ = saved
    model, words = oneshot.load(folder)
    engine = LlamaCpp(folder / gguf.FILE)
    ids = engine.tokens("The history of science is the study of how knowledge grew, in many places and times.")
    assert ids == words("The history of science is the study of how knowledge grew, in many places and times."
                        )["input_ids"]
    with torch.no_grad():
        want = model.float()(torch.tensor([ids])).logits[0].log_softmax(-1)
    got = torch.stack([engine.log_probabilities(ids[:n], model.config.vocab_size) for n in range(1, len(ids))])
    places, target = range(len(ids) - 1), ids[1:]
    assert abs(float((got - want[:-1])[places, target].mean())) < 0.02
    assert float((want[:-1].exp() * (want[:-1] - got)).sum(-1).mean()) < 2e-3  # KL, nats


def test_a_smaller_model_with_whole_blocks(tmp_path, capsys, plain_pages):  # noqa: F811
    """The neurons that are left fill blocks of 32, so that GGUF's grids fit."""
    folder = tmp_path / "small"
    assert run(folder, "--method", "magnitude", "--format", "gguf", "--quantise", "q8_0", "--quantiser", "rtn",
               "--shrink", "0.8", "--shrink-method", "magnitude", "--tries", "1", "--heal", "none") == 0
    left = json.loads((folder / "config.json").read_text())["intermediate_size"]
    assert left % 32 == 0 < left < 512
    assert verify.main([str(folder), "--quiet"]) == 0
    model, words = oneshot.load(folder)
    engine, ids = LlamaCpp(folder / gguf.FILE), words("The history of science")["input_ids"]
    with torch.no_grad():
        want = model.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert (engine.log_probabilities(ids, len(want)) - want).abs().mean() < 0.1  # inputs are rounded to int8


@pytest.mark.parametrize("spoil", ["byte", "sealed", "cut", "gone", "another"])
def test_verify_finds_what_is_not_the_model(saved, tmp_path, capsys, spoil):
    """Also where all hashes have been made to fit."""
    folder = tiny.copy(saved[0], tmp_path / "spoilt")
    path = folder / gguf.FILE
    data = bytearray(path.read_bytes())
    data[-9] ^= 1  # the last tensor is the last norm or matrix
    if spoil == "gone":
        path.unlink()
    elif spoil == "another":
        model, words = oneshot.load(folder)
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        file.write(path, model, words, file.plan_of(model, "gguf", {}), {})
    else:
        path.write_bytes(data[:-40] if spoil == "cut" else data)
    if spoil in ("sealed", "another"):
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text()) | contents.describe(folder)
        manifest["gguf"]["bytes"] = path.stat().st_size
        manifest.pop("sha256_of_this")
        sealed.write(manifest, folder / checkpoint.MANIFEST)
    assert verify.main([str(folder), "--quiet"]) == 1
    said = capsys.readouterr().out
    assert (gguf.FILE in said) and ("is missing" in said if spoil == "gone" else True)
    if spoil in ("sealed", "another"):
        assert "FAULT model." in said and "the recorded ones" not in said


@pytest.mark.parametrize("more, words", [
    (("--format", "gguf:q8_0"), "--format gguf:q8_0: holds what --quantise q8_0 rounded"),
    (("--format", "gguf:q4_0", "--quantise", "q8_0"), "--format gguf:q4_0: holds what --quantise q4_0 rounded"),
    (("--format", "gguf", "--model", "MODEL"), "--format gguf: llama.cpp cannot follow this model's tokenizer"),
])
def test_refused_before_anything_is_computed(more, words, tmp_path, capsys):
    more = [str(tiny.save_model(tmp_path / "model")) if part == "MODEL" else part for part in more]
    assert run(tmp_path / "out", "--method", "magnitude", *more) == 2
    [line] = tiny.said(capsys.readouterr().err)
    assert words in line and not (tmp_path / "out").exists()


def test_without_save_refused(capsys):
    assert tiny.main(*RUN, "--method", "magnitude", "--format", "gguf") == 2
    assert "--format gguf: goes with --save" in capsys.readouterr().err


def test_every_form_is_offered():
    from oneshot.settings.known import known

    assert {*gguf.FORMS} == {form for form in known()["format"].metadata["choices"] if form.startswith("gguf")}
    assert models.gguf.is_gguf  # the other direction
