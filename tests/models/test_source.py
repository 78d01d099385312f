"""What of a checkpoint's files the loaded model does not save is named, and nothing else is."""

import json

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, Qwen3_5ForConditionalGeneration

from oneshot import models

UP = "model.layers.0.mlp.up_proj.weight"


def with_extra(folder, **extra):
    """A tiny Llama with tensors more in its file."""
    families.tiny("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.change_weights(folder, lambda tensors: tensors.update(extra))
    return folder


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def said_of(folder):
    """(what is said to be lost, the warnings) of a folder."""
    model, _ = models.load(folder)
    return list(models.source_of(model).left), models.source_of(model).warnings


@pytest.mark.parametrize("name", ["model.layers.0.extra_scale_inv", "model.layers.0.extra_blocks", UP + "_scale",
                                  "model.layers.0.self_attn.bias", "model.layers.1.self_attn.c_attn.bias"])
def test_a_name_alone_hides_nothing(name, tmp_path):
    """Scales belong to quantised weights only, and a vector is no causal mask, whatever they are called."""
    left, warnings = said_of(with_extra(tmp_path / "in", **{name: torch.ones(32)}))
    assert left == [name] and any(name in w and "not in what is saved" in w for w in warnings)


@pytest.mark.parametrize(("name", "tensor"), [
    ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    ("model.layers.0.attn.bias", torch.ones(1, 1, 8, 8)), ("model.layers.0.attn.masked_bias", torch.tensor(-1e4))])
def test_what_the_class_computes_itself_is_not_lost(name, tensor, tmp_path):
    assert said_of(with_extra(tmp_path / "in", **{name: tensor})) == ([], ())


@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama", "opt"])
@pytest.mark.parametrize("architecture", ["its own", "the base class", None])
def test_files_of_the_base_class(family, architecture, tmp_path):
    """GPT-2 and Bloom are published with the base class's names: nothing of them is lost."""
    config = families.tiny(family).config
    config.tie_word_embeddings = True
    base = AutoModel.from_config(config)
    base.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    own = type(families.tiny(family)).__name__
    change_config(tmp_path, architectures={"its own": [own], None: None}.get(architecture, [type(base).__name__]))
    assert said_of(tmp_path) == ([], ())


@pytest.mark.parametrize("architectures", [None, [], ["Qwen3_5ForCausalLM"], ["Qwen3_5ForConditionalGeneration"]])
def test_a_part_of_a_composite_model_is_refused_whatever_it_is_called(architectures, tmp_path):
    sizes = {"hidden_size": 32, "num_heads": 4}
    text = {"model_type": "qwen3_5_text", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "layer_types": ["full_attention"]}
    seen = sizes | {"model_type": "qwen3_5", "intermediate_size": 64, "depth": 1, "out_hidden_size": 32,
                    "num_position_embeddings": 16, "patch_size": 14}
    Qwen3_5ForConditionalGeneration(AutoConfig.for_model("qwen3_5", text_config=text, vision_config=seen)
                                    ).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    change_config(tmp_path, architectures=architectures)
    with pytest.raises(ValueError, match=r"^--model .*of which only Qwen3_5ForCausalLM is loaded: .*visual.* lost"):
        models.load(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = with_extra(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({UP: 2 * tensors[UP]}, folder / "b.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ValueError, match=rf"{UP} is in a.safetensors and in b.safetensors"):
        models.load(folder)


def test_weights_beside_those_that_are_read_are_named(tmp_path):
    folder = with_extra(tmp_path / "in")
    save_file({"mtp.weight": torch.ones(500, 500)}, folder / "mtp.safetensors")
    left, [warning] = said_of(folder)
    assert left == [] and "mtp.safetensors" in warning and "1 MB" in warning and "not read" in warning


def test_another_head_is_called_what_it_is(tmp_path):
    from transformers import LlamaForSequenceClassification

    config = families.tiny("llama").config
    config.num_labels, config.tie_word_embeddings = 3, False
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a LlamaForSequenceClassification, without .*LlamaForCausalLM.*lm_head"):
        models.load(tmp_path)
