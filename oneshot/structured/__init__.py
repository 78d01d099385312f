"""Structured: a smaller dense model of the same family, with fewer blocks, neurons or KV groups.

    options   the flags
    cut       what goes, as a plan of column patterns for the consumers; how many parameters are left
    slices    the smaller model: producers' rows, consumers' columns, config
    origin    where each tensor of the smaller model comes from, and whether it is as it was
    depth     the order in which blocks can go: block influence, and KL to the dense model
    budget    the cuts that leave a given share of the blocks' parameters, bytes or time
    search    prune a model by several cuts, and choose by the KL on held-out windows
    spread    how many neurons each layer keeps where layers may differ (ragged: the model that this gives)
    mixture   which experts of each layer are left

Which units go is decided by the solvers of prune/ on the consumer, where a unit is a block of columns
(patterns.Columns); structured/ only slices what has become zero.
"""

from .cut import Cut
from .slices import cut_model

__all__ = ["Cut", "cut_model"]
