"""Calibrate: what a block is called with, and the statistics of what its linears are fed.

    activations   the calibration tokens on their way through the blocks: capture, replay, logits
    collect       statistics of a block's linears, by hooks, while the block runs once
    statistics    running sums of one linear's input
    health        whether a pruned block's output has fallen apart
"""

from .activations import (
    Activations,
    Wait,
    batches,
    capture,
    forward,
    logits,
    logits_to_keep,
    replay,
    slices_logits,
    tail,
    tree_map,
)
from .collect import Limits, collect
from .statistics import NEEDS, SAMPLE, Statistics

__all__ = ["NEEDS", "SAMPLE", "Activations", "Limits", "Statistics", "Wait", "batches", "capture", "collect", "forward",
           "logits", "logits_to_keep", "replay", "slices_logits", "tail", "tree_map"]
