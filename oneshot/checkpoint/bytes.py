"""Bytes: the storage of a model's prunable weights in their patterns or grids, and dense."""

from torch import nn

from .. import models
from ..prune.patterns import Dense, parse
from ..quantise.grids import Grid
from ..quantise.grids import parse as parse_grid


def model_bytes(model: nn.Module, rows: list[dict], grid: Grid | None = None) -> dict[str, int]:
    """{"stored", "dense"}: bytes of all prunable linears in their layers' patterns and grids, and dense.

    rows: the record's layer rows. grid: of a model that was only rounded; applies to linears without a row.
    """
    found = {row["name"]: (parse(row["pattern"], row["group"]), row.get("grid")) for row in rows}
    stored = dense = 0
    for weight in models.all_weights(model):
        pattern, text = found.get(weight.name, (Dense(), None))
        own, itemsize = parse_grid(text) if text else grid, weight.stored.itemsize
        stored += own.bytes(*weight.shape, pattern) if own else pattern.bytes(*weight.shape, itemsize)
        dense += Dense().bytes(*weight.shape, itemsize)
    return {"stored": stored, "dense": dense}
