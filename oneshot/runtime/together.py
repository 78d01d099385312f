"""Together: what rank 0 lets the other processes of torchrun do. It runs the command; the others wait until it asks.

    hold      rank 0 names the model it works on; the others load it too
    run       one function in all processes at once, each on its own copy of that model
    beside    one function in all processes but rank 0, which does its own part of it
    lead      rank 0 does the command, the others follow until it is done

In a process that was started alone `run` is a call, and the others do nothing.
"""

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import distributed
from .inputs import one_line

_held: list[weakref.ref] = []  # in rank 0: the model that the others hold too


def lead(work: Callable[[], int]) -> int:
    """Let rank 0 do `work`, and the others follow; returns the exit code. torchrun ends the others if rank 0 failed."""
    if distributed.rank():
        return follow()
    code = 1
    try:
        code = work()
    except SystemExit as asked:  # --help
        code = asked.code or 0
        raise
    finally:
        if not code and distributed.world() > 1:
            with contextlib.suppress(distributed.Lost):
                distributed.share(None)
            distributed.end()
    return code


def follow() -> int:
    """What all processes but rank 0 do; returns the exit code. What went wrong, rank 0 says."""
    model = None
    try:
        distributed.start()
        while job := distributed.share(None):
            kind, work, args = job
            if kind == "hold":
                model = None  # frees the former one
                model = work(*args)
            elif kind == "beside":
                work(*args)
            else:
                with _together(model):
                    work(model, *args)
    except KeyboardInterrupt:
        return 130
    except distributed.Lost:
        return 1
    except Exception as error:
        distributed.blame(f"process {distributed.rank()}: {one_line(error)}; {distributed.RESUMES}")
        if not isinstance(error, ValueError | OSError):
            raise
        return 2
    distributed.end()
    return 0


def hold(model: nn.Module, load: Callable[..., nn.Module], *args: Any) -> None:
    """Let the others load the model that rank 0 holds: `load(*args)`, a function of a module and plain values."""
    if distributed.world() > 1:
        distributed.share(("hold", load, args))
        _held[:] = [weakref.ref(model)]


def release() -> None:
    """From now on rank 0 works alone on its model, which becomes another one than the others hold."""
    _held.clear()


def beside(work: Callable[..., Any], *args: Any) -> None:
    """Let the others call `work(*args)`, a function of a module, while rank 0 goes on."""
    if distributed.world() > 1:
        distributed.share(("beside", work, args))


def run(work: Callable[..., Any], model: nn.Module, *args: Any, **mine: Any) -> Any:
    """`work(model, *args)` in all processes at once, in rank 0 with `mine` as well; returns rank 0's result.

    Where the others do not hold this model, rank 0 works alone.
    """
    with joint(work, model, *args):
        return work(model, *args, **mine)


@contextlib.contextmanager
def joint(work: Callable[..., Any], model: nn.Module, *args: Any) -> Iterator[None]:
    """Within the context, the others do `work(model, *args)`, and rank 0 must do the same."""
    if distributed.ranks() > 1 or not _held or _held[0]() is not model:
        yield
        return
    distributed.share(("together", work, args))
    with _together(model):
        yield


@contextlib.contextmanager
def _together(model: nn.Module) -> Iterator[None]:
    """Within the context, all processes work together, on the same weights."""
    with distributed.joined():
        same_weights(model)
        yield


def same_weights(model: nn.Module) -> None:
    """Give all processes rank 0's parameters and buffers, those that differ: rank 0 may have changed some alone.

    What is on the meta device in any process has its turn when `walk` reads it (models/offload.py).

    Raises ValueError where another model was loaded.
    """
    own = {name: t for part in (model.named_parameters(), model.named_buffers()) for name, t in part}
    away = set().union(*distributed.gathered([name for name, t in own.items() if t.is_meta]))
    told = distributed.first({name: (tuple(t.shape), t.dtype, None if name in away else _digest(t))
                              for name, t in own.items()})
    if own.keys() - told.keys() or any((tuple(t.shape), t.dtype) != told[name][:2] for name, t in own.items()):
        raise ValueError("torchrun: --model is another one on this machine than on that of process 0")
    other = [name for name in told if distributed.rank() and name not in away and (
        name not in own or _digest(own[name]) != told[name][2])]
    for name in [name for name in told if name in set().union(*distributed.gathered(other))]:
        if name not in own:  # a bias that was added
            owner, _, last = name.rpartition(".")
            own[name] = nn.Parameter(torch.empty(told[name][0], dtype=told[name][1]), requires_grad=False)
            setattr(model.get_submodule(owner), last, own[name])
        distributed.give(own[name].data, 0)


def _digest(t: torch.Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(distributed.bytes_of(t.detach().cpu()).numpy()).hexdigest()
