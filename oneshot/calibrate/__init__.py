"""Calibrate: run the calibration tokens through the blocks and collect statistics of every linear's inputs.

    batches       which windows run together, and which of them each of several processes has
    activations   the hidden states between blocks: capture them, replay a block
    head          logits from the hidden states after the last block
    collect       collect the statistics of a block's linears by hooks, in one forward pass of the block
    reduce        put the statistics of several processes together (torchrun)
    statistics    running sums over one linear's inputs
    gradients     the gradient of the loss with respect to every linear's weight, one block at a time
    health        whether a pruned block's output has collapsed
"""

from .activations import (
    Activations,
    Wait,
    capture,
    forward,
    replay,
    tree_map,
)
from .batches import batches, check_parts
from .collect import Limits, collect
from .gradients import gradients
from .head import logits, logits_to_keep, slices_logits, tail
from .reduce import reduce, whole
from .statistics import NEEDS, SAMPLE, Gradient, Statistics

__all__ = ["NEEDS", "SAMPLE", "Activations", "Gradient", "Limits", "Statistics", "Wait", "batches", "capture",
           "check_parts", "collect", "forward", "gradients", "logits", "logits_to_keep", "reduce", "replay",
           "slices_logits", "tail", "tree_map", "whole"]
