"""Distributed: several processes started by torchrun, and how what each of them finds is put together.

Within `together.run`, each process runs its `part` of the windows, and what all find is put together by `add`,
`reduce`, `give`, `gathered`, `first`, `brought`. Outside of it, and in a process that was started alone, each of these
gives what the one process has: whoever calls them need not know how many there are.

A process that dies closes its connections: the others see that at once, and one that no longer answers after LIMIT.
"""

import contextlib
import copyreg
import datetime
import importlib
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from .command import SHARED
from .inputs import one_line

PATIENCE = datetime.timedelta(days=7)  # rank 0 prunes and measures while the others wait; torchrun ends all if one dies
JOIN = datetime.timedelta(minutes=10)  # until all have started
LIMIT = datetime.timedelta(hours=6)  # within `together.run`: the longest that others wait for what one solves
RESUMES = "the same command resumes after the last finished block"
_groups: dict[str, Any] = {}  # "control": plain objects between jobs; "work": within `together.run`
_store: list[dist.Store] = []  # where a process that fails leaves why
_joined: list[bool] = []  # not empty within `together.run`

copyreg.pickle(ModuleType, lambda module: (importlib.import_module, (module.__name__,)))  # a solver travels by its name


class Lost(OSError):
    """Another process has ended or does not answer."""


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def ranks() -> int:
    """The number of processes that do the present work together; 1 outside of `together.run`."""
    return world() if _joined else 1


def device(name: str) -> str:
    """The device of this process: with "cuda", one GPU for each."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if world() > 1 and name == "cuda" else name


def check() -> None:
    """Raise ValueError where several processes were started, but not by a command that shares its work among them."""
    if world() > 1 and not _groups:
        raise ValueError(f"torchrun: shares the work of oneshot {', '.join(SHARED[:-1])} and {SHARED[-1]} only; start "
                         "this without it")


# ---------------------------------------------------------------- the processes

def start() -> None:
    """Join the other processes."""
    if world() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _answering():
        store, own, size = next(rendezvous("env://", timeout=JOIN))
        dist.init_process_group("cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo", store=store, rank=own,
                                world_size=size, timeout=PATIENCE)
        _groups["control"] = dist.new_group(backend="gloo", timeout=PATIENCE)
        _groups["work"] = dist.new_group(timeout=LIMIT)
    _store.append(dist.PrefixStore("oneshot", store))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stopped)


def _stopped(*_: Any) -> None:
    """What SIGTERM does."""
    raise Lost(f"stopped (SIGTERM), as torchrun does when another process dies; {RESUMES}")


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Within the context, a connection that breaks raises Lost, with the reason that the failed process has left."""
    try:
        yield
    except RuntimeError as error:
        told = re.sub(r"^\[\S*\] ", "", one_line(error))  # without the line of gloo's source
        why = f"another process has ended, or does not answer ({told[:100]}); {RESUMES}"
        if _store and not rank() and _store[0].check(["failed"]):  # rank 0 has the store and says it
            why = _store[0].get("failed").decode()
        raise Lost(why) from error


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Within the context, where libraries connect the processes as well, a connection that breaks raises Lost."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        with _answering():
            raise


def share(value: Any) -> Any:
    """Rank 0's value, in every process."""
    return _first(value, "control") if world() > 1 else value


def _first(value: Any, group: str) -> Any:
    """Rank 0's value, in every process of a group."""
    box = [value]
    with _answering():
        dist.broadcast_object_list(box, src=0, group=_groups[group])
    return box[0]


def wait() -> None:
    """Return when all processes are here."""
    if world() > 1:
        with _answering():
            dist.barrier(group=_groups["control"])


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the context, all processes work together; see together.py."""
    _joined.append(True)
    try:
        yield
    finally:
        _joined.pop()


def blame(why: str) -> None:
    """Leave for rank 0 why this process fails."""
    with contextlib.suppress(RuntimeError):
        _store[0].set("failed", why)


def end() -> None:
    """Leave the other processes."""
    if world() > 1 and dist.is_initialized():
        dist.destroy_process_group()
        for kept in (_groups, _store):
            kept.clear()


# ---------------------------------------------------------------- what they do together

def part(n: int) -> range:
    """Which of n things, in order, this process does."""
    size, own = ranks(), rank() if _joined else 0
    return range(own * n // size, (own + 1) * n // size)


def owners(costs: Sequence[float]) -> list[int]:
    """Which process does each of these things, so that all are busy about equally long: the costliest first, each to
    the one with the least to do."""
    load, found = [0.0] * ranks(), [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = load.index(min(load))
        load[found[i]] += costs[i]
    return found


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, uint8; the same memory if it is contiguous."""
    return t.contiguous().reshape(-1).view(torch.uint8)


def first(value: Any) -> Any:
    """Rank 0's value, in all processes."""
    return _first(value, "work") if ranks() > 1 else value


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in order."""
    if ranks() == 1:
        return [value]
    found = [None] * ranks()
    with _answering():
        dist.all_gather_object(found, value, group=_groups["work"])
    return found


def add(*tensors: torch.Tensor) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    for t in tensors if ranks() > 1 else ():
        with _answering():
            dist.all_reduce(t, group=_groups["work"])


def reduce(t: torch.Tensor, owner: int) -> None:
    """Add the tensors of all processes, in place in that of `owner`; those of the others are spoilt."""
    if ranks() > 1:
        with _answering():
            dist.reduce(t, dst=owner, group=_groups["work"])


def give(t: torch.Tensor, owner: int) -> None:
    """Overwrite the tensor, in place, by that of `owner`, to the bit."""
    if ranks() > 1 and t.numel():
        whole = t.contiguous()
        with _answering():
            dist.broadcast(bytes_of(whole), src=owner, group=_groups["work"])
        if whole is not t and owner != rank():
            t.copy_(whole)


def given(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank 0's tensors by name, on the CPU, in all processes; the others' own are not looked at."""
    if ranks() == 1:
        return tensors
    told = first({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    found = {name: torch.empty(shape, dtype=dtype) if rank() else tensors[name].contiguous()
             for name, (shape, dtype) in told.items()}
    for t in found.values():
        give(t, 0)
    return found


def brought(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of all processes, in order, in rank 0; [] in the others."""
    if ranks() == 1:
        return list(tensors)
    told = gathered([(tuple(t.shape), t.dtype) for t in tensors])
    found = list(tensors) if not rank() else []
    with _answering():
        if rank():
            for t in tensors:
                dist.send(bytes_of(t), 0, group=_groups["work"])
            return []
        like = tensors[0].device if tensors else "cpu"
        for source, shapes in list(enumerate(told))[1:]:
            for shape, dtype in shapes:
                found.append(torch.empty(shape, dtype=dtype, device=like))
                dist.recv(bytes_of(found[-1]), source, group=_groups["work"])
    return found


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes; one that no process has stays None."""
    if ranks() == 1:
        return
    parameters = list(parameters)
    there = gathered([p.grad is not None for p in parameters])
    for p, has in zip(parameters, map(any, zip(*there, strict=True)), strict=True):
        if has:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            add(p.grad)
            p.grad /= ranks()
