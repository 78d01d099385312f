"""Checkpoint: save a pruned model together with what is needed to verify it.

    folder    the folder that `--save` names, written crash-safe
    lock      only one process at a time writes into it
    owner     which run a folder belongs to, and which of its files oneshot wrote
    kept      finished blocks, saved for a run that may be interrupted
    shards    the checkpoint of a model whose blocks are on disk
    manifest  what was done to each tensor, and hashes to check it by
    contents  hashes of all files of a folder, and of all tensors in them
    claims    whether a manifest agrees with itself
    outcome   compare a saved folder with the model and with the input
    packed    the packed 2:4 format
    compressed  rounded linears as compressed-tensors stores them
    gguf      a file for llama.cpp beside the weights
    rounded   the scales of rounded linears, and the proof of their grid
    output_head  the same proof of the output head
    bytes     the storage of the weights, pruned and dense
    verify    `oneshot verify`: check a folder against its manifest
"""

from .folder import Folder
from .kept import other_circumstances
from .lock import FolderLock, locked
from .manifest import MANIFEST, SCHEMA, WORK, digest, manifest, models_of, pattern_of, read_manifest
from .owner import owner_of

__all__ = ["MANIFEST", "SCHEMA", "WORK", "Folder", "FolderLock", "digest", "locked", "manifest", "models_of",
           "other_circumstances", "owner_of", "pattern_of", "read_manifest"]
