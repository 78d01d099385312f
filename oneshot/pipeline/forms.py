"""Forms: how the linears of a block can be stored, and what computes with them on a device.

    dense      as they are
    2:4        two of every four weights are zero: oneshot_kernels.Sparse24Linear
    int8       integers, a scale for each row: oneshot_kernels.cpu.integers.IntegerLinear
    int4       integers, a scale for each 64 columns of a row: the same
    2:4 int8   both, and 2:4 int4

A form without a kernel on a device takes fewer bytes there, but no less time. Times are those of `decoding`: single
tokens are computed as `oneshot generate` computes them.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from oneshot_kernels import Sparse24Linear, fast_decode, is_24
from oneshot_kernels.cpu import integers
from oneshot_kernels.cpu import linear as tiles
from torch import nn

from .. import models
from ..checkpoint import MANIFEST, read_manifest, rounded
from ..prune.patterns import NM, Dense, Pattern
from ..quantise import grids

SPARSE = "2:4"
GRIDS = {"int8": "int8:row", "int4": "int4:64"}  # {what --allow calls it: the grid, which a compiled kernel knows}
HEAD = "output head"
ONE_CALL = "one compiled call"
FORMS = (SPARSE, *GRIDS, *(f"{SPARSE} {grid}" for grid in GRIDS))


def named(sparse: bool, integers: str | None) -> str:
    """The form of a block. integers: a key of GRIDS, or None."""
    return " ".join(([SPARSE] if sparse else []) + ([integers] if integers else [])) or "dense"


def of(form: str) -> tuple[Pattern, grids.Grid | None]:
    """(pattern, grid) of a form."""
    parts = form.split(" ")
    grid = next((grids.parse(GRIDS[part]) for part in parts if part in GRIDS), None)
    return NM(2, 4) if SPARSE in parts else Dense(), grid


def nbytes(form: str, R: int, C: int, itemsize: int) -> int:
    """The stored bytes of a weight (R, C) in a form; dense where its shape does not allow 2:4."""
    pattern, grid = of(form)
    if isinstance(pattern, NM) and C % pattern.m:
        pattern = Dense()
    return grid.bytes(R, C, pattern) if grid else pattern.bytes(R, C, itemsize)


def runnable(device: str | torch.device) -> list[str]:
    """The forms for which this machine has a kernel; compiles those for a CPU at the first call."""
    if torch.device(device).type == "cuda":
        return [SPARSE]
    found = [SPARSE] if tiles.available() else []
    if integers.available():
        found += [form for form in FORMS if form != SPARSE]
    return found


def load(folder: str | Path, dtype: str = "auto", device: str = "cpu", **options: Any) -> nn.Module:
    """The model of a saved folder, with the kernels of its linears' forms that run on the device.

    dtype: to compute in; integers that were stored in another one are rounded anew. options: as for `models.load`.
    """
    model = models.load(str(folder), dtype=dtype, **options)[0].to(device)
    return with_kernels(model, usable(folder, device), rounded.read(Path(folder)) if dtype == "auto" else None)


def usable(folder: str | Path, device: str | torch.device) -> dict[str, str]:
    """{full linear name: the form that a kernel here computes with}, of a saved folder; {} of one that is no folder of
    oneshot's, and of a packed one, whose layers are in the form that it is packed in."""
    if not (Path(folder) / MANIFEST).is_file() or "packed" in (data := read_manifest(folder)):
        return {}
    known = runnable(device)
    return {name: form if form in known else SPARSE for name, form in in_record(data["record"]).items()
            if form in known or (form.startswith(SPARSE) and SPARSE in known)}


def decoding(model: nn.Module, device: str | torch.device) -> tuple[nn.Module, str]:
    """(a model that shares all tensors with this one and decodes as fast as it can here, what computes a token).

    On a CPU a token is one compiled call for the families that `fast_decode` knows, dense ones too; else transformers'
    own, which the text says with the reason. Of other batches and of prompts nothing changes. The model itself neither.
    """
    if torch.device(device).type != "cpu" or not runnable(device):
        return model, "transformers"
    made = copy.copy(model)
    why = fast_decode(made)
    return (model, f"transformers ({why})") if why else (made, ONE_CALL)


