"""The manifest of a finished checkpoint: what was done to each tensor, and hashes to check it by.

    schema          2; 1 has no `files` and `stored_tensors`, and no seal
    format          "dense" or "packed"; packed ones also have `packed` and `left_dense` (packed.py), those with a GGUF
                    file `gguf` (gguf/)
    record          the run's record; of a model healed by LoRA, heal.lora.merge_error: how far, at most, a merged
                    weight is from the trained one, as a share of it (no more than rounding, by proof)
    tensors         {linear: its pattern, zeros, sha256 of its dense bytes, ...} of all prunable linears; `grid` if
                    it was rounded to one (rounded.py)
    files           {name: {"bytes", "sha256"}} of every other file that the run wrote
    stored_tensors  {name: {"file", "dtype", "shape", "sha256"}} of every tensor in the safetensors files
    origin          only of a smaller model: which blocks and units are left, where each tensor comes from and whether
                    it is as it was (structured/origin.py)
    sha256_of_this  the hash of all text before it (sealed.py)
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from .. import models
from ..models import Weight
from ..prune import patterns
from ..runtime import sealed
from .contents import MANIFEST, WORK

SCHEMA, READABLE = 2, (1, 2)


def manifest(model: nn.Module, record: dict) -> dict:
    """{"schema", "format", "record", "tensors": {linear: its shape, pattern, zeros, dtype and sha256}}."""
    weights = {weight.name: weight for weight in models.all_weights(model)}
    tensors = {}
    for row in record["layers"]:
        weight = weights[row["name"]]
        tensors[row["name"]] = {key: row[key] for key in ("shape", "pattern", "group", "target_zeros", "zeros")} | {
            "dtype": str(weight.stored).removeprefix("torch."), "sha256": digest(weight)} | (
            {"grid": row["grid"]} if row.get("grid") else {})
    return {"schema": SCHEMA, "format": "dense", "record": record, "tensors": tensors}


def digest(weight: Weight) -> str:
    """sha256 (hex) of a linear's weight in its stored dtype, as (R, C) in row-major order."""
    stored = weight.get().to(weight.stored).contiguous()
    return hashlib.sha256(stored.view(-1).view(torch.uint8).numpy()).hexdigest()


def read_manifest(path: str | Path) -> dict:
    """The manifest of a finished folder.

    Raises ValueError when there is none, or when it is damaged or from another version.
    """
    return read_sealed(path)[0]


def read_sealed(path: str | Path) -> tuple[dict, bool]:
    """(the manifest of a finished folder, whether it is as it was written; always True for schema 1).

    Raises ValueError when there is none, or when it is damaged or from another version.
    """
    file = Path(path).expanduser() / MANIFEST
    if not file.is_file():
        inside = sorted(f.parent.name for f in file.parent.glob(f"*/{MANIFEST}"))
        raise ValueError(f"{path}: no {MANIFEST}, so no finished oneshot checkpoint"
                         + (" (a run was interrupted here; the same command resumes it)"
                            if (file.parent / WORK).is_dir() else "")
                         + (f"; it holds some: give one of {', '.join(inside)}" if inside else ""))
    try:
        data, whole = sealed.read(file)
    except ValueError:
        raise ValueError(f"{file}: not readable as JSON") from None
    if data.get("schema") not in READABLE:
        raise ValueError(f"{file}: written by another version of oneshot; prune again")
    needed = ("record", "tensors") if old(data) else ("record", "tensors", "files", "stored_tensors")
    if not all(isinstance(data.get(key), dict) for key in needed):
        raise ValueError(f"{file}: is damaged; prune again")
    return data, whole or old(data)


def models_of(record: dict) -> dict[str, str | None]:
    """The names of the `model` and the `heal_teacher` that a record was made with, good in any working directory.

    Raises LookupError, TypeError or AttributeError where the record is damaged.
    """
    settings = record["settings"]
    return {"model": settings["model"], "heal_teacher": settings.get("heal_teacher")} | record.get("paths", {})


def old(data: dict) -> bool:
    """Whether a manifest is of schema 1, without hashes of files."""
    return data["schema"] == 1 and "files" not in data and "stored_tensors" not in data


def pattern_of(entry: dict) -> patterns.Pattern:
    """The Pattern of a manifest's entry."""
    return patterns.parse(entry["pattern"], entry.get("group"))
