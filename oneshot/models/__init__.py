"""Models: load one, find its transformer blocks, see every prunable weight as an (R, C) matrix, go over a model.

    loading   load a folder, a hub name or the demo model
    blocks    find the transformer blocks; `walk` yields them one at a time on the device
    weights   one linear's weight as an (R, C) matrix
    experts   fused experts, run one by one

`walk` is the only place that goes over a model block by block.
"""

from .blocks import (
    Block,
    all_weights,
    blocks,
    compute_dtype,
    config_of,
    decoder,
    max_positions,
    outside,
    resident,
    rest_of,
    shares_weights,
    skipped,
    tensors_of,
    unreached,
    walk,
)
from .experts import experts_one_by_one, is_experts
from .intake import source_of
from .loading import DEMO, fingerprint, load, quiet
from .weights import Conv1D, Weight, left_alone, mlp, silent, untouched, weights_of

__all__ = [
    "DEMO", "Block", "Conv1D", "Weight", "all_weights", "blocks", "compute_dtype", "config_of", "decoder",
    "experts_one_by_one", "fingerprint", "is_experts", "left_alone", "load", "max_positions", "mlp", "outside", "quiet",
    "resident", "rest_of", "shares_weights", "silent", "skipped", "source_of", "tensors_of", "unreached", "untouched",
    "walk", "weights_of",
]
