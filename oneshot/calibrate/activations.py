"""Activations: capture what each block of a model is called with, replay blocks one at a time.

Layers differ in how they are called (sliding-window masks, local and global rotary tables, alibi), and the arguments
change with every release of transformers. So nothing is rebuilt here: the model runs once with a stub in place of every
block; each stub keeps its (args, kwargs) verbatim and hands its input on. Only the embeddings compute anything.

    batch    some samples that run together; masks and tables have the batch's shape, so a replay keeps the batches
    hidden   one batch's input to the current block, (B, T, H)
    rows     bool (B·T,), False at padding; None where there is none
    held     whether a batch's windows are kept from training (heal); no batch holds both kinds
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .. import models


@dataclass(frozen=True)
class Wait:
    """Where and as what hidden states wait between blocks; None: on the device, as computed."""

    place: str | torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass
class Activations:
    """All batches on their way through the blocks.

    hidden, rows, held: one a batch (see above). calls[block][batch]: (args, kwargs) with HIDDEN where the batch's
    hidden state goes. inputs: the model's own arguments, one dict a batch. device: where blocks run. place, dtype:
    where and as what hidden states wait.
    """

    device: torch.device
    place: torch.device
    dtype: torch.dtype | None
    returns_tuple: bool
    calls: list[list[tuple]]
    inputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor | None] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.hidden)

    def fork(self) -> "Activations":
        """The same batches at the same block, to go on by themselves: the dense model's beside the pruned one's.

        What blocks hand to later blocks beside the hidden state (Gemma 3n's and 4's shared keys and values) forks too.
        """
        stores = {}

        def own(x):
            return stores.setdefault(id(x), copy.copy(x)) if isinstance(x, MutableMapping) else x
        return replace(self, hidden=list(self.hidden), calls=[[tree_map(own, call) for call in calls]
                                                              for calls in self.calls])

    def put(self, i: int, hidden: torch.Tensor) -> None:
        """Put batch i's hidden state away, where and as the user wants activations kept."""
        self.hidden[i] = hidden.to(self.place, self.dtype or hidden.dtype)


HIDDEN = object()


class _Stub(nn.Module):
    """Stands where a block stood: shows its call to `record(args, kwargs)`, returns `out` or else its input."""

    def __init__(self, real, record, out=None, returns_tuple=False):
        super().__init__()
        self.__dict__.update(real=real, record=record, out=out, returns_tuple=returns_tuple)

    def __getattr__(self, name):  # models read attributes such as attention_type off their layers
        return getattr(self.__dict__["real"], name)

    def forward(self, *args, **kwargs):
        if self.record:
            self.record(args, kwargs)
        out = self.out if self.out is not None else args[0] if args else kwargs["hidden_states"]
        return (out,) if self.returns_tuple else out


@contextlib.contextmanager
def stubbed(block_list, stubs):
    """The model with `stubs` in place of its blocks."""
    real = list(block_list)
    try:
        for i, stub in enumerate(stubs):
            block_list[i] = stub
        yield
    finally:
        for i, block in enumerate(real):
            block_list[i] = block


@torch.no_grad()
def capture(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, *, batch_size: int,
            held_out: Sequence[int] = (), device: str | torch.device = "cpu", wait: Wait | None = None) -> Activations:
    """The model's Activations on ids int64 (n, T), mask bool (n, T) or None: block 0's inputs, and every block's call.

    held_out: numbers of the windows whose batches are marked so. wait: where and as what hidden states wait between
    blocks (default: on the device, as computed).
    """
    _, block_list = models.blocks(model)
    inner, device, wait = models.decoder(model), torch.device(device), wait or Wait()
    activations = Activations(device, torch.device(wait.place or device), wait.dtype,
                              returns_tuple(model, ids, device), [[] for _ in block_list])
    intern, first = _Intern(), []

    def record(b, args, kwargs):
        if args:
            hidden, args = args[0], (HIDDEN, *args[1:])
        else:
            hidden, kwargs = kwargs["hidden_states"], {**kwargs, "hidden_states": HIDDEN}
        if b == 0:
            activations.hidden.append(None)
            activations.put(-1, hidden)
            first[:] = [hidden]
        again = len(activations.calls[b]) > len(activations.inputs)
        if again or (hidden is not first[0] and not torch.equal(hidden, first[0])):
            raise ValueError("it does more between its blocks than hand on what they return")
        activations.calls[b].append(tree_map(intern, (args, kwargs)))

    stubs = [_Stub(block, functools.partial(record, b), returns_tuple=activations.returns_tuple)
             for b, block in enumerate(block_list)]
    with models.resident(models.rest_of(inner, block_list), device), stubbed(block_list, stubs):
        for windows, held in batches(len(ids), batch_size, held_out):
            intern.start()
            inputs = {"input_ids": ids[windows].to(device)}
            if mask is not None:
                inputs["attention_mask"] = mask[windows].long().to(device)
            try:
                inner(**inputs, use_cache=False)
            except (TypeError, ValueError) as error:  # also when blocks should return more than one tensor
                kind = type(model).__name__
                raise ValueError(f"--model: {kind} cannot be run block by block: {error}") from error
            activations.inputs.append(inputs)
            activations.held.append(held)
            padded = mask is not None and not bool(mask[windows].all())
            activations.rows.append(inputs["attention_mask"].reshape(-1).bool() if padded else None)
    return activations


