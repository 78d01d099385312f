"""Checkpoint: a pruned model as files that prove themselves.

    folder    the folder that `--save` names, written crash-safe
    lock      one process at a time writes into it
    owner     whose it is, and which files in it are the program's
    kept      finished blocks, for a run that was killed
    manifest  what was done to which tensor, and the hashes that prove it
    contents  what the files of a folder hold, as hashes
    sealed    JSON that knows its own hash
    outcome   what was saved is what should be
    packed    the packed 2:4 format
    bytes     what the weights take, stored and dense
    verify    `oneshot verify`: prove that a folder is what its manifest says
"""

from .folder import Folder
from .lock import FolderLock, locked
from .manifest import MANIFEST, SCHEMA, WORK, digest, manifest, pattern_of, read_manifest
from .owner import owner_of

__all__ = ["MANIFEST", "SCHEMA", "WORK", "Folder", "FolderLock", "digest", "locked", "manifest", "owner_of",
           "pattern_of", "read_manifest"]
