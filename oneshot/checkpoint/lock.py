"""The lock of a `--save` folder: one process writes into it, from before anything is computed to its end. What cannot
be written there is said in one line."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..runtime.inputs import reason
from ..runtime.lock import Lock, Taken
from .contents import WORK
from .owner import owner_of


class FolderLock:
    """DIR/.oneshot/lock, held from the making of this object to `release`; folders made for it and still empty go then.

    Raises ValueError naming `--save` while another process holds it, or where the folder is not this program's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        owner_of(path)
        work = self.path / WORK
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._lock = Lock(work / "lock")
        try:
            self._lock.take()
        except Taken as holder:
            raise ValueError(f"--save {path}: another process is writing here ({holder}); wait until it is done, or "
                             "choose another folder") from None
        except OSError as error:
            self._remove_empty()
            raise OSError(f"--save {path}: cannot be written ({reason(error)}); fix that and repeat the same "
                          "command") from None

    def check(self) -> None:
        """Raise OSError when the lock's file is gone: somebody removed the folder, perhaps to use it otherwise."""
        if not self._lock.held:
            raise OSError("its work files were removed by somebody else")

    @property
    def name(self) -> str:
        """The lock's own file among the work files."""
        return self._lock.file.name

    def release(self) -> None:
        """Let others in."""
        self._lock.release()
        self._remove_empty()

    def _remove_empty(self) -> None:
        for folder in (self.path / WORK, *self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def locked(paths: Iterable[str | Path], held: dict[str, FolderLock]) -> Iterator[None]:
    """Hold the locks of all these folders, in `held` by their names; those that it has already stay as they are.

    Raises ValueError naming `--save` and the folder that another process writes into.
    """
    with contextlib.ExitStack() as stack:
        for path in map(str, paths):
            if path not in held:
                held[path] = FolderLock(path)
                stack.callback(held.pop, path)
                stack.callback(held[path].release)
        yield


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Within the context, a failure to write, in any library, becomes an OSError of one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"--save {path}: cannot be written ({reason(error)}); fix that and repeat the same command, it "
                      "resumes") from error