def batches(n: int, size: int, held_out: Sequence[int] = ()) -> list[tuple[torch.Tensor, bool]]:
    """[(window numbers, whether they are held out)]: n windows in order, at most `size` a batch.

    Those held out come behind the others, in batches of their own. Both are then dealt out evenly: a small last batch
    would give its windows more weight than others have.
    """
    if not len(held_out):
        return [(part, False) for part in torch.arange(n).split(size)]
    held = torch.zeros(n, dtype=torch.bool)
    held[list(held_out)] = True
    return [(part, kind) for kind in (False, True) if (windows := (held == kind).nonzero()[:, 0]).numel()
            for part in windows.tensor_split(-(-len(windows) // size))]


@torch.no_grad()
def returns_tuple(model, ids, device):
    """Whether the model's blocks return a tuple (Bloom, Falcon; GPT-1: a list) or a tensor.

    Block 0 is asked, on two tokens.
    """
    _, block_list = models.blocks(model)
    inner, first, answer = models.decoder(model), block_list[0], []

    def ask(args, kwargs):
        with models.resident(models.tensors_of(first), device):
            answer.append(isinstance(first(*args, **kwargs), (tuple, list)))
        raise _Enough

    with models.resident(models.rest_of(inner, block_list), device), contextlib.suppress(_Enough), \
            stubbed(block_list, [_Stub(first, ask), *block_list[1:]]):
        inner(input_ids=ids[:1, :2].to(device), use_cache=False)
    return answer[0]


class _Enough(Exception):
    """The first block was reached."""


class _Intern:
    """Keeps one copy of equal tensors: masks and rotary tables repeat over blocks and batches."""

    def __init__(self):
        self.known, self.this_batch = {}, {}

    def start(self):
        self.this_batch = {}

    def __call__(self, t):
        if not isinstance(t, torch.Tensor):
            return t
        if id(t) not in self.this_batch:  # the value holds t, so its id stays taken
            same = self.known.setdefault((t.shape, t.dtype), [])
            kept = next((k for k in same[-4:] if torch.equal(k, t)), None)
            if kept is None:
                kept = t
                same.append(t)
            self.this_batch[id(t)] = (t, kept)
        return self.this_batch[id(t)][1]


def tree_map(f, tree):
    """`tree` with f applied to what is neither tuple, list nor dict."""
    if isinstance(tree, dict):
        return {k: tree_map(f, v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(f, v) for v in tree)
    return f(tree)


def forward(block: nn.Module, activations: Activations, b: int, i: int) -> torch.Tensor:
    """Block b's output on batch i, on the activations' device; the block must be resident there."""
    like = next((p for p in block.parameters() if p.is_floating_point()), None)
    hidden = activations.hidden[i].to(activations.device, like.dtype if like is not None else None)

    def bring(t):
        if t is HIDDEN or not isinstance(t, torch.Tensor):
            return hidden if t is HIDDEN else t
        half = t.is_floating_point() and t.element_size() < 4
        upcast = half and like is not None and like.dtype == torch.float32  # healing trains 16-bit models in float32
        return t.to(activations.device, torch.float32 if upcast else t.dtype)

    args, kwargs = tree_map(bring, activations.calls[b][i])
    out = block(*args, **kwargs)
    return out[0] if isinstance(out, (tuple, list)) else out


@torch.no_grad()
def replay(block: nn.Module, activations: Activations, b: int) -> torch.Tensor | None:
    """Move every batch through block b: the activations are then the next block's inputs. Returns the first output."""
    first = None
    for i in range(len(activations)):
        out = forward(block, activations, b, i)
        first = out if first is None else first
        activations.put(i, out)
    return first


def logits(model: nn.Module, activations: Activations, i: int, *,
           elements: int = 2**26) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The model's logits on batch i of activations that have passed all blocks: yields (positions (P,), (B, P, V)).

    On as many positions at a time as give at most `elements` logits, so that a large vocabulary never fills the memory.
    The model's rest must be resident on the activations' device.
    """
    B, T = activations.inputs[i]["input_ids"].shape
    step = max(1, elements // (B * models.config_of(model).vocab_size)) if slices_logits(model) else T
    for positions in torch.arange(T, device=activations.device).split(step):
        with torch.no_grad():
            yield positions, tail(model, activations, i, positions)


def tail(model: nn.Module, activations: Activations, i: int, positions: torch.Tensor) -> torch.Tensor:
    """(B, P, V) logits at `positions` (P,) of batch i by the model's own code behind its blocks."""
    _, block_list = models.blocks(model)
    hidden = activations.hidden[i].to(activations.device, model.get_input_embeddings().weight.dtype)
    with stubbed(block_list, [_Stub(block, None, hidden, activations.returns_tuple) for block in block_list]):
        return model(**activations.inputs[i], use_cache=False, **logits_to_keep(model, positions)).logits


def slices_logits(model: nn.Module) -> bool:
    """Whether the model can give the logits of some positions only (all but a handful can)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def logits_to_keep(model, positions):
    """What to call the model with for the logits at `positions`."""
    return {"logits_to_keep": positions} if slices_logits(model) else {}
