"""Activations: capture the arguments each block of a model is called with, then run the blocks one at a time.

Blocks take different arguments (sliding-window masks, local and global rotary tables, alibi), and these change with
every release of transformers. So no argument is reconstructed here. Instead the model runs once with a stub in place of
every block; a stub records its (args, kwargs) and returns its input. Only the embeddings compute anything in that run.

    batch    windows that run together; masks and rotary tables have the batch's shape, so the batches stay the same
    hidden   one batch's input to the current block, (B, T, H)
    rows     bool (B·T,), False at padding; None if there is no padding
    held     whether a batch's windows are held out from training (heal); no batch mixes both kinds
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .. import models
from .batches import batches, own


@dataclass(frozen=True)
class Wait:
    """The device and dtype in which hidden states are kept between blocks; None: the device and dtype of computing."""

    place: str | torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass
class Activations:
    """The hidden states of all batches at one block, with everything needed to run the remaining blocks on them.

    device: where blocks run. place, dtype: where and in which dtype hidden states are kept between blocks (dtype None:
    as computed). returns: what blocks return, see `returned`. calls[block][batch]: (args, kwargs), with HIDDEN in
    place of the hidden state. inputs: the model's own arguments, one dict per batch. hidden, rows, held: one entry per
    batch, see above.
    """

    device: torch.device
    place: torch.device
    dtype: torch.dtype | None
    returns: int | None
    calls: list[list[tuple]]
    inputs: list[dict[str, torch.Tensor]] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor | None] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    scales: list[torch.Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.hidden)

    def fork(self) -> "Activations":
        """An independent copy at the same block, such as the dense model's activations next to the pruned model's.

        State that blocks pass to later blocks besides the hidden state (the shared keys and values of Gemma 3n and 4)
        is copied as well.
        """
        stores = {}

        def own(x: Any) -> Any:
            return stores.setdefault(id(x), copy.copy(x)) if isinstance(x, MutableMapping) else x
        return replace(self, hidden=list(self.hidden), calls=[[tree_map(own, call) for call in calls]
                                                              for calls in self.calls])

    def put(self, i: int, hidden: torch.Tensor) -> None:
        """Store batch i's hidden state (B, T, H) on `place` in `dtype`."""
        self.hidden[i] = hidden.to(self.place, self.dtype or hidden.dtype)


HIDDEN = object()


