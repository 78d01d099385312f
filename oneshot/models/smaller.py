"""Smaller: the family's own model with fewer blocks, neurons or KV groups, empty, from an ordinary config.

What a family's config can say, its own class builds; whatever differs from what is left of the larger model's weights,
or behaves differently in a block that stayed, is refused by name. Nothing is reconstructed here.

Llama refuses head counts that do not divide the hidden width. Mistral without a sliding window computes the same from
the same weights, bit for bit, and accepts them.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..runtime.inputs import reason
from . import groups
from .blocks import blocks, compute_as_stored, computes_as_stored, config_of
from .intake import UNEVEN

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "activation_sparsity_pattern")  # one entry a layer
NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")  # lists of layers' numbers
FIRST = ("first_k_dense_replace", "max_window_layers")  # how many of the first layers are different
BEHAVES = ("window", "rope", "chunk", "type", "scal", "softcap", "dropout", "eps", "top_k")  # what must not change
MISTRAL_LACKS = ("attention_bias", "mlp_bias")


def smaller_config(model: nn.Module, keep: Sequence[int], counts: Mapping[str, int],
                   biases: bool = False) -> tuple[Any, list[str]]:
    """(config, notes): a copy of the model's config for the blocks numbered `keep`, and {kind: how many units} left.

    biases: whether every linear of the blocks gets a bias (Llama's config can say so). notes: what a reader of the
    record should know.

    Raises ValueError naming the family and what its config cannot say.
    """
    said = f"--shrink: a {model.config.model_type} model"
    text = copy.deepcopy(config_of(model))
    changes = {**layer_entries(text, keep), **width_entries(text, counts, said)}
    if {groups.HEADS, groups.QUERIES} & counts.keys() and getattr(text, "head_dim", None) is None:
        changes["head_dim"] = head_size(model)
    if biases:
        if not all(hasattr(text, name) for name in MISTRAL_LACKS):
            raise ValueError(f"{said}: its config cannot give its linears biases, which this method adds")
        changes |= dict.fromkeys(MISTRAL_LACKS, True)
    entries = {k: v for k, v in text.to_dict().items() if k not in ("transformers_version", "quantization_config")}
    try:
        return type(text).from_dict({**entries, **changes}), []
    except Exception as error:  # the family's own validation
        if text.model_type != "llama" or any(entries.get(name) or changes.get(name) for name in MISTRAL_LACKS):
            raise ValueError(f"{said}: its config refuses what would be left ({reason(error)})") from None
    return as_mistral({**entries, **changes}), [
        "saved as Mistral, which computes the same: Llama's config refuses "
        f"{changes.get('num_attention_heads')} heads with a hidden width of {text.hidden_size}"]


def as_mistral(entries: dict[str, Any]) -> Any:
    """The Mistral config that computes what a Llama config with these entries does."""
    from transformers import MistralConfig

    left = ("model_type", "architectures", "pretraining_tp", "layer_types", *MISTRAL_LACKS)
    return MistralConfig(**{k: v for k, v in entries.items() if k not in left} | {
        "sliding_window": None, "architectures": ["MistralForCausalLM"]})


def layer_entries(config: Any, keep: Sequence[int]) -> dict[str, Any]:
    """The config's entries that depend on the layers, for those numbered `keep`."""
    n = config.num_hidden_layers
    if len(keep) == n:
        return {}
    changes = {"num_hidden_layers": len(keep)}
    for name in PER_LAYER:
        if isinstance(own := getattr(config, name, None), list) and len(own) == n:
            changes[name] = [own[i] for i in keep]
    for name in NUMBERS:
        if isinstance(own := getattr(config, name, None), list):
            changes[name] = [place for place, i in enumerate(keep) if i in own]
    for name in FIRST:
        if isinstance(own := getattr(config, name, None), int):
            changes[name] = sum(i < own for i in keep)
    name = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    changes[name] = changes.pop("num_hidden_layers")
    return changes


def width_entries(config: Any, counts: Mapping[str, int], said: str) -> dict[str, Any]:
    """The config's entries for {kind: how many units}. Raises ValueError for a kind it has none for."""
    changes: dict[str, Any] = {}
    for kind, count in counts.items():
        why, name = groups.why_fixed(config.model_type, kind), groups.config_field(config, kind)
        if why or name is None:
            raise ValueError(f"{said} cannot lose {kind}: {why or 'its config has no entry for their number'}")
        if kind == groups.WHOLE:
            most = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
            if count < most:
                raise ValueError(f"{said}: uses {most} experts for each token, so {count} cannot be left")
            groups_of = getattr(config, "n_group", None) or 1
            if count % groups_of or (groups_of > 1 and count < 2 * groups_of):  # a group counts by its best two
                raise ValueError(f"{said}: has its experts in {groups_of} groups, at least two in each and as many, "
                                 f"among which {count} cannot be shared")
        if kind == groups.QUERIES:
            if groups.HEADS in counts:
                raise ValueError(f"{said}: loses either {groups.HEADS} or {groups.QUERIES}, not both at once")
            changes[name] = count * config.num_key_value_heads
            continue
        if kind == groups.HEADS:
            group = config.num_attention_heads // config.num_key_value_heads
            changes |= {name: count, "num_attention_heads": count * group}
            continue
        if kind == groups.SHARED and name == "moe_intermediate_size":
            each = getattr(config, "n_shared_experts", 1) or 1
            if count % each:
                raise ValueError(f"{said}: its {each} shared experts cannot share {count} neurons")
            count //= each
        if changes.get(name, count) != count:
            raise ValueError(f"{said}: its config has one entry, {name}, for two kinds of neurons, of which "
                             f"{changes[name]} and {count} would be left")
        changes[name] = count
    return changes


def head_size(model: nn.Module) -> int:
    """The size of a head, as the first block's attention says."""
    return next(m.head_dim for m in blocks(model)[1].modules() if isinstance(getattr(m, "head_dim", None), int))


def empty_model(model: nn.Module, config: Any) -> nn.Module:
    """A model of this config on the meta device, in the dtype and with the attention of `model`."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, dtype=model.dtype,
                                                    attn_implementation=model.config._attn_implementation)
    except Exception as error:
        raise ValueError(f"--shrink: a {config.model_type} model cannot be built smaller ({reason(error)})"
                         ) from None
    compute_as_stored(made, computes_as_stored(model))
    made.generation_config = copy.deepcopy(getattr(model, "generation_config", made.generation_config))
    return made.eval()


def check_blocks(model: nn.Module, made: nn.Module, keep: Sequence[int]) -> None:
    """Raise ValueError naming the first module that behaves otherwise in the smaller model than where it came from."""
    old, new = blocks(model)[1], blocks(made)[1]
    for place, number in enumerate(keep):
        before, after = dict(old[number].named_modules()), dict(new[place].named_modules())
        if before.keys() != after.keys():
            odd = sorted(before.keys() ^ after.keys())[0]
            raise ValueError(f"--shrink: block {number} cannot become block {place} of a {model.config.model_type} "
                             f"model: {odd} would come or go")
        for name, module in before.items():
            if differs := difference(module, after[name]):
                raise ValueError(f"--shrink: block {number} cannot become block {place} of a {model.config.model_type} "
                                 f"model: {name or 'it'} would have another {differs}")


def difference(one: nn.Module, other: nn.Module) -> str | None:
    """The name of a plain attribute by which two modules behave differently; None if there is none."""
    for name, value in vars(one).items():
        plain = isinstance(value, bool | str | float | None) or (
            isinstance(value, int) and any(word in name for word in BEHAVES))
        if plain and not name.startswith("_") and vars(other).get(name, value) != value:
            return name
    return None


@torch.no_grad()
def fill(model: nn.Module, made: nn.Module, state: Mapping[str, torch.Tensor], keep: Sequence[int]) -> nn.Module:
    """`made`, with the parameters `state` {its own name: tensor}; what no checkpoint holds comes from `model`.

    Raises ValueError naming the first parameter whose shape does not fit the config.
    """
    path, _ = blocks(model)
    wanted = {name: p.shape for name, p in made.state_dict().items()}
    if wrong := sorted(name for name in wanted.keys() | state.keys()
                       if name not in wanted or name not in state or wanted[name] != state[name].shape):
        have, want = (tuple(d[wrong[0]].shape if d is state else d[wrong[0]]) if wrong[0] in d else None
                      for d in (state, wanted))
        raise ValueError(f"--shrink: a {made.config.model_type} config cannot say what would be left: {wrong[0]} would "
                         f"be {have}, its class makes it {want}")
    made.load_state_dict(dict(state), strict=True, assign=True)
    made.tie_weights()
    origin = {f"{path}.{place}.": f"{path}.{number}." for place, number in enumerate(keep)}
    there = dict(model.named_buffers()) | dict(model.named_parameters(remove_duplicate=False))
    for name, t in list(made.named_buffers()):
        if t.device.type == "meta":
            start = next((new for new in origin if name.startswith(new)), "")
            source = there.get(origin.get(start, "") + name.removeprefix(start))
            if source is None or source.shape != t.shape:
                raise ValueError(f"--shrink: {name} of a {made.config.model_type} model cannot be taken over")
            owner, _, last = name.rpartition(".")
            made.get_submodule(owner)._buffers[last] = source.clone()
    return made.requires_grad_(False)


def is_uneven(model: nn.Module) -> bool:
    """Whether a model's layers differ in width, or lack parts (uneven.py)."""
    return getattr(getattr(model.config, "quantization_config", None), "quant_method", None) == UNEVEN
