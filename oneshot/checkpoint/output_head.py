"""Output head: the proof that it lies on the grid that `--quantise` names for it (quantise/head.py)."""

import torch
from torch import nn

from .. import models
from ..quantise import head, mixed
from . import rounded
from .contents import MANIFEST, Fault


def check(model: nn.Module, data: dict, scales: dict[str, torch.Tensor]) -> tuple[list[dict], list[Fault]]:
    """(rows, faults) of the output head: on the grid that the settings name for it, with its scales, as recorded."""
    known = models.output_head(model)
    try:
        recorded, text = data["record"].get("head") or {}, data["record"]["settings"].get("quantise")
        asked = mixed.parse(text).named(known[0]) if text and known else None
        want = head.said(model, asked) if asked else {}
        if wrong := [key for key in {**want, **recorded} if key != "rounded_to_zero" and want.get(key) != recorded.get(
                key)]:
            return [], [Fault(known[0] if known else MANIFEST, "of the output head is recorded " + ", ".join(
                f"{key} {recorded.get(key)} instead of {want.get(key)}" for key in wrong))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [], [Fault(MANIFEST, f"what it says of the output head cannot be read ({type(error).__name__})")]
    if not asked:
        return [], []
    (name, linear), why = known, f"its scales are missing in {rounded.FILE}"
    if name in scales:
        try:
            rounded.codes_of(linear.weight.data, asked, scales[name])
            why = None
        except ValueError as error:
            why = str(error)
    W = linear.weight
    return [{"name": name, "pattern": f"dense {asked}", "shape": tuple(W.shape), "zeros": int((W == 0).sum()),
             "dtype": str(W.dtype).removeprefix("torch."), "proved": not why}], [Fault(name, why)] if why else []


def not_pruned(model: nn.Module, data: dict) -> list[tuple[str, str]]:
    """`models.skipped`, which says so where the output head was rounded."""
    recorded, known = data["record"].get("head"), models.output_head(model)
    grid = f", rounded to {recorded['grid']}" if isinstance(recorded, dict) and "grid" in recorded else ""
    return [(name, why + grid * bool(known and known[1].weight is model.get_parameter(name)))
            for name, why in models.skipped(model)]
