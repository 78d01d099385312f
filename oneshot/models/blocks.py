"""Transformer blocks: find them, move tensors to the device, iterate over a model one block at a time.

    block       one transformer layer, whatever its model family calls it
    offloaded   how a tensor is kept while nothing computes with it: in CPU memory, in its stored dtype; of a model that
                is larger than memory, on disk (offload.py)
    resident    on the device, in the dtype used for computing: the stored one on a GPU; on a CPU float32, unless the
                model computes as it is stored (`--compute stored`)
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .offload import on_disk
from .weights import UNKNOWN, Weight, weights_of


def config_of(model: nn.Module) -> Any:
    """The transformers config of a model's text decoder (of a multimodal model: that part alone)."""
    return model.config.get_text_config(decoder=True)


def embedded(model: nn.Module) -> int:
    """The number of token ids that the model's embedding has rows for; some tokenizers know more."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    rows = isinstance(weight, torch.Tensor) and weight.ndim == 2
    return weight.shape[0] if rows else config_of(model).vocab_size


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence the model supports, in tokens; None if its config does not state one.

    Raises ValueError naming `--model` if the entry is not a number.
    """
    most = getattr(config_of(model), "max_position_embeddings", None)
    if not isinstance(most, int | None):
        raise ValueError(f"--model: its config says that max_position_embeddings is {most!r:.60}; correct it")
    return most


def static_cache(model: nn.Module, length: int) -> Any:
    """A KV cache of transformers with room for so many tokens, whose memory stays where it is, as CUDA graphs need."""
    from transformers import StaticCache

    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)


def decoder(model: nn.Module) -> nn.Module:
    """The part of the model that holds the embeddings and the blocks, without the output head."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    if inner is None or inner is model or isinstance(inner, nn.Linear):  # ModernBERT's `decoder` is its output head
        inner = model.base_model
    return inner


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name of the list within the model, ModuleList of the transformer blocks).

    Raises ValueError naming `--model` when no ModuleList has the config's number of layers.
    """
    n = config_of(model).num_hidden_layers
    inner = decoder(model)
    classes = set(getattr(model, "_no_split_modules", None) or ())
    lists = [(name, m) for name, m in model.named_modules()
             if isinstance(m, nn.ModuleList) and len(m) == n and any(m is part for part in inner.modules())]
    if not n:
        raise ValueError(f"--model: {type(model).__name__} has no transformer blocks (num_hidden_layers is {n}); "
                         "nothing can be pruned")
    named = [(name, m) for name, m in lists if type(m[0]).__name__ in classes]
    if not lists:
        raise ValueError(f"--model: {type(model).__name__} has no list of {n} transformer blocks; "
                         "only decoder-only transformers models can be pruned")
    return (named or lists)[0]


@dataclass
class Block:
    """One transformer block, as `walk` yields it.

    name: full name in the model, such as "model.layers.3". weights: every prunable weight, under its full name.
    skipped: [(full parameter name, why it is not pruned)]. stored: {parameter name within the block: dtype it is saved
    in}. changed: set to True before asking for the next block to copy changed parameters back to the offloaded ones.
    shared: weights that an earlier block holds as well (Zamba2), under their names there. recurring: names of weights
    that a later block holds as well. elsewhere: names within the block of parameters that the model holds outside the
    block as well.
    """

    number: int
    name: str
    module: nn.Module
    weights: list[Weight]
    skipped: list[tuple[str, str]]
    stored: dict[str, torch.dtype]
    changed: bool = False
    shared: list[Weight] = field(default_factory=list)
    recurring: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)

    def state(self) -> dict[str, torch.Tensor]:
        """The block's state dict as it will be saved: on the CPU, parameters in their stored dtype."""
        return {n: t.to("cpu", self.stored.get(n, t.dtype)) for n, t in self.module.state_dict().items()}


def walk(model: nn.Module, device: str | torch.device | None = None, *, start: int = 0, end: int | None = None,
         bar: tqdm | None = None) -> Iterator[Block]:
    """Yield the model's blocks from number `start` to `end` - 1 (None: the last), one at a time, resident on `device`.

    device: None leaves the blocks offloaded, to be read or changed in their stored form. bar: advances by one per
    block.

    This is the only place that iterates over a model. Of a model on disk, a block is read when it is reached, and
    dropped afterwards; one that has changed is written first. With no device, a weight is read when it is looked at.
    """
    path, block_list = blocks(model)
    first, last = sharing(block_list)
    outside = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(f"{path}.")}
    disk = on_disk(model)
    for number, module in list(enumerate(block_list))[start:end]:
        name = f"{path}.{number}"
        weights, skipped = weights_of(module, name)
        shared = [w for w in weights if first[id(w.parameter)] < number]
        for w in shared:
            w.block = f"{path}.{first[id(w.parameter)]}"
        for w in weights if disk else ():
            w.fetch = functools.partial(disk.fetch, number)
        own = dict(module.named_parameters(remove_duplicate=False))
        block = Block(number, name, module, [w for w in weights if first[id(w.parameter)] == number], skipped,
                      {n: p.dtype for n, p in own.items()}, shared=shared,
                      recurring={w.name for w in weights if last[id(w.parameter)] > number},
                      elsewhere={n for n, p in own.items() if id(p) in outside or first[id(p)] < last[id(p)]})
        def changed(block: Block = block) -> bool:
            return block.changed

        if device is None:
            yield block
        else:
            with contextlib.ExitStack() as stack:
                if disk:
                    stack.enter_context(disk.present(number, changed))
                stack.enter_context(resident(model, device, tensors_of(module), write_back=changed))
                yield block
        if bar is not None:
            bar.update()


