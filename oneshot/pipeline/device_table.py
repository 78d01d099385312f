"""Device table: what every part of a model costs on the device at hand, so that the time of any cut can be foretold.

    kind      prefill, decode1, decode8, as in latency.py
    t(L,k,w)  the time of a model of L blocks with k KV groups and MLPs of w neurons
    rest      embedding, final norm, head: what does not grow with L
    block     one block with all its units
    saved     what one block gains with k KV groups, or w neurons
    forms     what one block gains with its linears in 2:4, int8 ... (forms.py), as far as a kernel runs here
    head      what the output head gains in int8, int4
    decoding  what computes the single tokens of decode1: one compiled call, or transformers, and why

Parts are not timed by themselves, where caches and Python behave otherwise, but by differences between small models of
the same family and widths that take turns: rest and block from two heights, saved from fewer units. They are FEW blocks
high, or as many as have LARGE bytes, up to half of the model: weights that stay in a CPU's cache from one token to the
next are faster than they are in the whole model.

    foretold t(L, k, w) = rest + L · (block - saved(k) - saved(w)), between measured points by straight lines; a block
    in another form gains as much less as it has become narrower

Whether parts add up is measured as well: on the whole model, and on one with fewer of both units at once.
"""

import copy
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import oneshot_kernels
import torch
from torch import nn
from tqdm import tqdm

from .. import models
from ..measure import latency
from ..models import groups
from ..models.gguf import cache
from ..runtime import environment, sealed
from ..structured import Cut, cut, slices
from . import forms

FEW, LARGE = 4, 2**27  # blocks of the small models at least, and bytes of them
SHARES = (0.75, 0.5, 0.25)  # of the units of a kind
BOTH = 0.5  # of the kinds TOGETHER, to see whether they add up
UNITS = (groups.HEADS, groups.QUERIES, groups.NEURONS)
TOGETHER = (groups.HEADS, groups.NEURONS)  # an attention loses either KV groups or query heads
BUSY = 0.5  # cores that others may take meanwhile
ADDITIVE = 0.1  # how far the foretold time may be from the measured one


def table(model: nn.Module, device: str, rounds: int = latency.ROUNDS, progress: bool = True) -> dict:
    """The device's table for models of this family and size, plain values; measured once, then read from the cache,
    unless the machine was busy then.

    Raises ValueError naming `--model` for a model of one block, or a family whose blocks cannot go.
    """
    file = cache() / "latency" / f"{key(model, device, rounds)}.json"
    if (kept := sealed.kept(file)) and not was_busy(kept):
        return kept
    found = measured(model, device, rounds, progress)
    sealed.keep(found, file)
    return found


def key(model: nn.Module, device: str, rounds: int) -> str:
    """What the table depends on, hashed: device, threads, versions, the model's shapes and dtype, the kernels."""
    e = environment.environment(device)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    whole = [e["device"], e["threads"], e["torch"], e["transformers"], str(model.dtype), shapes, rounds, FEW, LARGE,
             SHARES, forms.runnable(device), kernels()]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]


