"""Checkpoint: a pruned model as files that prove themselves.

    folder    the folder that `--save` names, written crash-safe
    manifest  what was done to which tensor, and the hashes that prove it
    packed    the packed 2:4 format
    bytes     what the weights take, stored and dense
    verify    `oneshot verify`: prove that a folder is what its manifest says
"""

from .folder import Folder, owner_of
from .manifest import MANIFEST, SCHEMA, WORK, digest, manifest, pattern_of, read_manifest

__all__ = ["MANIFEST", "SCHEMA", "WORK", "Folder", "digest", "manifest", "owner_of", "pattern_of", "read_manifest"]