class Stub(nn.Module):
    """Takes the place of a block: calls `record(args, kwargs)`, then returns `out`, or its input if `out` is None."""

    def __init__(self, real: nn.Module, record: Callable[[tuple, dict], None] | None, out: torch.Tensor | None = None,
                 returns: int | None = None) -> None:
        super().__init__()
        self.__dict__.update(real=real, record=record, out=out, returns=returns)

    def __getattr__(self, name: str) -> Any:  # models read attributes of their layers, such as attention_type
        return getattr(self.__dict__["real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """See the class."""
        if self.record:
            self.record(args, kwargs)
        out = self.out if self.out is not None else args[0] if args else kwargs["hidden_states"]
        return out if self.returns is None else (out, *[None] * (self.returns - 1))


@contextlib.contextmanager
def stubbed(block_list: nn.ModuleList, stubs: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, the model has `stubs` in place of its blocks."""
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
    """The model's Activations at its first block: block 0's inputs and the recorded calls of every block.

    ids: int64 (n, T). mask: bool (n, T), False at padding, or None. held_out: numbers of the held-out windows. device:
    where blocks run. wait: how hidden states are kept between blocks (default: on the device, as computed).

    Raises ValueError naming `--model` for a model that cannot be run block by block.
    """
    _, block_list = models.blocks(model)
    inner, device, wait = models.decoder(model), torch.device(device), wait or Wait()
    activations = Activations(device, torch.device(wait.place or device), wait.dtype,
                              returned(model, ids, device), [[] for _ in block_list])
    intern, first = _Intern(), []

    def record(b: int, args: tuple, kwargs: dict) -> None:
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
            raise ValueError("it does more between its blocks than pass their outputs on")
        activations.calls[b].append(tree_map(intern, (args, kwargs)))

    stubs = [Stub(block, functools.partial(record, b), returns=activations.returns)
             for b, block in enumerate(block_list)]
    with models.resident(model, device, models.rest_of(inner, block_list)), stubbed(block_list, stubs):
        for windows, held in own(batches(len(ids), batch_size, held_out)):
            intern.start()
            inputs = {"input_ids": ids[windows].to(device)}
            if mask is not None:
                inputs["attention_mask"] = mask[windows].long().to(device)
            with models.own_code(cannot(model), ()):  # also when blocks should return more than one tensor
                inner(**inputs, use_cache=False)
            activations.inputs.append(inputs)
            activations.held.append(held)
            padded = mask is not None and not bool(mask[windows].all())
            activations.rows.append(inputs["attention_mask"].reshape(-1).bool() if padded else None)
    return activations


def cannot(module: nn.Module) -> str:
    """The start of the message for a model, or a block, whose own code fails."""
    how = " with --compute stored" if getattr(module, "as_stored", False) else ""
    return f"--model: {type(module).__name__} cannot be run block by block{how}"


@torch.no_grad()
def returned(model: nn.Module, ids: torch.Tensor, device: torch.device) -> int | None:
    """What the model's blocks return: None: a tensor; n: n values, of which all but the first are None (Bamba: 2).

    1 also if the others are not None (Bloom, Falcon; GPT-1: a list): where the model takes them, `capture` refuses it.
    Found by running block 0 on two tokens of ids (n, T).
    """
    _, block_list = models.blocks(model)
    inner, first, answer = models.decoder(model), block_list[0], []

    def ask(args: tuple, kwargs: dict) -> None:
        answer.append(first(*args, **kwargs))
        raise _Enough

    for _ in models.walk(model, device, end=1):
        with models.own_code(cannot(model), ()), models.resident(model, device, models.rest_of(inner, block_list)), \
                contextlib.suppress(_Enough), stubbed(block_list, [Stub(first, ask), *block_list[1:]]):
            inner(input_ids=ids[:1, :2].to(device), use_cache=False)
    if not answer:
        raise ValueError(f"{cannot(model)}: it does not call its first block")
    out = answer[0]
    if not isinstance(out, (tuple, list)):
        return None
    return len(out) if all(value is None for value in out[1:]) else 1


class _Enough(Exception):
    """Ends a forward pass once the first block has been reached."""


class _Intern:
    """Keeps one copy of equal tensors, because masks and rotary tables repeat over blocks and batches."""

    def __init__(self) -> None:
        self.known: dict[tuple, list[torch.Tensor]] = {}
        self.this_batch: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def start(self) -> None:
        """Begin a new batch."""
        self.this_batch = {}

    def __call__(self, t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        if id(t) not in self.this_batch:  # the value keeps t alive, so its id cannot be reused
            same = self.known.setdefault((t.shape, t.dtype), [])
            kept = next((k for k in same[-4:] if torch.equal(k, t)), None)
            if kept is None:
                kept = t
                same.append(t)
            self.this_batch[id(t)] = (t, kept)
        return self.this_batch[id(t)][1]


def tree_map(f: Callable[[Any], Any], tree: Any) -> Any:
    """`tree`, nested tuples, lists and dicts, with f applied to its leaves."""
    if isinstance(tree, dict):
        return {k: tree_map(f, v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(f, v) for v in tree)
    return f(tree)


def forward(block: nn.Module, activations: Activations, b: int, i: int) -> torch.Tensor:
    """Block b's output (B, T, H) on batch i. The block must be resident on the activations' device."""
    like = next((p for p in block.parameters() if p.is_floating_point()), None)
    hidden = activations.hidden[i].to(activations.device, like.dtype if like is not None else None)

    def bring(t: Any) -> Any:
        if t is HIDDEN or not isinstance(t, torch.Tensor):
            return hidden if t is HIDDEN else t
        half = t.is_floating_point() and t.element_size() < 4
        upcast = half and like is not None and like.dtype == torch.float32  # healing trains 16-bit models in float32
        return t.to(activations.device, torch.float32 if upcast else t.dtype)

    args, kwargs = tree_map(bring, activations.calls[b][i])
    with models.own_code(cannot(block)):
        out = block(*args, **kwargs)
    return out[0] if isinstance(out, (tuple, list)) else out


@torch.no_grad()
def replay(block: nn.Module, activations: Activations, b: int) -> torch.Tensor | None:
    """Run every batch through block b, so that the activations become the next block's inputs.

    Returns the first batch's output (B, T, H); None without batches.
    """
    first = None
    for i in range(len(activations)):
        out = forward(block, activations, b, i)
        first = out if first is None else first
        activations.put(i, out)
    return first