@functools.cache
def kernels() -> str:
    """The sha256 of the kernels' sources and of what puts them into a model."""
    files = [Path(forms.__file__), *(file for file in sorted(Path(oneshot_kernels.__file__).parent.rglob("*"))
                                     if file.suffix in (".py", ".cpp", ".h"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@torch.no_grad()
def measured(model: nn.Module, device: str, rounds: int, progress: bool) -> dict:
    """The table, see above."""
    L = len(models.blocks(model)[1])
    if L < 2:
        raise ValueError("--model: a table needs a model of two blocks at least, to tell blocks from the rest")
    few = height(model)
    ready = {name: forms.decoding(made, device) for name, made in shapes(model, L, few, device)}
    variants, found_forms = {name: made for name, (made, _) in ready.items()}, forms.runnable(device)
    times = {name: {kind: [] for kind in latency.KINDS} for name in variants}
    graph = latency.graphs(variants.values(), device)
    for number in tqdm(range(rounds + 1), desc="latency", unit="round", disable=not progress, leave=False):
        for name, made in variants.items():
            for kind in latency.KINDS:
                ms = 1000 * latency.one(made, kind, device, graph)
                if number:  # the first is to warm up
                    times[name][kind].append(ms)
    ms = {name: {kind: sorted(values)[len(values) // 2] for kind, values in own.items()} for name, own in times.items()}
    parts = {kind: {"block": (ms["few"][kind] - ms["fewer"][kind]) / (few - few // 2)} for kind in latency.KINDS}
    for kind, own in parts.items():
        own["rest"] = ms["few"][kind] - few * own["block"]
        own["saved"] = {unit: {str(count): (ms["few"][kind] - ms[f"{unit} {count}"][kind]) / few
                               for count in counts(model, unit)} for unit in UNITS if counts(model, unit)}
        own["forms"] = {form: (ms["few"][kind] - ms[form][kind]) / few for form in found_forms}
        own["head"] = {key: ms["few"][kind] - ms[f"{forms.HEAD} {key}"][kind] for key in heads(model, device)}
    e = environment.environment(device)
    found = {"device": e["device"], "threads": e["threads"], "torch": e["torch"], "transformers": e["transformers"],
             "date": e["date"], "dtype": str(model.dtype).removeprefix("torch."), "family": model.config.model_type,
             "busy": round(environment.others(), 1), "decoding": ready["whole"][1], "blocks": L,
             "units": {unit: of(model, unit) for unit in parts["decode1"]["saved"]}, "parts": parts}
    found |= {"graph": graph} if latency.on_gpu(device) else {}
    both = {unit: round(BOTH * found["units"][unit]) for unit in found["units"] if unit in TOGETHER}
    found["checks"] = {"whole model": check(found, ms["whole"], L, {}),
                       **({"both kinds": check(found, ms["both"], few, both)} if "both" in ms else {})}
    return found


def height(model: nn.Module) -> int:
    """The number of blocks of the small models."""
    _, block_list = models.blocks(model)
    one = sum(p.numel() * p.element_size() for p in block_list.parameters()) / len(block_list)
    return min(len(block_list), max(FEW, min(math.ceil(LARGE / one), len(block_list) // 2)))


def shapes(model: nn.Module, L: int, few: int, device: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, model) of everything that is timed."""
    yield "whole", model
    gone = tuple(range(few, L))
    yield "few", slices.first_units(model, Cut(gone)) if gone else model
    yield "fewer", slices.first_units(model, Cut(tuple(range(few // 2, L))))
    for unit in UNITS:
        for count in counts(model, unit):
            yield f"{unit} {count}", slices.first_units(model, Cut(gone, ((unit, count),)))
    halves = tuple((unit, round(BOTH * of(model, unit))) for unit in TOGETHER if counts(model, unit))
    if len(halves) == len(TOGETHER) and all(n > 0 for _, n in halves):
        yield "both", slices.first_units(model, Cut(gone, halves))
    for form in forms.runnable(device):
        yield form, forms.with_kernels(first(model, gone), dict.fromkeys(range(few), form)).to(device)
    for key in heads(model, device):
        yield f"{forms.HEAD} {key}", forms.with_kernels(first(model, gone), {forms.HEAD: key}).to(device)


def first(model: nn.Module, gone: tuple[int, ...]) -> nn.Module:
    """A copy of the model without some blocks."""
    return slices.first_units(model, Cut(gone)) if gone else copy.deepcopy(model)


def heads(model: nn.Module, device: str) -> list[str]:
    """The forms that the output head can have on a device."""
    known = forms.runnable(device)
    return [key for key in forms.GRIDS if key in known] if models.output_head(model) else []


def counts(model: nn.Module, unit: str) -> list[int]:
    """How many units of a kind are left in the small models; none if the family cannot lose any."""
    return sorted({round(share * of(model, unit)) for share in SHARES} - {0, of(model, unit)}, reverse=True)


def of(model: nn.Module, unit: str) -> int:
    """How many units of a kind every block has; 0 where its config cannot say another number."""
    found = cut.kinds(model).get(unit)
    return found.count if found else 0


def foretell(table: dict, kind: str, blocks: int, units: dict[str, int], stored: Sequence[str] = (),
             head: str | None = None) -> float:
    """The time in ms of a model of so many blocks, with {kind of unit: how many are left in each}, by a table.

    stored: the forms of the blocks that are not dense; a form for which the device has no kernel gains nothing. head:
    the form of the output head, None for dense.
    """
    own = table["parts"][kind]
    saved = sum(between(own["saved"][unit], table["units"][unit], left) for unit, left in units.items())
    gained = sum(own.get("forms", {}).get(form, 0.0) for form in stored) * (1 - saved / own["block"] if saved else 1)
    gained += own.get("head", {}).get(head, 0.0)
    return own["rest"] + blocks * (own["block"] - saved) - gained


def between(points: dict[str, float], of: int, left: int) -> float:
    """What a block saves with `left` of `of` units: on straight lines through the points, beyond them the last one."""
    known = sorted([(of, 0.0), *((int(n), ms) for n, ms in points.items())])
    if left <= known[0][0]:
        (a, low), (b, high) = known[0], known[1]
    else:
        (a, low), (b, high) = next((p, q) for p, q in itertools.pairwise(known) if p[0] <= left <= q[0])
    return low + (high - low) * (left - a) / (b - a)


def check(table: dict, ms: dict[str, float], blocks: int, units: dict[str, int]) -> dict:
    """{kind: {"measured", "foretold", "off"}} of one model."""
    found = {}
    for kind in latency.KINDS:
        told = foretell(table, kind, blocks, units)
        found[kind] = {"measured": ms[kind], "foretold": told, "off": told / ms[kind] - 1}
    return found


def warnings(table: dict) -> list[str]:
    """One line for each check in which parts do not add up, where no CUDA graphs could be timed, and where the machine
    had other work as well."""
    found = [f"{name}, {kind}: the parts add up to {row['foretold']:.2f} ms, {row['off']:+.0%} of the measured "
             f"{row['measured']:.2f} ms" for name, rows in table["checks"].items() for kind, row in rows.items()
             if abs(row["off"]) > ADDITIVE]
    found += [latency.NO_GRAPHS] if table.get("graph") is False else []
    return found + ([f"measured while other processes took {table['busy']} cores: it is measured again next time"]
                    if was_busy(table) else [])


def was_busy(table: dict) -> bool:
    """Whether the machine had other work while it was measured."""
    return table.get("busy", 0.0) > BUSY


def read(file: Path) -> dict:
    """A table that was measured elsewhere. Raises ValueError naming `--device` for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for kind in latency.KINDS:
            foretell(found, kind, found["blocks"], dict(found["units"]))
        if missing := {"family", "dtype", "checks"} - set(found):
            raise LookupError(missing)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"--device {file}: is no table of `oneshot latency` ({type(error).__name__}); measure one "
                         "there with --out") from None
    return found
