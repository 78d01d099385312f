"""`fast_decode`: one token of a Llama-like model on a CPU by one compiled call, in the place of hundreds of operations.

transformers' `generate` stays as it is. The model computes the prompt as before, and every further token (batch 1, no
padding, the default cache) by step.cpp, on the weights that are there: 2:4 in tiles, integers, dense rows. Most of a
small model's time is Python and small operations (results/bench/cpu_decode.md), and these go.

    H, Q, J, D   hidden size, query heads, key-value heads, head size      V   vocabulary

Results differ from transformers' only in how sums are rounded; a few tokens are compared before the first use. A copy
of the model, pickled or not, decodes as before; what is saved is the same. Threads that share a model take turns.
"""

import copy
import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import reference
from ..fuse import FusedGatedMLP, FusedProjection
from ..linear import Sparse24Linear
from . import integers, layout, library, linear, step
from .cache import Buffers, length
from .linear import TYPES

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # of a block
ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text
KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache",
         "logits_to_keep", "return_dict", "cache_position"}  # arguments of a forward pass that a step understands
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}  # relative error of the logits, at most
AGREE_ROUNDED = 0.3  # where inputs are rounded to int8: one bit of bfloat16 before that is a whole code after it


class Refused(Exception):
    """This model cannot be decoded by one call, for the reason that the text says."""


def fast_decode(model: nn.Module) -> str | None:
    """Let `model.generate` compute single tokens by one compiled call, see above. None, or why it cannot be.

    Call it last, when the model is on the CPU and its layers are what they will be (`sparsify`). A model whose layers
    are exchanged or moved afterwards decodes as transformers does, from the next prompt on, with a warning.
    """
    _decoders.pop(model, None)
    try:
        if not step.available():
            raise Refused(f"no compiled kernel: {library.why('step')}")
        decoder = Decoder(model)
        decoder.check_agreement()
    except Refused as why:
        return str(why)
    except AttributeError as error:  # a block without its MLP, a model without a head
        return f"a part that Llama has is not there ({error})"
    _decoders[model] = decoder
    kind = type(model)
    if not hasattr(kind, "decodes_fast"):  # of the same name, because what is saved says the class
        def reduced(self: nn.Module, protocol: int) -> tuple:
            _, (_, *more), *rest = kind.__reduce_ex__(self, protocol)
            return (_new, (kind, *more), *rest)
        model.__class__ = type(kind.__name__, (kind,), {
            "forward": _wrapped(kind.forward), "__reduce_ex__": reduced, "decodes_fast": True,
            "__module__": kind.__module__})
    return None


def _new(kind: type, *args: Any) -> Any:
    """An empty object of a class, for pickle."""
    return kind.__new__(kind, *args)


def decoder_of(model: nn.Module) -> "Decoder | None":
    """What computes a model's single tokens; None where transformers does."""
    return _decoders.get(model)


def _wrapped(plain: Callable) -> Callable:
    """A class's forward that hands single tokens to the model's Decoder, if it has one."""
    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        decoder = _decoders.get(self)
        if decoder is None:
            return plain(self, *args, **kwargs)
        if not args and decoder.takes(kwargs):
            return decoder.output(kwargs["input_ids"], kwargs["past_key_values"])
        if not decoder.holds():
            warnings.warn("the model's layers have changed since fast_decode: it decodes as transformers does; call "
                          "fast_decode again", RuntimeWarning, stacklevel=3)
            del _decoders[self]
        return plain(self, *args, **kwargs)
    return forward