def sharing(block_list: nn.ModuleList) -> tuple[dict[int, int], dict[int, int]]:
    """({id of a parameter: number of the first block that holds it}, the same for the last block)."""
    first, last = {}, {}
    for number, module in enumerate(block_list):
        for p in module.parameters():
            first.setdefault(id(p), number)
            last[id(p)] = number
    return first, last


def shares_weights(model: nn.Module) -> bool:
    """Whether some blocks hold the same parameters."""
    first, last = sharing(blocks(model)[1])
    return first != last


def all_weights(model: nn.Module) -> Iterator[Weight]:
    """Every prunable weight of an offloaded model, under its full name."""
    for block in walk(model):
        yield from block.weights


def skipped(model: nn.Module) -> list[tuple[str, str]]:
    """[(full parameter name, why)] of every matrix that is not pruned, outside the blocks and within them."""
    return outside(model) + list(dict.fromkeys(entry for block in walk(model) for entry in block.skipped))


def unreached(model: nn.Module) -> list[tuple[str, nn.Parameter, nn.Module]]:
    """(full name, parameter, its module) of the matrices within the blocks that look prunable but are not.

    These are neither routers nor biases, nor linears that this program recognises.
    """
    path, _ = blocks(model)
    modules, names = dict(model.named_modules()), {n for n, why in skipped(model) if why.startswith(UNKNOWN)}
    return [(name, p, modules[name.rpartition(".")[0]]) for name, p in model.named_parameters()
            if name in names and name.startswith(f"{path}.")]


def outside(model: nn.Module) -> list[tuple[str, str]]:
    """[(full parameter name, why)] of the matrices outside the blocks, which are never pruned."""
    inside = {id(p) for p in blocks(model)[1].parameters()}
    embedding, head = (getattr(m, "weight", None) for m in (model.get_input_embeddings(),
                                                            model.get_output_embeddings()))

    def why(p: nn.Parameter) -> str:
        tied = p is embedding and p is head
        return "embedding, tied to the output head" if tied else "embedding" if p is embedding else \
            "output head" if p is head else "outside the transformer blocks"
    return [(name, why(p)) for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in inside]


def output_head(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """(full name, the linear) of the output head; None where it is no nn.Linear, or there is none."""
    head = model.get_output_embeddings()
    name = next((name for name, m in model.named_modules() if m is head), None)
    return (name, head) if name and type(head) is nn.Linear else None


def compute_as_stored(model: nn.Module, as_stored: bool = True) -> None:
    """Let a model compute in the dtype its weights are stored in on a CPU too; or else there in float32."""
    model.as_stored = as_stored


@contextlib.contextmanager
def computing(as_stored: bool, *models: nn.Module) -> Iterator[None]:
    """Within the context, the models compute on a CPU in the dtype their weights are stored in, or else in float32."""
    before = [computes_as_stored(model) for model in models]
    try:
        for model in models:
            compute_as_stored(model, as_stored)
        yield
    finally:
        for model, was in zip(models, before, strict=True):
            compute_as_stored(model, was)


def computes_as_stored(model: nn.Module, device: str | torch.device = "cpu") -> bool:
    """Whether a model computes on the device in the dtype its weights are stored in."""
    return torch.device(device).type != "cpu" or getattr(model, "as_stored", False)


def compute_dtype(model: nn.Module, device: str | torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter of the model that is stored in `stored` computes.

    float32 on a CPU, where 16-bit arithmetic may be slow or emulated, unless `compute_as_stored` was called; else
    `stored`.
    """
    return stored if computes_as_stored(model, device) or stored == torch.float64 else torch.float32


@contextlib.contextmanager
def resident(model: nn.Module, device: str | torch.device, tensors: Iterable[torch.Tensor] | None = None, *,
             write_back: bool | Callable[[], bool] = False, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within the context, parameters and buffers are on `device` in their compute dtype; afterwards as before.

    tensors: those of the model that are wanted (default: all). write_back: whether to copy changed parameters back at
    the end, or a function that is asked then. dtype: the compute dtype (default: `compute_dtype`). Buffers keep their
    own dtype (rotary frequencies are float32 on purpose). A tensor that already has the right device and dtype is not
    copied.
    """
    away = []
    try:
        for t in {id(t): t for t in (tensors_of(model) if tensors is None else tensors)}.values():
            kept = t.data
            if kept.is_meta:
                raise ValueError("--offload disk: a step of this run needs the whole model in memory; leave it out")
            weight = isinstance(t, nn.Parameter) and t.is_floating_point()
            there = kept.to(device, (dtype or compute_dtype(model, device, t.dtype)) if weight else t.dtype)
            if there is not kept:
                away.append((t, kept, weight))
                t.data = there
        yield
    finally:
        carry = write_back() if callable(write_back) else write_back
        for t, kept, weight in away:
            if carry and weight:
                kept.copy_(t.data)
            t.data = kept


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def rest_of(module: nn.Module, block_list: nn.ModuleList) -> list[torch.Tensor]:
    """All parameters and buffers of `module` outside the blocks in `block_list`."""
    inside = {id(t) for t in tensors_of(block_list)}
    return [t for t in tensors_of(module) if id(t) not in inside]
