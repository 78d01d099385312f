"""Bytes: the storage of a model's prunable weights in their patterns or grids, and dense."""

from torch import nn

from .. import models
from ..prune.patterns import Dense, parse
from ..quantise.grids import Integers


def model_bytes(model: nn.Module, rows: list[dict], grid: Integers | None = None) -> dict[str, int]:
    """{"stored", "dense"}: bytes of all prunable linears in their layers' patterns, and dense.

    rows: the record's layer rows. grid: of a rounded model; applies to linears without a row.
    """
    found = {row["name"]: parse(row["pattern"], row["group"]) for row in rows}
    stored = dense = 0
    for weight in models.all_weights(model):
        itemsize = weight.stored.itemsize
        own = found.get(weight.name)
        stored += grid.bytes(*weight.shape) if own is None and grid else (own or Dense()).bytes(*weight.shape, itemsize)
        dense += Dense().bytes(*weight.shape, itemsize)
    return {"stored": stored, "dense": dense}
