"""Origin: where each tensor of a smaller model comes from in the larger one, and whether its values are as they were.

    original  bit for bit what the larger model holds at the rows and columns that are left
    refit     new values from the calibration statistics: refitted, folded, pruned
    trained   a healing method may have trained it
    added     a bias that the larger model does not have
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import models
from ..models import groups
from . import mixture
from .slices import sliced_state

STATES = ("original", "refit", "trained", "added")


def describe(dense: nn.Module, made: nn.Module, keep: Sequence[int], units: Mapping[str, torch.Tensor],
             trained: bool) -> dict[str, Any]:
    """What the manifest says: {"blocks", "units", "tensors": {name: {"from", "state"}}}, plain values.

    dense: the larger model as it was. keep, units: see slices.Report. trained: whether a healing method ran.
    """
    path, _ = models.blocks(dense)
    was, there, known = sliced_state(dense, made, list(keep), dict(units)), made.state_dict(), dense.state_dict()
    tensors = {}
    for name, t in there.items():
        source = name_before(name, path, keep)
        if source not in known:
            tensors[name] = {"from": None, "state": "added"}
            continue
        same = t.shape == was[name].shape and t.dtype == was[name].dtype and torch.equal(t, was[name])
        tensors[name] = {"from": source, "state": "original" if same else "trained" if trained else "refit"}
    return {"blocks": list(keep), "units": {name: spans(kept) for name, kept in units.items()}, "tensors": tensors}


def name_before(name: str, path: str, keep: Sequence[int]) -> str:
    """The name in the larger model of a tensor of the smaller one. path: of the list of blocks."""
    if not name.startswith(f"{path}."):
        return name
    number, dot, rest = name.removeprefix(f"{path}.").partition(".")
    return f"{path}.{keep[int(number)]}{dot}{rest}" if number.isdecimal() and int(number) < len(keep) else name


def spans(numbers: torch.Tensor) -> str:
    """Increasing numbers as text: "0-4,7,9-11"."""
    runs: list[list[int]] = []
    for n in numbers.tolist():
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def numbers(text: str) -> torch.Tensor:
    """The numbers that `spans` wrote. Raises ValueError for any other text."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        found += range(int(first), int(last if dash else first) + 1)
    if sorted(set(found)) != found:
        raise ValueError(f"{text[:60]}: not increasing numbers")
    return torch.tensor(found, dtype=torch.long)


def faults(dense: nn.Module, made: nn.Module, said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """[(tensor, what is wrong)] of a smaller model against the larger one it was made from and what `describe` gave.

    Every tensor must have the shape that its units leave; those called original must be so, bit for bit.
    """
    units = {name: numbers(text) for name, text in said["units"].items()}
    was, there, found = sliced_state(dense, made, said["blocks"], units), made.state_dict(), []
    for name, t in there.items():
        entry = said["tensors"].get(name)
        if entry is None:
            found.append((name, "has no origin in the manifest"))
        elif entry["state"] == "added":
            continue
        elif name not in was:
            found.append((name, f"comes from {entry['from']}, which the larger model does not have"))
        elif was[name].shape != t.shape:
            found.append((name, f"is {tuple(t.shape)}, its units leave {tuple(was[name].shape)}"))
        elif entry["state"] == "original" and not torch.equal(was[name], t):
            found.append((name, f"is recorded as original, but differs in {int((was[name] != t).sum())} values"))
    return found + [(name, "has an origin in the manifest, but is not in the model")
                    for name in said["tensors"] if name not in there]


def shape_faults(made: nn.Module, said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """[(tensor, what is wrong)] as far as that shows without the larger model: names, numbers of blocks and units."""
    path, block_list = models.blocks(made)
    found = []
    if len(block_list) != len(said["blocks"]):
        found.append((path, f"{len(block_list)} blocks, {len(said['blocks'])} are recorded"))
    for name in made.state_dict().keys() ^ said["tensors"].keys():
        found.append((name, "is only in the model or only among the recorded origins"))
    weights = {w.name: w for w in models.all_weights(made)}
    places = {number: place for place, number in enumerate(said["blocks"])}
    for name, text in said["units"].items():
        here_name = mixture.now(name, said["units"], numbers).partition(" (")[0]
        number, _, rest = here_name.removeprefix(f"{path}.").partition(".")
        full, count = f"{path}.{places.get(int(number))}.{rest}", len(numbers(text))
        here = weights.get(full)
        if name.endswith(f" ({groups.WHOLE})"):
            there = sum(w.startswith(f"{full}.down_proj.") for w in weights)
            found += [] if there == count else [(name, f"{count} experts recorded, there are {there}")]
            continue
        if count == 0 and here is None:
            continue  # the whole part is gone
        if here is None or not count or here.shape[1] % count:
            found.append((name, f"{count} units recorded, its columns are {here.shape[1] if here else 'not there'}"))
    for name, entry in said["tensors"].items():
        if entry["state"] not in STATES or (entry["from"] != name_before(name, path, said["blocks"])
                                            and entry["state"] != "added"):
            found.append((name, f"its origin {entry['from']} ({entry['state']}) cannot be"))
    return found