def in_record(record: dict) -> dict[str, str]:
    """{full linear name: its form}, by a record, of those that have one beside dense."""
    grids_of = {text: name for name, text in GRIDS.items()}
    found = {row["name"]: named(row["pattern"] == SPARSE, grids_of.get(row.get("grid")))
             for row in record.get("layers") or ()}
    if head := record.get("head"):
        found[head["name"]] = named(False, grids_of.get(head["grid"]))
    return {name: form for name, form in found.items() if form != "dense"}


@torch.no_grad()
def with_kernels(model: nn.Module, forms: Mapping[int | str, str],
                 scales: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Put the kernels' layers into a model, in place, and return it.

    forms: {number of a block, full linear name, or HEAD for the output head: its form}. scales: {full linear name: (R,
    groups), float16} of the integers that are stored: then every weight has to be in its form. Without scales, weights
    are rounded to nearest, and made 2:4 by magnitude where they are not: good for measuring time. What has no kernel
    (experts that are fused, Conv1D, shapes that are no 2:4) stays as it is. Inputs of integer layers stay as they are,
    as quality is measured.

    Raises ValueError naming the linear whose weight is not in its form, where scales are given.
    """
    def layer_of(name: str, linear: nn.Linear, form: str) -> nn.Module:
        if scales is not None:
            check(name, linear, form, scales)
        return made(linear, form, (scales or {}).get(name))

    for block in models.walk(model):
        for weight in block.weights:
            form = forms.get(weight.name, forms.get(block.number, "dense"))
            if form != "dense" and type(weight.owner) is nn.Linear:
                parent, _, child = weight.linear.rpartition(".")
                setattr(block.module.get_submodule(parent), child, layer_of(weight.name, weight.owner, form))
    name, head = models.output_head(model) or ("", None)
    if (form := forms.get(name, forms.get(HEAD, "dense"))) != "dense" and head is not None:
        model.set_output_embeddings(layer_of(name, head, form))
    return model


def check(name: str, linear: nn.Linear, form: str, scales: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError naming the linear if its weight is not in its form. scales: as for `with_kernels`."""
    pattern, grid = of(form)
    if isinstance(pattern, NM) and not pattern.holds(linear.weight):
        raise ValueError(f"{name}: is not {pattern}")
    if grid and name not in scales:
        raise ValueError(f"{name}: its scales are missing")


def running(model: nn.Module) -> list[str]:
    """The forms that a model's layers are computed in by kernels, each once."""
    return sorted({SPARSE if isinstance(m, Sparse24Linear) else named(m.values.ndim == 5, f"int{m.bits}")
                   for m in model.modules() if isinstance(m, (Sparse24Linear, integers.IntegerLinear))})


def made(linear: nn.Linear, form: str, scales: torch.Tensor | None) -> nn.Module:
    """The layer that computes with a linear in a form; the linear itself where it cannot be 2:4."""
    pattern, grid = of(form)
    sparse = isinstance(pattern, NM)
    if sparse and linear.in_features % pattern.m:
        return linear
    if sparse and not is_24(linear.weight):
        linear.weight.data = linear.weight.data * pattern.keep(linear.weight.data.abs().float())
    if grid is None:
        return Sparse24Linear.from_linear(linear)
    bias = None if linear.bias is None else linear.bias.detach()
    if scales is None:
        return integers.IntegerLinear.from_linear(linear, bits=grid.bits, sparse=sparse)
    codes, scale = rounded.codes_of(linear.weight.data, grid, scales), scales.float()
    if grid.bits == 8:
        scale = scale[:, 0]
    return integers.IntegerLinear(integers.prepare(codes.to(torch.int8), scale, sparse=sparse, bits=grid.bits), bias)


def linears(model: nn.Module) -> list[list[tuple[int, int, int]]]:
    """[[(R, C, bytes of a stored weight), ...]] of all linears, a list for each block."""
    return [[(*w.shape, w.stored.itemsize) for w in block.weights] for block in models.walk(model)]


def stored(shapes: Sequence[Sequence[tuple[int, int, int]]], forms: Mapping[int, str]) -> int:
    """The bytes of all linears of `linears`, with {number of a block: its form}, dense where it is not there."""
    return sum(nbytes(forms.get(b, "dense"), *shape) for b, block in enumerate(shapes) for shape in block)
