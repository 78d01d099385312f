"""Files: atomic writes (under a temporary name, sync, rename: a file is complete or it is not there), removal."""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .inputs import reason
from .lock import NOT_SUPPORTED, Unsupported, try_lock

PART = re.compile(r"\.(.+\.(json|html)|[0-9a-f]{32})\.(?P<pid>\d+)\.part")  # what a kill leaves of `write_text`
HOUR = 3600
TORCH_SAVE = ("PytorchStreamWriter", "unexpected pos ", "iostream error")  # what torch.save says on a full disk


def write_text(text: str, path: str | Path) -> None:
    """Write `text` to the file `path` atomically: a reader sees either the old content or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            with contextlib.suppress(OSError):  # `remove_parts` leaves alone what is locked
                try_lock(file.fileno())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk as well
        sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(data: Any, path: str | Path) -> None:
    """Write plain values (dicts, lists, numbers, strings) as JSON, atomically."""
    write_text(json.dumps(data, indent=1) + "\n", path)


def array_on_disk(file: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file, mapped, with room on the disk for all of its bytes: who writes to a mapped file for which there
    is none is killed (SIGBUS). Raises OSError, and leaves no file, where the disk is full."""
    array = np.lib.format.open_memmap(file, "w+", dtype, shape)
    try:
        with open(file, "r+b") as stream:
            getattr(os, "posix_fallocate", lambda *_: None)(stream.fileno(), 0, file.stat().st_size)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            file.unlink()
            raise
    return array


def remove_parts(folder: str | Path) -> list[str]:
    """Remove what killed processes left of half-written files in a folder; their names. Never raises.

    Only files named as `write_text` names them, which nobody has locked and whose process is gone; where there is a
    process of that number again, or none can be told, after an hour.
    """
    removed = []
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = PART.fullmatch(entry.name)
            with contextlib.suppress(OSError):
                if match and entry.is_file(follow_symlinks=False) and abandoned(entry, int(match["pid"])):
                    os.unlink(entry.path)
                    removed.append(entry.name)
    return removed


def abandoned(entry: os.DirEntry, pid: int) -> bool:
    """Whether nobody is writing this file any more."""
    if process_is_there(pid) and time.time() - entry.stat().st_mtime < HOUR:
        return False
    handle = os.open(entry.path, os.O_RDWR)
    try:
        return try_lock(handle)
    except Unsupported:
        return time.time() - entry.stat().st_mtime >= HOUR
    finally:
        os.close(handle)


def process_is_there(pid: int) -> bool:
    """Whether this machine runs a process of that number; True where that cannot be asked."""
    if os.name != "posix":  # elsewhere os.kill ends the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    with contextlib.suppress(OSError, IndexError):  # ended, but nobody has asked for its exit code: an orphan
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


@contextlib.contextmanager
def writing(flag: str, path: str | Path) -> Iterator[None]:
    """Within the context, what says that a file cannot be written becomes a ValueError naming the flag."""
    try:
        yield
    except Exception as error:
        if not unwritable(error):
            raise
        why = "torch.save has failed, as it does on a full disk" if isinstance(error, RuntimeError) else reason(error)
        raise ValueError(f"{flag} {path}: cannot be written ({why}); give the command again once it can, or choose "
                         "another place") from error


def unwritable(error: Exception) -> bool:
    """Whether an exception says that a file cannot be written (a full disk, no permission): an error of the system, or
    what safetensors and torch raise instead, which are known by name and text so that this module needs neither.

    An OSError without a number is one of this program's own, and says all by itself.
    """
    return (isinstance(error, OSError) and error.errno is not None) or type(error).__name__ == "SafetensorError" or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in TORCH_SAVE))


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
