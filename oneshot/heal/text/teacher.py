"""Teacher: what the dense model says of the training text, computed beside the student or once, ahead, into a cache.

    Teacher  the dense model: loaded once, when it is first asked for
    Live     the dense model, in memory: logits and hidden states of any window
    Cached   its k most likely tokens of every window in two files, mapped into memory: many students use one pass

    FOLDER/log_p.npy   float16 (n, T, k), log-probabilities
    FOLDER/ids.npy     uint32 (n, T, k)
    FOLDER/cache.json  which model, text, k and temperature they are of, how many windows are done, and their hashes
    FOLDER/lock        held by the process that fills it
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ... import models
from ...data.training import Windows
from ...runtime import environment, sealed
from ...runtime.files import array_on_disk, writing
from ...runtime.lock import Lock, Taken
from .losses import TopK

EVERY = 64  # windows in a part; after each, a cache that is being built notes how far it is
NOTE = "cache.json"
ARRAYS = {"log_p.npy": np.float16, "ids.npy": np.uint32}


@dataclass
class Live:
    """The dense model beside the student, on `device`."""

    model: nn.Module
    device: torch.device

    def __post_init__(self) -> None:
        stored = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        fast = stored.itemsize < 4 and environment.fast_bfloat16(self.device)

        def wanted(t: torch.Tensor) -> torch.dtype:  # buffers stay: rotary frequencies are float32 on purpose
            weight = isinstance(t, nn.Parameter) and t.is_floating_point()
            return (torch.bfloat16 if fast else torch.float32) if weight else t.dtype
        if any((t.device, t.dtype) != (self.device, wanted(t)) for t in models.tensors_of(self.model)):
            self.model = copy.deepcopy(self.model)  # others measure with it
            for t in models.tensors_of(self.model):
                t.data = t.data.to(self.device, wanted(t))
        self.model.eval().requires_grad_(False)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(t.nbytes for t in models.tensors_of(self.model))

    @torch.no_grad()
    def __call__(self, inputs: dict[str, torch.Tensor], states: bool = False) -> tuple[torch.Tensor, tuple | None]:
        """(logits (B, T, V), hidden states if `states`) for the model's own inputs."""
        out = self.model(**inputs, use_cache=False, output_hidden_states=states)
        return out.logits, out.hidden_states if states else None


class Teacher:
    """The dense model of one run: loaded when something first needs it, and once, until `free`.

    load: gives the model. Of what nobody else holds, what `Live` does not need is freed with it.
    """

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        self._load = load
        self._model: nn.Module | None = None
        self._live: Live | None = None

    @property
    def model(self) -> nn.Module:
        """The model, as it is stored, or as `live` has changed it."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @functools.cached_property
    def fingerprint(self) -> str:
        """That of its weights as they are stored; the first call must come before `live`."""
        return models.fingerprint(self.model)

    def live(self, device: torch.device) -> Live:
        """The model beside the student, made once."""
        if self._live is None:
            self._live = Live(self.model, device)
            self._model = self._live.model
        return self._live

    def free(self) -> None:
        """Drop the model."""
        self._model = self._live = None


class Cached:
    """The teacher's k most likely tokens of the windows of a text, by their numbers."""

    def __init__(self, folder: Path) -> None:
        self.log_p = np.load(folder / "log_p.npy", mmap_mode="r")
        self.ids = np.load(folder / "ids.npy", mmap_mode="r")

    def __call__(self, index: torch.Tensor) -> TopK:
        """TopK of the windows whose numbers are `index` (B,), on its device."""
        at = index.cpu().numpy()
        return TopK(torch.from_numpy(self.log_p[at].astype(np.float32)).to(index.device),
                    torch.from_numpy(self.ids[at].astype(np.int64)).to(index.device))


def cache(folder: Path, teacher: Callable[[], Live], windows: Windows, key: dict, *, k: int, temperature: float,
          progress: bool = True) -> Cached:
    """The cache in `folder`, built if it is not there or was left unfinished. key: of which model and text it is.

    Raises ValueError naming `--heal-cache` if the disk is too small, before anything is computed, or cannot be written;
    if the folder holds another cache or a damaged one, or if another process is filling it.
    """
    asked = key | {"k": k, "temperature": temperature, "windows": len(windows), "seqlen": windows.seqlen}
    if len(opened(folder, asked)) * EVERY < len(windows):
        with writing("--heal-cache", folder), locked(folder):
            fill(folder, teacher, windows, asked, progress)
    return Cached(folder)


