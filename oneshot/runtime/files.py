"""Atomic file writes: write under a temporary name, sync, rename. A file is complete or it is not there."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(text: str, path: str | Path) -> None:
    """Write `text` to the file `path` atomically: a reader sees either the old content or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk as well
        sync(path.parent)


def write_json(data: Any, path: str | Path) -> None:
    """Write plain values (dicts, lists, numbers, strings) as JSON, atomically."""
    write_text(json.dumps(data, indent=1) + "\n", path)


def sync(path: str | Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The process's umask: the permission bits that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
