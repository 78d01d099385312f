"""Kept blocks: a finished transformer block in a safetensors file whose header proves it.

    run_id, number   which run's, which block
    rows             its rows of the record, JSON
    computed_with    what its bits depend on beside the settings: threads, device, versions, calibration text; JSON
    format           "pt" where tensors have the names of the checkpoint, so that the file is a shard of it (shards.py)
    before           the seal of the block before it, "" for the first: it was pruned on what that block gives
    seal             sha256 of all these and of every tensor's name, dtype, shape and bytes
"""

import hashlib
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..runtime.inputs import reason

State = dict[str, torch.Tensor]


class Damaged(ValueError):
    """A kept block cannot be used; the text says why."""


def name_of(number: int) -> str:
    """The file name of a kept block."""
    return f"block_{number:05d}.safetensors"


def header(run_id: str, number: int, state: State, rows: dict, computed_with: dict, before: str,
           shard: bool = False) -> dict[str, str]:
    """What the header of a kept block says, as safetensors takes it. shard: whether it is one of the checkpoint."""
    entries = {"run_id": run_id, "number": str(number), "rows": json.dumps(rows),
               "computed_with": json.dumps(computed_with), "before": before} | ({"format": "pt"} if shard else {})
    return entries | {"seal": seal(entries, state)}


def seal(entries: dict[str, str], state: State) -> str:
    """sha256 of a header's entries and of all tensors."""
    digest = hashlib.sha256(json.dumps(sorted(entries.items())).encode())
    for name in sorted(state):
        t = state[name].contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read(file: Path, run_id: str, number: int, before: str, shard: bool = False) -> tuple[State, dict, dict, str]:
    """(state dict, rows, what it was computed with, seal) of a kept block.

    before: the seal of the block before it. shard: whether it has to be one of the checkpoint. Raises Damaged for a
    file that is not exactly this block as it was kept.
    """
    try:
        with safe_open(file, "pt") as f:
            entries = dict(f.metadata() or {})
            state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"cannot be read ({reason(error)})") from None
    found = entries.pop("seal", None)
    if found is None:
        raise Damaged("has no hash (an older oneshot wrote it)")
    if found != seal(entries, state):
        raise Damaged("does not have the bytes that were saved")
    if entries["run_id"] != run_id:
        raise Damaged(f"is another run's ({entries['run_id']})")
    if entries["number"] != str(number):
        raise Damaged(f"is block {entries['number']}")
    if ("format" in entries) != shard:
        raise Damaged(f"was saved {'without' if shard else 'with'} --offload disk")
    if entries["before"] != before:
        raise Damaged("follows another block than the one before it")
    return state, json.loads(entries["rows"]), json.loads(entries["computed_with"]), found


def of_blocks(used: Iterable[dict], now: dict) -> list[str]:
    """One line for each stretch of kept blocks that was computed with something else than `now`.

    used: what each block was computed with, from block 0 on.
    """
    lines, first = [], 0
    for then, stretch in groupby(used):
        last = first + len(list(stretch)) - 1
        lines += other_circumstances(f"block {first} was" if first == last else f"blocks {first} to {last} were",
                                     then, now)
        first = last + 1
    return lines


def other_circumstances(what: str, then: dict, now: dict) -> list[str]:
    """One line that says with what else something was computed; none where nothing differs."""
    other = [f"{key} {then.get(key)} (now {now.get(key)})" for key in sorted({*then, *now})
             if then.get(key) != now.get(key)]
    return [f"resumed: {what} computed with {', '.join(other)}; the result need not be bit-identical to that of an "
            "uninterrupted run"] if other else []
