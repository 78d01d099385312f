"""Small Llama-like models with sharp logits, for the tests of `fast_decode`."""

import torch
from oneshot_kernels.cpu.decode import fast_decode
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {"vocab_size": 211, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": None,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {"llama": {"head_dim": 20}, "mistral": {"num_key_value_heads": 4}, "qwen2": {"num_key_value_heads": 1},
            "qwen3": {"head_dim": 24}}
BIAS = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {"attention_bias": True}}
ROPES = {"llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
         "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
         "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0,
                     "original_max_position_embeddings": 8}}
PROMPT = torch.tensor([[5, 17, 3, 99, 140]])


def make(family="llama", dtype=torch.float32, **changed):
    """A model with random weights, biases and gains, and sharp logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SHAPE | FAMILIES.get(family, {}) | changed))
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape) * 0.2 + ("norm" in name))
    return model


def say(model, ids=PROMPT, n=40, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                          **options)


def install(model, steps):
    assert fast_decode(model) is None
    steps.clear()  # without those of the check
    return model
