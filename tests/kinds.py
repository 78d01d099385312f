"""Checkpoints of every kind that a hub holds, made small: written into a folder, with a tokenizer."""

import json

import families
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}


def with_tokenizer(folder):
    tiny.tokenizer().save_pretrained(folder)
    return folder


def saved(folder, name, dtype=torch.float32, **options):
    """A tiny model of a family, saved as anyone would."""
    families.tiny(name, dtype=dtype).save_pretrained(folder, **options)
    return with_tokenizer(folder)


def built(folder, kind, changes, cls=AutoModelForCausalLM):
    """A tiny model of a configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **changes)
    model = cls.from_config(config) if cls is AutoModelForCausalLM else cls(config)
    model.save_pretrained(folder)
    return with_tokenizer(folder)


def config(folder, **changes):
    """Change a saved config."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def tensors(folder, change):
    """Change the saved tensors."""
    file = folder / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})
    return folder


def fp8(folder):
    """Block FP8 as Qwen and DeepSeek publish it: 128 x 128 blocks, a scale each."""
    def quantise(found):
        for name in [n for n, t in found.items() if t.ndim == 2 and "layers" in n]:
            W = found[name].float()
            R, C = W.shape
            r, c = min(R, 128), min(C, 128)
            s = W.view(R // r, r, C // c, c).abs().amax((1, 3)) / 448
            found[name] = (W / s.repeat_interleave(r, 0).repeat_interleave(c, 1)).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = s
    built(folder, "llama", LLAMA | {"dtype": "bfloat16"})
    tensors(folder, lambda found: found.update({n: t.to(torch.bfloat16) for n, t in found.items()}))
    tensors(folder, quantise)
    return config(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic",
                                               "weight_block_size": [128, 128]})


def mxfp4(folder):
    """GPT-OSS as published: experts in 4-bit blocks with a scale each."""
    def quantise(found):
        for name in [n for n, t in found.items() if n.endswith(("gate_up_proj", "down_proj")) and t.ndim == 3]:
            E, C, R = found.pop(name).shape
            found[f"{name}_blocks"] = torch.randint(0, 256, (E, R, C // 32, 16), dtype=torch.uint8)
            found[f"{name}_scales"] = torch.randint(122, 125, (E, R, C // 32), dtype=torch.uint8)
    built(folder, "gpt_oss", families.COMMON | {
        "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "dtype": "bfloat16"})
    tensors(folder, lambda found: found.update({n: t.to(torch.bfloat16) for n, t in found.items()}))
    tensors(folder, quantise)
    return config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]})


def adapter(folder):
    saved(folder, "llama")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


def multimodal(folder):
    """A vision-language model of which AutoModelForCausalLM builds the language model alone."""
    import transformers

    return built(folder, "qwen3_5", {
        "text_config": {"model_type": "qwen3_5_text", **families.COMMON, **families.HEAD, **families.LINEAR_ATTENTION},
        "vision_config": {"model_type": "qwen3_5", "hidden_size": 32, "intermediate_size": 64, "depth": 2,
                          "num_heads": 4, "out_hidden_size": 32, "num_position_embeddings": 16, "patch_size": 14},
    }, transformers.Qwen3_5ForConditionalGeneration)


def encoder_decoder(folder):
    import transformers

    return built(folder, "bart", {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                                  "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
                                  "decoder_ffn_dim": 48, "max_position_embeddings": 64},
                 transformers.BartForConditionalGeneration)


def mtp(folder):
    """One more layer than the config has, as checkpoints with multi-token prediction carry it."""
    return tensors(saved(folder, "llama"), lambda found: found.update(
        {n.replace(".layers.1.", ".layers.2."): t.clone() for n, t in found.items() if ".layers.1." in n}))


def remote_code(folder):
    saved(folder, "llama")
    config(folder, model_type="mine_llama", architectures=["MineForCausalLM"], auto_map={
        "AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})
    (folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine_llama'\n")
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n")
    return folder


def pickles(folder):
    saved(folder, "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder
