"""Groups: what is cut together, so that a smaller dense model remains.

    unit        a neuron of an MLP, or a KV group of an attention: slices of several weights that go together
    consumer    the linear that reads a unit's output, as `size` consecutive columns: down_proj, o_proj. That is where
                solvers see the unit (prune/patterns.py, Columns)
    producers   the linears whose rows compute the unit: gate and up; q, k and v

A unit whose consumer columns are zero does not affect the model's output, so its rows may go with them. What is
specific to a family is in the tables below and nowhere else; `models/smaller.py` proves that the family's own code,
built from the smaller config, has exactly the shapes that are left.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from .experts import layout
from .weights import Weight, weights_of

NEURONS, EXPERTS, SHARED, HEADS = "neurons", "expert neurons", "shared neurons", "KV groups"
QUERIES = "query heads"  # of each KV group; the other way to make an attention narrower
WHOLE = "experts"  # of a mixture; no consumer tells that one is zero, so they are chosen before all others
ROUTERS = ("gate", "router")  # beside the experts: what chooses among them
MLPS = (  # consumer, producers, all by their last names within one module (OPT: within the block)
    ("down_proj", ("gate_proj", "up_proj")), ("down_proj", ("gate_up_proj",)), ("down_proj", ("up_proj",)),
    ("fc2", ("fc1",)), ("c_proj", ("c_fc",)), ("dense_4h_to_h", ("dense_h_to_4h",)), ("fc_out", ("fc_in",)),
    ("Wo", ("Wi",)))
FUSED = ("gate_up_proj", "Wi")  # gate and up in one weight: the first half of its rows, then the second
ATTENTIONS = (
    ("o_proj", ("q_proj", "k_proj", "v_proj")), ("Wo", ("q_proj", "k_proj", "v_proj")), ("o_proj", ("qkv_proj",)),
    ("o_proj", ("q_b_proj", "kv_b_proj")), ("o_proj", ("q_proj", "kv_b_proj")))
FIELDS = {  # {model type: {kind: the config's name for how many there are}}, where it is not the usual one
    "opt": {NEURONS: "ffn_dim"}, "gpt2": {NEURONS: "n_inner"}, "gptj": {NEURONS: "n_inner"},
    "falcon": {NEURONS: "ffn_hidden_size"}, "llama4_text": {NEURONS: "intermediate_size_mlp",
                                                           EXPERTS: "intermediate_size", SHARED: "intermediate_size"}}
USUAL = {  # {kind: the first of these that the config has}
    NEURONS: ("intermediate_size",), EXPERTS: ("moe_intermediate_size", "intermediate_size"),
    SHARED: ("shared_expert_intermediate_size", "moe_intermediate_size"), HEADS: ("num_key_value_heads",),
    QUERIES: ("num_attention_heads",), WHOLE: ("num_local_experts", "num_experts", "n_routed_experts")}
FIXED = {  # {model type: {kind: why its config cannot say fewer}}
    **{name: {HEADS: "its attention is as wide as the hidden state"} for name in
       ("opt", "gpt2", "gpt_neox", "gptj", "openai-gpt", "bloom", "falcon", "mpt", "modernbert-decoder", "cohere2")},
    "gemma3n_text": {NEURONS: "its layers share and mask them"}, "gemma4_text": {HEADS: "its layers share KV heads"}}
for _name in FIXED:
    FIXED[_name] = {**FIXED[_name], QUERIES: FIXED[_name].get(HEADS, "")}
for _name in ("openai-gpt", "bloom", "mpt"):
    FIXED[_name] = {**FIXED[_name], NEURONS: "its MLP has four times the hidden width, which no config entry changes"}
FIXED["gemma3n_text"][HEADS] = FIXED["gemma4_text"][HEADS]


@dataclass(frozen=True)
class Width:
    """The units of one consumer.

    kind: one of the names above. consumer: the linear's name within the block. count: how many units; size: columns of
    the consumer that belong to each, consecutive. segments: how many times there are `count` of them, of each of which
    as many go (query heads: once for each KV group). rows: {producer's name within the block: int64 (segments · count,
    r), the rows of each unit}. vectors: the same for parameters of one dimension that are no biases (GPT-OSS's sinks).
    """

    kind: str
    consumer: str
    count: int
    size: int
    rows: dict[str, torch.Tensor] = field(repr=False, compare=False)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    segments: int = 1


@dataclass(frozen=True)
class Pool:
    """The experts of a mixture. name: their module within the block. count: how many. tensors: names within the block
    of all parameters and buffers that have one entry per expert along their first dimension, the router's among them.
    """

    name: str
    count: int
    tensors: tuple[str, ...]


def pools(block: nn.Module) -> list[Pool]:
    """All mixtures of experts of a block."""
    found = []
    for name, module in block.named_modules():
        if layout(module):
            count, stem = module.down_proj.shape[0], name.rpartition(".")[0]
            beside = [f"{stem}.{router}" if stem else router for router in ROUTERS]
            tensors = [key for key, t in block.state_dict().items() if t.ndim and t.shape[0] == count
                       and any(key.startswith(f"{place}.") for place in (name, *beside))]
            found.append(Pool(name, count, tuple(tensors)))
    return found


def widths(block: nn.Module) -> list[Width]:
    """All consumers of a block whose units this program knows: attention first, then MLPs and experts.

    An attention with several query heads per KV group is there twice, as HEADS and as QUERIES.
    """
    weights = {w.linear: w for w in weights_of(block)[0]}
    found = [*_attentions(block, weights), *_mlps(block, weights)]
    place = list(weights).index
    return sorted(found, key=lambda w: (w.kind not in (HEADS, QUERIES), w.kind == QUERIES, place(w.consumer)))


def why_fixed(model_type: str, kind: str) -> str | None:
    """Why a family's config cannot say fewer units of a kind; None where this program knows of no reason."""
    return FIXED.get(model_type, {}).get(kind)


def config_field(config: object, kind: str) -> str | None:
    """The name under which a config holds the number of units of a kind; None where it has none."""
    own = FIELDS.get(config.model_type, {}).get(kind)
    names = (own,) if own else USUAL[kind]
    return next((name for name in names if hasattr(config, name)), None)


def _named(weights: dict[str, Weight], consumer: str, last: str, producers: tuple[str, ...]) -> list[Weight] | None:
    """The producers beside a consumer whose last name is `last`; None where they are not all there.

    An expert's weights have its number behind their last name.
    """
    stem, name, number = weights[consumer].linear, weights[consumer].kind.rpartition(".")[2], weights[consumer].expert
    if name != last:
        return None
    prefix = stem.removesuffix(f".{number}" if number is not None else "").removesuffix(last)
    ending = f".{number}" if number is not None else ""
    found = [weights.get(f"{prefix}{p}{ending}") for p in producers]
    return found if all(w is not None for w in found) else None


def _mlps(block: nn.Module, weights: dict[str, Weight]) -> list[Width]:
    found = []
    for name, weight in weights.items():
        pairs = ((last, _named(weights, name, last, producers)) for last, producers in MLPS)
        beside = next((p for _, p in pairs if p), None)
        if beside is None:
            continue
        F = weight.shape[1]
        rows = {p.linear: _unit_rows(p, F) for p in beside}
        if all(r is not None for r in rows.values()):
            kind = EXPERTS if weight.expert is not None else SHARED if "shared_expert" in name else NEURONS
            found.append(Width(kind, name, F, 1, rows))
    return found


def _unit_rows(producer: Weight, F: int) -> torch.Tensor | None:
    """int64 (F, r): the rows of each of F neurons in a producer; None if its rows are no multiple of F."""
    R, name = producer.shape[0], producer.kind.rpartition(".")[2]
    if R == F:
        return torch.arange(F).unsqueeze(1)
    if R != 2 * F or name not in FUSED:
        return None
    apart = getattr(producer.owner, "is_concatenated", True) if layout(producer.owner) else True
    return torch.arange(R).view(2, F).T if apart else torch.arange(R).view(F, 2)  # GPT-OSS: gate and up take turns


def _attentions(block: nn.Module, weights: dict[str, Weight]) -> list[Width]:
    found = []
    for name, weight in weights.items():
        beside = next((p for last, producers in ATTENTIONS if (p := _named(weights, name, last, producers))), None)
        module = block.get_submodule(name.rpartition(".")[0]) if beside and "." in name else None
        size = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None)
        if not isinstance(size, int) or weight.shape[1] % size:
            continue
        heads, last = weight.shape[1] // size, [p.kind.rpartition(".")[2] for p in beside]
        if last == ["qkv_proj"]:
            groups = (beside[0].shape[0] // size - heads) // 2
            rows = {beside[0].linear: _fused_rows(heads, groups, size)} if groups and not heads % groups else {}
        else:
            groups = beside[1].shape[0] // size if "k_proj" in last else heads
            whole = groups and not heads % groups and not any(p.shape[0] % groups for p in beside)
            rows = {p.linear: torch.arange(p.shape[0]).view(groups, -1) for p in beside} if whole else {}
        if rows:
            stem, sinks = name.rpartition(".")[0], getattr(module, "sinks", None)
            vectors = {f"{stem}.sinks": torch.arange(heads).view(groups, -1)} if sinks is not None else {}
            found.append(Width(HEADS, name, groups, weight.shape[1] // groups, rows, vectors))
            if heads > groups and "q_proj" in last:
                query = beside[last.index("q_proj")]
                own = {query.linear: torch.arange(query.shape[0]).view(heads, -1)}
                each = {key: v.view(heads, 1) for key, v in vectors.items()}
                found.append(Width(QUERIES, name, heads // groups, size, own, each, groups))
    return found


def _fused_rows(heads: int, groups: int, size: int) -> torch.Tensor:
    """int64 (groups, r): the rows of each KV group where q, k and v of all heads follow one another (Phi-3)."""
    q, k, v = torch.arange((heads + 2 * groups) * size).split([heads * size, groups * size, groups * size])
    return torch.cat([q.view(groups, -1), k.view(groups, -1), v.view(groups, -1)], dim=1)
