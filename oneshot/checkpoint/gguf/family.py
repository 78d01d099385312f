"""Family: what llama.cpp must know of a model beside its tensors, and in which order it wants their rows.

    names        by gguf's own table, `get_tensor_name_map`
    rows         llama.cpp turns neighbouring rows of q and k of its `llama` models; transformers turns row i with row
                 i + head_dim/2. So each head's halves are interleaved. Its other families turn halves themselves.
    norms        Gemma computes with 1 + w, and the file holds just that, in float32
    rope         base; `linear` as a factor; `llama3` as a tensor, the plain frequencies over the model's own

What llama.cpp fixes in its code and a config says otherwise is refused: it would compute another model.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name. paired: whether rows of q and k are interleaved. activation: of the MLP. biases: config
    entries that may be true. shift: added to norms. period: every so manieth layer attends to all tokens, the others to
    a window; 0: there are no windows. large: number of layers of the size whose scores are scaled otherwise.
    """

    arch: str
    paired: bool = False
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    shift: int = 0
    period: int = 0
    large: int = 0


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "LlamaForCausalLM": Family("llama", paired=True, biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family("llama", paired=True),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Gemma2ForCausalLM": Family("gemma2", activation=GELU, shift=1, period=2, large=46),
    "Gemma3ForCausalLM": Family("gemma3", activation=GELU, shift=1, period=6, large=62),
}
ROPES = ("default", "linear", "llama3")


def family_of(model: nn.Module) -> Family:
    """The Family of a model. Raises ValueError naming `--format` for one that is not known."""
    name = type(model).__name__
    if name not in FAMILIES or not type(model).__module__.startswith("transformers."):
        raise ValueError(f"--format gguf: {name} is none of the families it can be written for "
                         f"({', '.join(known.removesuffix('ForCausalLM') for known in FAMILIES)}); use another format")
    return FAMILIES[name]


def check(model: nn.Module, family: Family) -> list[str]:
    """Warnings of what llama.cpp does otherwise. Raises ValueError naming `--format` and an entry of the config that
    llama.cpp would not follow."""
    config, wrong = model.config, []
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        wrong.append(f"activation {activation}")
    wrong += [f"{name} is true" for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention")
              if getattr(config, name, False) and name not in family.biases]
    ropes = ropes_of(config)
    for rope in ropes.values():
        kind = rope.get("rope_type", "default")
        if kind not in ROPES or (kind == "llama3" and family.arch != "llama") or "partial_rotary_factor" in rope:
            wrong.append(f"rope_parameters ask for {kind}, or to turn a part of each head")
    if family.period:
        wrong += gemma(config, family, ropes)
    if wrong:
        raise ValueError(f"--format gguf: llama.cpp computes {family.arch} otherwise than this config says "
                         f"({wrong[0]}); use another format")
    if context_of(config, family) < config.max_position_embeddings:
        return [f"model.gguf: llama.cpp has no sliding window for this family, so its context ends at "
                f"{context_of(config, family)} tokens, up to where both compute the same"]
    return []


def gemma(config: Any, family: Family, ropes: dict[str, dict]) -> list[str]:
    """What is not as llama.cpp computes Gemma."""
    wrong, layers = [], range(config.num_hidden_layers)
    if list(config.layer_types) != [("full" if i % family.period == family.period - 1 else "sliding") + "_attention"
                                    for i in layers]:
        wrong.append(f"layer_types: not every {family.period}. layer attends to all")
    large = config.num_hidden_layers == family.large
    scale = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != scale:
        wrong.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar} instead of {scale}")
    caps = [getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")]
    if [cap is not None for cap in caps] != [family.arch == "gemma2"] * 2:
        wrong.append(f"logit softcapping {caps}")
    if not config.tie_word_embeddings:
        wrong.append("a head of its own")
    if ropes.get("sliding", {}).get("rope_type", "default") != "default":
        wrong.append("rope scaling of the sliding layers")
    return wrong


def ropes_of(config: Any) -> dict[str, dict]:
    """{"full": the rope parameters, "sliding": those of sliding layers, if they have their own}."""
    found = config.rope_parameters
    if "full_attention" in found:
        return {"full": found["full_attention"], "sliding": found["sliding_attention"]}
    return {"full": found}


def context_of(config: Any, family: Family) -> int:
    """The tokens up to which llama.cpp computes what the model computes."""
    mistral = config.model_type == "mistral" and config.sliding_window is not None
    slides = not family.period and (mistral or "sliding_attention" in (getattr(config, "layer_types", None) or ()))
    return min(config.max_position_embeddings, config.sliding_window) if slides else config.max_position_embeddings


def head_dim(config: Any) -> int:
    """The width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def describe(out: Any, config: Any, family: Family) -> None:
    """Write the hyperparameters. out: a gguf.GGUFWriter."""
    import gguf

    out.add_context_length(context_of(config, family))
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(head_dim(config))
    out.add_value_length(head_dim(config))
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    ropes = ropes_of(config)
    out.add_rope_dimension_count(head_dim(config))
    out.add_rope_freq_base(ropes["full"]["rope_theta"])
    if ropes["full"].get("rope_type") == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(ropes["full"]["factor"])
    if "sliding" in ropes:
        out.add_rope_freq_base_swa(ropes["sliding"]["rope_theta"])
    if family.period:
        out.add_sliding_window(config.sliding_window)
    if family.arch == "gemma2":
        out.add_attn_logit_softcapping(config.attn_logit_softcapping)
        out.add_final_logit_softcapping(config.final_logit_softcapping)


def names_of(model: nn.Module, family: Family) -> dict[str, str]:
    """{tensor of the model: its name in the file}, tied ones once. Raises ValueError for one that has none."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied, names = set(getattr(model, "all_tied_weights_keys", None) or {}), {}
    for name in model.state_dict():
        if name in tied:
            continue
        names[name] = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if names[name] is None:
            raise ValueError(f"--format gguf: llama.cpp has no name for {name} of {type(model).__name__}; use another "
                             "format")
    return names


def extra(model: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """{name in the file: tensor} of what the file holds beside the model's own: `rope_freqs.weight`, float32."""
    rope = ropes_of(model.config)["full"]
    if rope.get("rope_type") != "llama3":
        return {}
    d = head_dim(model.config)
    dense = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.int64).float() / d)
    return {"rope_freqs.weight": dense / model.model.rotary_emb.inv_freq.float().cpu()}


def heads_of(name: str, config: Any, family: Family) -> int:
    """How many heads a tensor's rows are interleaved in; 0 where they stay in order."""
    part = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(part, 0) if family.paired else 0


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + head_dim/2 of each head side by side. rows: (R, ...)."""
    if not heads:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def separate(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    if not heads:
        return rows
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def is_shifted(name: str, family: Family) -> bool:
    """Whether a tensor is a norm that the file holds as 1 + w."""
    return bool(family.shift) and name.endswith("norm.weight")
