"""Sizes: how large a model's parts are, read off its modules; the weights themselves are not looked at."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from .. import models

LAST = ("o_proj", "out_proj", "down_proj", "dense", "c_proj", "fc2", "dense_4h_to_h", "wo", "w2", "out_lin")


@dataclass(frozen=True)
class Linear:
    """One linear, or `experts` like it. fed: which input it shares with others. active: the share of tokens it sees."""

    R: int
    C: int
    fed: str
    experts: int = 1
    active: float = 1.0


@dataclass(frozen=True)
class Layer:
    """A transformer block: its number of weights, their bytes, its linears."""

    weights: int
    stored: int
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Shape:
    """A model. embedding, head, other: weights outside the blocks (a tied head has none). itemsize: of a stored one."""

    layers: tuple[Layer, ...]
    embedding: int
    head: int
    other: int
    itemsize: int
    hidden: int
    vocab: int

    @property
    def rest(self) -> int:
        """Weights outside the blocks."""
        return self.embedding + self.head + self.other

    @property
    def stored(self) -> int:
        """Bytes of all weights."""
        return self.rest * self.itemsize + sum(layer.stored for layer in self.layers)


def shape_of(model: nn.Module) -> Shape:
    """The Shape of a model, which may be on the meta device."""
    config = models.config_of(model)
    experts = next((n for key in ("num_local_experts", "num_experts", "n_routed_experts")
                    if isinstance(n := getattr(config, key, None), int) and n), 1)
    used = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or experts
    layers = []
    for block in models.walk(model):
        counts = Counter(w.kind for w in block.weights)
        first = {w.kind: w for w in reversed(block.weights)}
        own, share = list(block.module.parameters()), min(1.0, used / experts)
        layers.append(Layer(sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own), tuple(
            Linear(*first[kind].shape, fed_by(kind, first[kind].shape[1]), n, share if n > 1 else 1.0)
            for kind, n in counts.items())))
    inside = {id(p) for block in models.walk(model) for p in block.module.parameters()}
    rest = {id(p): p for p in model.parameters() if id(p) not in inside}
    embedding, head = (getattr(m, "weight", None) for m in (model.get_input_embeddings(),
                                                            model.get_output_embeddings()))
    sizes = [rest[id(p)].numel() if p is not None and id(p) in rest else 0 for p in (embedding, head)]
    sizes[1] = 0 if head is embedding else sizes[1]
    itemsize = next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
    return Shape(tuple(layers), *sizes, sum(p.numel() for p in rest.values()) - sum(sizes), itemsize,
                 config.hidden_size, config.vocab_size)


def fed_by(kind: str, C: int) -> str:
    """A name of the input of a linear: linears of one module with as many inputs share it, but for its last one."""
    parent, _, last = kind.rpartition(".")
    return kind if last in LAST else f"{parent}:{C}"
