"""Claims: whether what a manifest says agrees with itself: patterns, groups, numbers of zeros, record, settings.

The hashes prove that the files are those that were written, not that they are what was asked for: a manifest that calls
linears 2:4 which are not could have hashes that are right.
"""

import dataclasses

from torch import nn

from ..prune import patterns, solvers
from ..prune.patterns import Dense, Pattern, Unstructured
from ..quantise import mixed
from ..structured import origin
from . import compressed, gguf, packed
from .contents import MANIFEST, Fault
from .manifest import pattern_of

SHARED = ("shape", "pattern", "group", "target_zeros", "zeros")  # stand in the record's rows and in the manifest


def check(data: dict) -> list[Fault]:
    """What does not agree in a manifest; an entry that cannot be read is a fault."""
    faults = []
    for part in (check_tensors, check_rows, check_settings, check_grid, check_format):
        try:
            faults += part(data)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            faults.append(Fault(MANIFEST, f"{part.__doc__.split(':')[0]}: cannot be read ({type(error).__name__})"))
    return faults


def check_tensors(data: dict) -> list[Fault]:
    """Its entries of linears: zeros and groups follow from pattern and shape."""
    faults = []
    for name, entry in data["tensors"].items():
        pattern = pattern_of(entry)
        target = pattern.zeros(*entry["shape"])
        if entry["target_zeros"] != target:
            faults.append(Fault(name, f"recorded to need {entry['target_zeros']} zeros, pattern {pattern} needs "
                                      f"{target}"))
        if entry["group"] != pattern.group or type(entry["group"]) is not type(pattern.group):
            faults.append(Fault(name, f"group {entry['group']}, which pattern {pattern} does not have"))
        if not target <= entry["zeros"] <= entry["shape"][0] * entry["shape"][1]:
            faults.append(Fault(name, f"{entry['zeros']} zeros recorded, pattern {pattern} needs {target}"))
    return faults


def check_rows(data: dict) -> list[Fault]:
    """Its record's rows: the same linears with the same entries."""
    rows, entries = {row["name"]: row for row in data["record"]["layers"]}, data["tensors"]
    faults = [Fault(name, "has a row in the record, but no entry") for name in rows if name not in entries]
    for name, entry in entries.items():
        other = [key for key in SHARED if name in rows and rows[name][key] != entry[key]]
        other += ["grid"] if name in rows and rows[name].get("grid") != entry.get("grid") else []
        if name not in rows or other:
            faults.append(Fault(name, f"its {', '.join(other)} differ between record and manifest" if name in rows else
                                "has no row in the record"))
    return faults


def check_settings(data: dict) -> list[Fault]:
    """Its settings: the linears have the pattern that was asked for."""
    settings, entries = data["record"]["settings"], data["tensors"]
    if settings["method"] in ("dense", "rtn"):
        return [Fault(name, f"has a pattern, though --method {settings['method']} prunes nothing") for name in entries]
    asked = asked_for(settings)
    allowed = {asked} | ({Dense()} if settings.get("keep_dense") else set())
    how = settings.get("allocate", "uniform")
    if how == "mix":
        allowed |= {Dense(), *(patterns.parse(text) for text in settings["allocation"]["mix"]["also"].split(","))}
    elif how != "uniform":
        return check_allocated(asked, entries, settings)
    return [Fault(name, f"pattern {pattern_of(entry)}{by(pattern_of(entry))}, the settings ask for {asked}{by(asked)}")
            for name, entry in entries.items() if pattern_of(entry) not in allowed]


def check_grid(data: dict) -> list[Fault]:
    """Its grids: every linear has the one that the settings ask for, or none."""
    text = data["record"]["settings"].get("quantise")
    asked = mixed.Grids(None) if text is None else mixed.parse(text)
    wanted = {name: asked.of(before(name, data)) for name in data["tensors"]}
    return [Fault(name, f"rounded to {entry.get('grid')}, the settings ask for {wanted[name]}")
            for name, entry in data["tensors"].items() if entry.get("grid") != (wanted[name] and str(wanted[name]))]


