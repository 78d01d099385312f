"""Distributed: several processes started by torchrun. Rank 0 runs the command; the others wait until it needs them.

Rank 0 hands a job to all by `share`; the others do their part of it together with rank 0, and wait for the next, until
rank 0 has `ended`. All functions do nothing in a process that was started alone.
"""

import datetime
import os
from typing import Any

import torch.distributed as dist

PATIENCE = datetime.timedelta(days=7)  # rank 0 prunes and measures while the others wait; torchrun ends all if one dies
_control: list = []  # the group in which plain objects are sent


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def device(name: str) -> str:
    """The device of this process: with "cuda", one GPU for each."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if world() > 1 and name == "cuda" else name


def start() -> None:
    """Join the other processes."""
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo", timeout=PATIENCE)
        _control.append(dist.new_group(backend="gloo", timeout=PATIENCE))


def share(value: Any) -> Any:
    """Rank 0's value, in every process."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control[0])
    return box[0]


def wait() -> None:
    """Return when all processes are here."""
    if world() > 1:
        dist.barrier(group=_control[0])


def ended(code: int) -> int:
    """Rank 0's exit code, after it has told the others that nothing more will come; torchrun ends them if it failed."""
    if not code:
        share(None)
        end()
    return code


def end() -> None:
    """Leave the other processes."""
    if world() > 1 and dist.is_initialized():
        dist.destroy_process_group()
        _control.clear()
