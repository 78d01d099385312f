"""Locks: a file that one process holds at a time. The kernel frees it however the process ends, also by SIGKILL.

Where the system or the file system has no such locks (Windows, some network mounts), a second file beside it is created
exclusively instead; a kill leaves it there, and what is raised then says which file to remove.
"""

import contextlib
import errno
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

NOT_SUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


class Taken(OSError):
    """Another process holds the lock; its text says which, and what to do where the kernel does not free it."""


class Lock:
    """A lock file, from `take` to `release`. It is gone afterwards; a kill leaves it, free."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.exclusive = self.file.with_name(f"{self.file.name}.exclusive")
        self._handle: int | None = None

    def take(self) -> None:
        """Hold the lock, making its folder. Raises Taken while another process, or another Lock of this one, holds it,
        and OSError where the file cannot be written."""
        for _ in range(1000):  # whoever releases removes the file, and its folder where that is empty
            with contextlib.suppress(FileNotFoundError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                if self._tried():
                    return
        raise OSError(f"{self.file} is removed again and again by other processes")

    def _tried(self) -> bool:
        """Whether the lock is held now; False when its file was removed meanwhile."""
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not try_lock(handle):
                raise Taken(who(os.read(handle, 200)))
            if same(handle, self.file):
                with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
                    os.truncate(handle, 0)
                    os.write(handle, mark())
                self._handle, handle = handle, None
        except Unsupported:
            os.close(handle)
            handle = None
            self.file.unlink(missing_ok=True)
            self._create()
        finally:
            if handle is not None:
                os.close(handle)
        return self._handle is not None

    def _create(self) -> None:
        """Hold the other file, which only one can create."""
        try:
            self._handle = os.open(self.exclusive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise Taken(f"{who(self.exclusive.read_bytes())}; this file system has no locks: if that process is gone, "
                        f"remove {self.exclusive}") from None
        self.file = self.exclusive
        os.write(self._handle, mark())

    @property
    def held(self) -> bool:
        """Whether this lock is held, and its file was not removed by somebody else."""
        return self._handle is not None and same(self._handle, self.file)

    def release(self) -> None:
        """Let go, and remove the file."""
        if self._handle is None:
            return
        ours, posix = self.held, os.name == "posix"
        if ours and posix:  # while it is locked: a file of that name afterwards is another's
            self.file.unlink(missing_ok=True)
        os.close(self._handle)
        if ours and not posix:  # an open file cannot be removed there
            self.file.unlink(missing_ok=True)
        self._handle = None


class Unsupported(OSError):
    """This file system has no locks."""


def try_lock(handle: int) -> bool:
    """Lock an open file without waiting; whether that succeeded. Raises Unsupported."""
    if fcntl is None:
        raise Unsupported
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NOT_SUPPORTED:
            raise Unsupported from None
        raise
    return True


def same(handle: int, file: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        ours, there = os.fstat(handle), os.stat(file, follow_symlinks=False)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def mark() -> bytes:
    """What is written into a lock file: who holds it."""
    return f"process {os.getpid()} on {socket.gethostname()}".encode()


def who(content: bytes) -> str:
    """The holder that a lock file names."""
    return content.decode(errors="replace").strip() or "its name is not known"
