"""The manifest of a finished checkpoint: what was done to each tensor, and hashes to check it by."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from .. import models
from ..models import Weight
from ..prune import patterns

MANIFEST, WORK, SCHEMA = "oneshot.json", ".oneshot", 1


def manifest(model: nn.Module, record: dict) -> dict:
    """{"schema", "format", "record", "tensors": {linear: its shape, pattern, zeros, dtype and sha256}}."""
    weights = {weight.name: weight for weight in models.all_weights(model)}
    tensors = {}
    for row in record["layers"]:
        weight = weights[row["name"]]
        tensors[row["name"]] = {key: row[key] for key in ("shape", "pattern", "group", "target_zeros", "zeros")} | {
            "dtype": str(weight.stored).removeprefix("torch."), "sha256": digest(weight)}
    return {"schema": SCHEMA, "format": "dense", "record": record, "tensors": tensors}


def digest(weight: Weight) -> str:
    """sha256 (hex) of a linear's weight in its stored dtype, as (R, C) in row-major order."""
    stored = weight.get().to(weight.stored).contiguous()
    return hashlib.sha256(stored.view(-1).view(torch.uint8).numpy()).hexdigest()


def read_manifest(path: str | Path) -> dict:
    """The manifest of a finished folder.

    Raises ValueError when there is none, or when it is damaged or from another version.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        inside = sorted(f.parent.name for f in Path(path).glob(f"*/{MANIFEST}"))
        raise ValueError(f"{path}: no {MANIFEST}, so no finished oneshot checkpoint"
                         + (" (a run was interrupted here; the same command resumes it)"
                            if (Path(path) / WORK).is_dir() else "")
                         + (f"; it holds some: give one of {', '.join(inside)}" if inside else ""))
    try:
        data = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file}: not readable as JSON") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{file}: written by another version of oneshot; prune again")
    if not all(isinstance(data.get(key), dict) for key in ("record", "tensors")):
        raise ValueError(f"{file}: is damaged; prune again")
    return data


def pattern_of(entry: dict) -> patterns.Pattern:
    """The Pattern of a manifest's entry."""
    return patterns.parse(entry["pattern"], entry.get("group"))