class Decoder:
    """What step.cpp needs of a model. Raises Refused for a model that it does not know."""

    def __init__(self, model: nn.Module) -> None:
        config, inner = model.config, getattr(model, "model", None)
        if config.model_type not in FAMILIES or getattr(config, "hidden_act", None) not in ("silu", "swish"):
            raise Refused(f"{config.model_type} is not among {', '.join(FAMILIES)} with SiLU")
        if inner is None or getattr(inner.rotary_emb, "rope_type", None) not in ROPE:
            raise Refused("its rotary positions depend on the length of the text")
        self.model, self.layers = weakref.ref(model), list(inner.layers)
        self.type, self.embed, self.rotary = inner.norm.weight.dtype, inner.embed_tokens, inner.rotary_emb
        if self.type not in TYPES or inner.norm.weight.device.type != "cpu":
            raise Refused(f"its norms are {self.type} on {inner.norm.weight.device}")
        self.kept, self.seen, self.lock, self.tokens = [], signature(model), threading.Lock(), 0
        if any(hooks for _, hooks in self.seen[0]):
            raise Refused("it has forward hooks")
        first = self.layers[0].self_attn
        self.heads, self.head_dim = config.num_attention_heads, first.head_dim
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.eps = inner.norm.variance_epsilon
        self.blocks = (step.Block * len(self.layers))(*[self._block(layer) for layer in self.layers])
        self.struct = step.Model(
            self.blocks, len(self.layers), config.hidden_size, self.heads, self.kv_heads, self.head_dim,
            max(block.down.K for block in self.blocks), TYPES[self.type], 0, self.eps, first.scaling, None, None,
            self._gain(inner.norm), self._weight(model, "lm_head"), step.address(linear.function()),
            step.address(integers.function()))
        self.positions = 0
        self.caches: weakref.WeakKeyDictionary[Any, Buffers] = weakref.WeakKeyDictionary()
        self.filled: tuple[weakref.ref, int] | None = None

    def _block(self, layer: nn.Module) -> step.Block:
        """A block's weights. Raises Refused for one that is not Llama's."""
        attention, mlp = layer.self_attn, layer.mlp
        if {name for name, _ in layer.named_children()} != PARTS:
            raise Refused(f"a block of it has other parts than {', '.join(sorted(PARTS))}")
        stacked, gated = isinstance(attention.q_proj, FusedProjection), isinstance(mlp, FusedGatedMLP)
        qkv = [self._weight(attention.q_proj.shared, "layer")] if stacked else [
            self._weight(attention, f"{name}_proj") for name in "qkv"]
        pair = [self._weight(mlp, "gate_up")] if gated else [
            self._weight(mlp, f"{name}_proj") for name in ("gate", "up")]
        o, down = self._weight(attention, "o_proj"), self._weight(mlp, "down_proj")
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        if sum(w.N for w in qkv) != rows or self.heads * self.head_dim != o.K or sum(w.N for w in pair) != 2 * down.K:
            raise Refused("its blocks have other numbers of heads than its config")
        gains = [self._gain(getattr(layer, name)) for name in ("input_layernorm", "post_attention_layernorm")]
        gains += [self._gain(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
        return step.Block((step.Linear * 3)(*qkv), o, (step.Linear * 2)(*pair), down, *gains)

    def _weight(self, owner: Any, name: str) -> step.Linear:
        """The layer `name` of a module. Raises Refused for one that step.cpp cannot read."""
        layer = getattr(owner, name)
        bias = getattr(layer, "bias", None)
        if type(layer) is nn.Linear and layer.weight.is_contiguous() and layer.weight.dtype == self.type:
            tensors, (n, k), form = (layer.weight, None, None), layer.weight.shape, 0
        elif isinstance(layer, Sparse24Linear) and layer.weight.ndim == 3 and layer.weight.dtype == self.type and (
                layout.is_native(layer.weight, linear.lanes())):
            tensors, n, k, form = (layer.weight, layer.metadata, None), layer.rows, layer.in_features, 1
        elif isinstance(layer, integers.IntegerLinear):
            tensors, n, k = (layer.values, None, layer.scale), layer.out_features, layer.in_features
            form = layer.bits + 16 * (layer.values.ndim == 5) + 32 * (not layer.round_inputs)
        else:
            raise Refused(f"{name} is a {type(layer).__name__} of another kind or dtype than step.cpp reads")
        tensors = [None if t is None else t.detach() for t in (*tensors, bias)]
        if any(t is not None and t.device.type != "cpu" for t in tensors) or (
                bias is not None and bias.dtype != self.type):
            raise Refused(f"{name} is not on the CPU, or its bias is not {self.type}")
        self.kept += tensors
        return step.Linear(*(None if t is None else t.data_ptr() for t in tensors), n, k, form)

    def _gain(self, norm: nn.Module | None) -> int | None:
        """The address of a norm's gain; None without a norm. Raises Refused for another epsilon or dtype."""
        if norm is None:
            return None
        if norm.variance_epsilon != self.eps or norm.weight.dtype != self.type:
            raise Refused("its norms are not all alike")
        self.kept.append(norm.weight.detach())
        return norm.weight.data_ptr()

    def holds(self) -> bool:
        """Whether the model still has the modules and tensors that this was made of, where they were, and no hooks."""
        return signature(self.model()) == self.seen

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward pass with these arguments is one more token of a text that the cache holds."""
        ids, cache, mask, place = (kwargs.get(name) for name in ("input_ids", "past_key_values", "attention_mask",
                                                                 "position_ids"))
        if torch.is_grad_enabled() or ids is None or ids.shape != (1, 1) or not kwargs.keys() <= KNOWN:
            return False
        if kwargs.get("inputs_embeds") is not None or kwargs.get("use_cache") is False or not (
                isinstance(kwargs.get("logits_to_keep", 0), int) and kwargs.get("return_dict") is not False):
            return False
        config = self.model().config
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return False
        past = self.past(cache)
        return bool(past) and (mask is None or (mask.shape == (1, past + 1) and bool(mask.all()))) and (
            place is None or int(place[0, -1]) == past)

    def past(self, cache: Any) -> int:
        """The number of tokens in a cache that a step can append to, else 0."""
        return length(cache, len(self.layers), self.kv_heads, self.head_dim, self.type)

    def output(self, ids: torch.Tensor, cache: Any) -> Any:
        """What the model's forward returns."""
        return self.kind(logits=self.step(ids, cache), past_key_values=cache)

    def step(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """The logits (1, 1, V) of the token ids (1, 1); its keys and values are appended to the cache."""
        with self.lock:
            return self._step(ids, cache)

    def _step(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """`step`, alone."""
        x = self.embed(ids).contiguous()
        buffers = self.caches.get(cache)
        if buffers is None or not buffers.shown_by(cache):
            self.caches[cache] = buffers = Buffers(cache)
        if buffers.length == buffers.capacity:
            buffers.grow()
        self.reach(buffers.capacity)
        if self.filled != (weakref.ref(buffers), buffers.capacity):
            for block, keys, values in zip(self.blocks, buffers.keys, buffers.values, strict=True):
                block.keys, block.cached = keys.data_ptr(), values.data_ptr()
            self.filled = weakref.ref(buffers), buffers.capacity
        self.struct.threads = library.threads()
        logits = x.new_empty(1, 1, self.struct.head.N)
        step.run(self.struct, x, buffers.length, buffers.capacity, logits)
        buffers.show(cache, buffers.length + 1)
        self.tokens += 1
        return logits

    def reach(self, positions: int) -> None:
        """Compute the rotary tables up to this many positions, as the model does: rounded to its dtype."""
        if positions > self.positions:
            like = torch.empty(1, 1, dtype=self.type)
            self.tables = [t[0].float().contiguous() for t in self.rotary(like, torch.arange(positions)[None])]
            self.struct.cosines, self.struct.sines = (t.data_ptr() for t in self.tables)
            self.positions = positions

    @torch.no_grad()
    def check_agreement(self) -> None:
        """Raise Refused if the model itself says something else of a few random tokens."""
        model = self.model()
        ids = torch.randint(self.struct.head.N, (1, 8), generator=torch.Generator().manual_seed(0))
        out = model(input_ids=ids[:, :4], use_cache=True)
        theirs, ours, self.kind = out.past_key_values, copy.deepcopy(out.past_key_values), type(out)
        if not self.past(ours):
            raise Refused("its cache is not transformers' plain one (sliding windows)")
        weights = [w for b in self.blocks for w in (*b.qkv, b.o, *b.gate_up, b.down)]
        most = AGREE_ROUNDED if any(1 < w.form < 32 for w in weights) else AGREE[self.type]
        for t in range(4, 8):
            want = model(input_ids=ids[:, t : t + 1], past_key_values=theirs, use_cache=True).logits.double()
            error = reference.relative_error(self.step(ids[:, t : t + 1], ours), want)
            if not error <= most:
                raise Refused(f"its own forward pass says something else (relative error {error:.2g})")


_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def signature(model: nn.Module) -> tuple[list[tuple[int, int]], list[int]]:
    """([(id, number of forward hooks) of each module], [address of each parameter and buffer]) of a model.

    transformers' own hooks, which record hidden states where they are asked for, do not count.
    """
    modules = [(id(m), sum(not getattr(getattr(hook, "func", hook), "__module__", "").startswith("transformers")
                           for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks.values()))
               for m in model.modules()]
    return modules, [t.data_ptr() for tensors in (model.parameters(), model.buffers()) for t in tensors]
