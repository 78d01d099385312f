"""Models: load a model, find its transformer blocks, treat every prunable weight as an (R, C) matrix, iterate over it.

    loading   load a local folder, a model from the hub, or the demo model
    gguf      load a llama.cpp file
    source    what a loaded model came from, and what of it would be lost
    blocks    find the transformer blocks; `walk` yields them one at a time, each on the device
    weights   the weight of one linear layer ("a linear" throughout) as an (R, C) matrix
    experts   fused mixture-of-experts layers, computed one expert at a time
    groups    what is cut together when a model gets smaller: a neuron, a KV group
    smaller   the family's own model with fewer blocks, neurons or KV groups, from its config
    skeleton  a model's modules and shapes without its weights
    offload   a model larger than memory: its blocks stay on disk, one at a time is read
    uneven    models whose layers differ in width
    intake    check a checkpoint's files before and after loading
    own_code  turn whatever a model's own code raises into one line

`walk` is the only place that iterates over a model block by block.
"""

from .blocks import (
    Block,
    all_weights,
    blocks,
    compute_as_stored,
    compute_dtype,
    computes_as_stored,
    computing,
    config_of,
    decoder,
    embedded,
    max_positions,
    output_head,
    outside,
    resident,
    rest_of,
    shares_weights,
    skipped,
    static_cache,
    tensors_of,
    unreached,
    walk,
)
from .experts import experts_one_by_one, is_experts
from .loading import DEMO, Tokenizer, absolute, fingerprint, load, quiet, stored
from .offload import OnDisk, on_disk
from .own_code import own_code
from .skeleton import skeleton
from .source import source_of
from .weights import ATTENTION, Conv1D, Weight, left_alone, mlp, silent, untouched, weights_of

__all__ = [
    "ATTENTION", "DEMO", "Block", "Conv1D", "OnDisk", "Tokenizer", "Weight", "absolute", "all_weights", "blocks",
    "compute_as_stored", "compute_dtype", "computes_as_stored", "computing", "config_of", "decoder", "embedded",
    "experts_one_by_one", "fingerprint", "is_experts", "left_alone", "load", "max_positions", "mlp", "on_disk",
    "output_head", "outside", "own_code", "quiet", "resident", "rest_of", "shares_weights", "silent", "skeleton",
    "skipped", "source_of", "static_cache", "stored", "tensors_of", "unreached", "untouched", "walk", "weights_of",
]