def before(name: str, data: dict) -> str:
    """What the linear `name` is called in the model that a smaller one was made from, whose names the settings use."""
    if "origin" not in data:
        return name
    block = next(row["block"] for row in data["record"]["layers"] if row["name"] == name)
    return origin.name_before(name, name.partition(f".{block}.")[0], data["origin"]["blocks"])


def check_allocated(asked: Unstructured, entries: dict[str, dict], settings: dict) -> list[Fault]:
    """Faults of a sparsity that was spread over the linears: their groups, and their zeros within one a group."""
    faults, wanted, zeros, groups = [], 0.0, 0, 0
    for name, entry in entries.items():
        pattern, (R, C) = pattern_of(entry), entry["shape"]
        if pattern == Dense() and settings.get("keep_dense"):
            continue
        if not isinstance(pattern, Unstructured) or pattern.group != asked.group:
            faults.append(Fault(name, f"pattern {pattern}{by(pattern)}, the settings ask for {asked}{by(asked)}"))
            continue
        wanted, zeros = wanted + asked.sparsity * R * C, zeros + pattern.zeros(R, C)
        groups += R if pattern.group == "row" else R * len(pattern.blocks(C))
    if abs(zeros - wanted) > groups:
        faults.append(Fault(MANIFEST, f"its patterns ask for {zeros} zeros in all, --pattern {asked} for {wanted:.0f}"))
    return faults


def check_format(data: dict) -> list[Fault]:
    """Its format: dense or packed as the settings say, with the packed linears that this gives."""
    if (asked := data["record"]["settings"].get("format", data["format"])) != data["format"]:
        return [Fault(MANIFEST, f"its format is {data['format']}, the settings ask for {asked}")]
    if data["format"] in gguf.FORMS:
        return gguf.claimed(data)
    if data["format"] == "dense":
        return [Fault(MANIFEST, f"its format is dense, but it has an entry {key}") for key in ("packed", "left_dense")
                if key in data]
    if data["format"] not in ("packed", compressed.METHOD):
        return [Fault(MANIFEST, f"its format is {data['format']}, none there is")]
    what, can = ("the pattern 2:4", lambda entry: entry["pattern"] == "2:4") if data["format"] == "packed" else (
        "a grid", lambda entry: "grid" in entry)
    could = {name for name, entry in data["tensors"].items() if can(entry)} - set(data["left_dense"])
    count = data["packed"]["linears"]
    return [] if count == len(could) else [Fault(MANIFEST, f"{count} packed linears recorded, {len(could)} have {what} "
                                                           "and are not left dense")]


def check_packed(data: dict, model: nn.Module) -> list[Fault]:
    """Faults of the packed linears of a loaded model: their number and bytes."""
    if data.get("format") == compressed.METHOD:
        return []  # compressed.py reads the files themselves
    found, recorded = packed.linears(model), data.get("packed") or {}
    if len(found) != recorded.get("linears", 0):
        return [Fault(MANIFEST, f"{len(found)} packed linears, recorded {recorded.get('linears', 0)}")]
    there, said = packed.bytes_of(model), (recorded.get("bytes", 0), recorded.get("dense_bytes", 0))
    return [] if there == said else [Fault(MANIFEST, f"packed linears of {there[0]} bytes, {there[1]} dense; recorded "
                                                     f"{said[0]} and {said[1]}")]


def asked_for(settings: dict) -> Pattern:
    """The pattern that a record's settings ask for, its group the method's own unless named."""
    solver = solvers.chain(settings["method"])[0]
    known = {f.name for f in dataclasses.fields(solver.Config)}
    own = settings["solver"][solvers.short(solver)]
    cfg = solver.Config(**{name: value for name, value in own.items() if name in known})
    return patterns.parse(settings["pattern"], settings.get("group")).with_default_group(cfg.group)


def by(pattern: Pattern) -> str:
    """How a pattern's zeros are counted, in words; nothing where there is no choice."""
    return f" by {pattern.group}" if pattern.group is not None else ""
