"""Models in the forms whose speed and quality on a CPU are measured, all of the same 2:4 weights."""

import copy

import torch
from oneshot_kernels import sparsify
from oneshot_kernels.cpu import integers
from torch import nn

from oneshot import models
from oneshot.models import Tokenizer
from oneshot.prune.patterns import NM

SHAPES = {  # random weights of these shapes, Llama's architecture
    "llama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                   "num_key_value_heads": 4, "vocab_size": 32000},
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 211}}


@torch.no_grad()
def pruned(name: str) -> tuple[nn.Module, Tokenizer | None]:
    """A model in bfloat16, 2:4 by magnitude, with its tokenizer. name: as of --model, or a shape, which has none."""
    model, tokenizer = (random_model(name), None) if name in SHAPES else models.load(name, dtype="bfloat16")
    for weight in models.all_weights(model):
        W = weight.get()
        weight.set(W * NM(2, 4).keep(W.abs()))
    return model, tokenizer


def random_model(name: str) -> nn.Module:
    """A Llama of this shape with random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name], pad_token_id=0)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def formed(model: nn.Module, form: str | None, kind: str, rounds: bool) -> nn.Module:
    """A model of the same weights in another form, which shares what stays as it is. kind: dense, cut, 2:4.

    form: bf16, f32, int8, int4; None: as it is. rounds: see `rounding`."""
    twin, sparse = shared(model), kind == "2:4"
    if form in ("bf16", "f32") and sparse:
        sparsify(twin)
    elif form in ("int8", "int4"):
        for weight in models.all_weights(twin):
            twin.set_submodule(weight.name.removesuffix(".weight"), integers.IntegerLinear.from_linear(
                weight.owner, bits=int(form[-1]), sparse=sparse))
    return rounding(twin) if rounds else twin


def rounding(model: nn.Module) -> nn.Module:
    """A model of the very integers whose layers round their inputs, with an int8 output head that does, too."""
    twin = shared(model)
    twin.lm_head = integers.IntegerLinear.from_linear(twin.lm_head)
    for layer in twin.modules():
        if isinstance(layer, integers.IntegerLinear):
            layer.round_inputs = True
    return twin


def shared(model: nn.Module) -> nn.Module:
    """A copy of a model with the very tensors."""
    return copy.deepcopy(model, {id(t): t for t in models.tensors_of(model)})


def unpacked(made: nn.Module, source: nn.Module) -> nn.Module:
    """The dense model `source` with the weights that a form of it holds, its integers dequantised."""
    twin = shared(source)
    for name, layer in made.named_modules():
        if isinstance(layer, integers.IntegerLinear):
            own = twin.get_submodule(name)
            own.weight = nn.Parameter(layer.dense(own.weight.dtype), requires_grad=False)
    return twin


def bytes_of(model: nn.Module) -> int:
    """What is read for a token: all tensors but an embedding that is no output head, of which one row is."""
    every = {t.data_ptr(): t.nbytes for t in models.tensors_of(model)}
    embedding, head = model.get_input_embeddings().weight, getattr(model.lm_head, "weight", None)
    return sum(every.values()) - (embedding.nbytes if head is None or head.data_ptr() != embedding.data_ptr() else 0)
