"""Checkpoint: save a pruned model together with what is needed to verify it.

    folder    the folder that `--save` names, written crash-safe
    manifest  what was done to each tensor, and hashes to check it by
    outcome   compare a saved folder with the model and with the input
    packed    the packed 2:4 format
    bytes     the storage of the weights, pruned and dense
    verify    `oneshot verify`: check a folder against its manifest
"""

from .folder import Folder, owner_of
from .manifest import MANIFEST, SCHEMA, WORK, digest, manifest, pattern_of, read_manifest

__all__ = ["MANIFEST", "SCHEMA", "WORK", "Folder", "digest", "manifest", "owner_of", "pattern_of", "read_manifest"]
