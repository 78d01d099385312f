"""Files that are whole or absent: written under another name, synced, renamed."""

import json
import os
from pathlib import Path


def write_text(text: str, path: str | Path) -> None:
    """Put `text` into the file `path` atomically: a reader sees the old content or the new, never a half."""
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
    if os.name == "posix":  # the rename itself must reach the disk too
        sync(path.parent)


def write_json(data, path: str | Path) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_text(json.dumps(data, indent=1) + "\n", path)


def sync(path: str | Path) -> None:
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