def opened(folder: Path, asked: dict) -> list[str]:
    """The hashes of the parts that a cache holds, EVERY windows each; none where there is no cache.

    Raises ValueError naming `--heal-cache` if one of them is not as it was written, or they are of something else.
    """
    note = folder / NOTE
    if not note.is_file():
        return []
    found = sealed.kept(note)
    if found and found["of"] != asked:
        raise ValueError(f"--heal-cache {folder}: holds the predictions of another model or for another text; give "
                         "another folder")
    if found and not found["parts"]:
        return []  # killed before the first part; its arrays may not be there yet
    try:
        cached = Cached(folder)
        whole = bool(found) and all(hashed(cached, part) == value for part, value in enumerate(found["parts"]))
    except (OSError, ValueError, EOFError):
        whole = False
    if not whole:
        raise ValueError(f"--heal-cache {folder}: is damaged; remove it, it is computed again")
    return found["parts"]


def fill(folder: Path, teacher: Callable[[], Live], windows: Windows, asked: dict, progress: bool) -> None:
    """Compute what is missing; the folder is locked."""
    parts = opened(folder, asked)  # another process may have filled it until now
    if not parts:
        make(folder, (len(windows), windows.seqlen, asked["k"]), {"of": asked, "parts": []})
    if len(parts) * EVERY >= len(windows):
        return
    log_p, ids = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("log_p", "ids"))
    live = teacher()
    for i in tqdm(range(len(parts) * EVERY, len(windows)), initial=len(parts) * EVERY, total=len(windows),
                  desc="teacher", unit="window", disable=not progress, leave=False):
        logits, _ = live(model_inputs(live.model, windows[i], live.device))
        top = TopK.of(logits, asked["k"], asked["temperature"])
        log_p[i], ids[i] = top.log_p[0].half().cpu().numpy(), top.ids[0].cpu().numpy().astype(np.uint32)
        if (i + 1) % EVERY == 0 or i + 1 == len(windows):
            log_p.flush()
            ids.flush()
            parts.append(hashed(Cached(folder), len(parts)))
            sealed.keep({"of": asked, "parts": parts}, folder / NOTE)


def hashed(cached: Cached, part: int) -> str:
    """sha256 (hex) of a part of a cache."""
    found = hashlib.sha256()
    for array in (cached.log_p, cached.ids):
        found.update(np.ascontiguousarray(array[part * EVERY:(part + 1) * EVERY]))
    return found.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the context, no other process fills the folder. Raises ValueError naming `--heal-cache` if one does."""
    lock = Lock(folder / "lock")
    try:
        lock.take()
    except Taken as error:
        raise ValueError(f"--heal-cache {folder}: is being filled by another process ({error}); wait for it, or give "
                         "another folder") from None
    try:
        yield
    finally:
        lock.release()


def make(folder: Path, shape: tuple[int, int, int], note: dict) -> None:
    """Make the folder, its note and its arrays, with room on the disk for all of their bytes.

    Raises ValueError naming `--heal-cache` if arrays that are no cache's lie there or the disk is too small, OSError if
    it is full all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        if (folder / name).exists() and not (folder / NOTE).is_file():
            raise ValueError(f"--heal-cache {folder}: holds {name}, which is not of a cache that was begun here; give "
                             "another folder")
    size, free = 6 * int(np.prod(shape)), shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"--heal-cache {folder}: needs {size / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} left; "
                         "lower --heal-top-k or --heal-tokens, or leave it out")
    sealed.keep(note, folder / NOTE)
    for name, dtype in ARRAYS.items():
        array_on_disk(folder / name, dtype, shape)


def model_inputs(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The model's own arguments of one window, as a batch of one, or of a batch of windows."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    names = ("input_ids", "position_ids") if takes else ("input_ids",)
    return {name: (batch[name] if batch[name].ndim > 1 else batch[name][None]).to(device) for name in names}
