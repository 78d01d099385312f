"""Tiny random models, one per family: two layers, width 32, made from a configuration without any download.

`tiny(name)` builds one. FAMILIES[name] = (transformers' model type, what differs from COMMON). Sequences in the
tests are T = 24 tokens, longer than any sliding window here, so a mask that is mixed up between layers shows.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

T, VOCAB, WINDOW = 24, 64, 8

COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2}
HEAD = {"head_dim": 8}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "head_dim": 8, "num_key_value_heads": 4}
FULL = {"layer_types": ["full_attention", "full_attention"]}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
SHARED = {"shared_expert_intermediate_size": 24}
LINEAR_ATTENTION = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}

FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied-bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"use_sliding_window": True, **SLIDING}),
    "qwen3": ("qwen3", HEAD),
    "gemma2": ("gemma2", {**HEAD, **SLIDING}),
    "gemma3": ("gemma3_text", {**HEAD, **SLIDING}),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "openai-gpt": ("openai-gpt", GPT2),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"alibi": False, "multi_query": True, "parallel_attn": True}),
    "falcon-new": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2}),
    "modernbert": ("modernbert-decoder", {"local_attention": WINDOW, "num_key_value_heads": 4,
                                          "layer_types": SLIDING["layer_types"]}),
    "xlm": ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "num_hidden_layers": 8}),  # it rescales after every sixth
    "cohere2": ("cohere2", {**HEAD, **SLIDING}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**HEAD, **QWEN_MOE}),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, **SHARED}),
    "gpt_oss": ("gpt_oss", {**HEAD, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                                    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
                                    "moe_intermediate_size": 16}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "jamba": ("jamba", {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2,
                        "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_dt_rank": 8}),
    "bamba": ("bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
                        "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_chunk_size": 8}),
    "qwen3_next": ("qwen3_next", {**HEAD, **QWEN_MOE, **SHARED, **LINEAR_ATTENTION}),
    "llama4": ("llama4_text", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 1,
                               "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2,
                               "attention_chunk_size": WINDOW,
                               "layer_types": ["chunked_attention", "full_attention"]}),
    "gemma3n": ("gemma3n_text", {**HEAD, **FULL, **PER_LAYER, "laurel_rank": 8, "num_kv_shared_layers": 1,
                                 "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0]}),
    "gemma4": ("gemma4_text", {**HEAD, **FULL, **PER_LAYER, "global_head_dim": 8, "num_kv_shared_layers": 1}),
    "gemma4_moe": ("gemma4_text", {**HEAD, **SLIDING, "global_head_dim": 16, "hidden_size_per_layer_input": 0,
                                   "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                                   "moe_intermediate_size": 16, "num_global_key_value_heads": 1}),
}
MOE = ("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe", "jamba", "qwen3_next",
       "gemma4_moe", "llama4")
NOT_REACHED = {  # what looks prunable in a block and is reported instead of pruned
    "jamba": ("mamba.A_log", "mamba.conv1d.weight"),
    "bamba": ("mamba.conv1d.weight",),
    "qwen3_next": ("linear_attn.conv1d.weight",),
}
REFUSED = ("xlm", "rwkv")  # they do more between their blocks than hand on a hidden state
UNSEEN = {"jamba": {"mamba.dt_proj"}}  # linears whose weight the model reads without calling them

# its blocks share their weights; not among FAMILIES, as what is tested of single blocks does not hold for it
ZAMBA2 = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 4, "intermediate_size": 48, "hybrid_layer_ids": [1, 3],
          "layers_block_type": ["mamba", "hybrid"] * 2,
          "layer_types": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
          "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "num_mem_blocks": 1, "adapter_rank": 4,
          "use_shared_attention_adapter": False, "max_position_embeddings": 64, "pad_token_id": 0}


def tiny(name, seed=0, dtype=torch.float32):
    """A random model of the family in eval mode. Its weights are larger than fresh ones: errors must show."""
    torch.manual_seed(seed)
    kind, changes = ("zamba2", ZAMBA2) if name == "zamba2" else FAMILIES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | changes))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(std=0.5 if "embed" in n or "wte" in n else 0.7 * p.shape[-1] ** -0.5)
            else:
                p.add_(0.1 * torch.randn_like(p))
    for p in model.parameters():  # as from_pretrained leaves them: rotary tables stay float32
        p.data = p.data.to(dtype)
    return model.eval().requires_grad_(False)
