"""GGUF: `model.gguf` beside the weights, the file that llama.cpp, Ollama and LM Studio run.

    --format gguf          the types the model has; what `--quantise q8_0|q4_0` rounded by its codes and scales, also
                           where linears differ
    --format gguf:f32      or f16, bf16: all matrices in this type; q8_0, q4_0: as above, said outright

    family      what llama.cpp must know of a family: names, hyperparameters, the order of rows
    vocabulary  the tokenizer as llama.cpp reads it
    blocks      tensors as bytes of a type, and back
    file        the file written and read back

The folder keeps model.safetensors as well: it is what `verify`, `--twin`, a resumed run and every other command read,
so that the GGUF file needs one proof only, that it holds the same tensors (`faults`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ...quantise import mixed
from ..contents import MANIFEST, Fault
from . import blocks, family, file, vocabulary

if TYPE_CHECKING:
    from ...models import Tokenizer

METHOD, FILE = "gguf", "model.gguf"
FORMS = (METHOD, *(f"{METHOD}:{kind}" for kind in (*blocks.PLAIN, *blocks.ROUNDED)))


def check_flags(form: str, grids: mixed.Grids, saved: bool) -> None:
    """Raise ValueError naming `--format` where a file of this form cannot be written with these flags.

    grids: of `--quantise`. saved: whether there is a `--save`.
    """
    _, _, kind = form.partition(":")
    if not saved:
        raise ValueError(f"--format {form}: goes with --save")
    if kind in blocks.ROUNDED and str(grids) != kind:
        raise ValueError(f"--format {form}: holds what --quantise {kind} rounded; add that flag, or use --format "
                         f"{METHOD} where linears differ (a file rounded on the way out is not the model that was "
                         "measured)")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"--format {form}: needs the package gguf: pip install 'oneshot[gguf]'")


def check_model(form: str, model: nn.Module, tokenizer: Tokenizer, shrinks: bool = False) -> None:
    """Raise ValueError naming `--format` for a model that llama.cpp would not compute as transformers does.

    shrinks: whether the model is going to lose blocks or units.
    """
    known = family.family_of(model)
    if shrinks and known.period:
        raise ValueError(f"--format {form}: llama.cpp knows by a layer's number whether its attention slides, so a "
                         f"{known.arch} with fewer layers would be another model; leave out one")
    family.check(model, known)
    vocabulary.describe(tokenizer, model.config.vocab_size)
    file.check_range(form, model)


def write(folder: Path, model: nn.Module, tokenizer: Tokenizer, form: str, data: dict, scales: dict) -> dict:
    """Write `model.gguf` into a folder; returns entries for the manifest `data`, and `warnings` for the record.

    scales: of rounded linears, {full name: (R, groups)}.
    """
    plan = file.plan_of(model, form, data)
    warnings = file.write(folder / FILE, model, tokenizer, plan, file.with_head(model, data, scales))
    return {"format": form, "gguf": {"file": FILE, "types": plan.summary, "tensors": len(plan.names),
                                     "bytes": (folder / FILE).stat().st_size}, "warnings": warnings}


def claimed(data: dict) -> list[Fault]:
    """What of a manifest's entry of the file does not agree with its list of files."""
    said, there = data["gguf"], data["files"].get(FILE)
    right = said["file"] == FILE and there is not None and there["bytes"] == said["bytes"]
    return [] if right and sum(said["types"].values()) == said["tensors"] else [
        Fault(MANIFEST, f"its entry of {FILE} does not agree with its list of files")]


def faults(folder: Path, data: dict, model: nn.Module, scales: dict) -> list[Fault]:
    """What of a folder's GGUF file is not the model in the folder, tensor by tensor.

    data: the manifest. model: loaded from the safetensors. scales: of rounded linears.
    """
    if not (folder / FILE).is_file():
        return []  # missing: a fault of the recorded files
    try:
        plan = file.plan_of(model, data["format"], data)
        return file.faults(folder / FILE, model, plan, data["tensors"], file.with_head(model, data, scales))
    except ImportError:
        return [Fault(FILE, "needs the package gguf to be checked: pip install 'oneshot[gguf]'")]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [Fault(FILE, f"cannot be compared with the model ({error})")]
