"""`--format gguf`: the file holds the model bit for bit, llama.cpp computes from it what transformers computes."""


import families
import numpy as np
import pytest
import torch
from llama_cpp import LlamaCpp
from tiny import plain_pages  # noqa: F401

import oneshot
from oneshot.checkpoint import gguf
from oneshot.checkpoint.gguf import blocks, family
from oneshot.quantise import grids

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
