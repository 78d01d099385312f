"""Teacher: what the dense model says of the training text, computed beside the student or once, ahead, into a cache.

    Live     the dense model, in memory: logits and hidden states of any window
    Cached   its k most likely tokens of every window in two files, mapped into memory: many students use one pass

    FOLDER/log_p.npy   float16 (n, T, k), log-probabilities
    FOLDER/ids.npy     uint32 (n, T, k)
    FOLDER/cache.json  which model, text, k and temperature they are of, and how many windows are done
"""

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ... import models
from ...data.training import Windows
from ...runtime import environment
from ...runtime.files import write_text
from .losses import TopK

EVERY = 64  # windows after which a cache that is being built notes how far it is


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

    Raises ValueError naming `--heal-cache` if the disk is too small, before anything is computed, or if the folder
    holds another cache.
    """
    note, shape = folder / "cache.json", (len(windows), windows.seqlen, k)
    asked = key | {"k": k, "temperature": temperature, "windows": len(windows), "seqlen": windows.seqlen}
    try:
        found = json.loads(note.read_text()) if note.is_file() else {}
        if found:
            Cached(folder)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--heal-cache {folder}: is damaged ({' '.join(str(error).split())}); remove it, it is "
                         "computed again") from None
    if found and found["of"] != asked:
        raise ValueError(f"--heal-cache {folder}: holds the predictions of another model or for another text; give "
                         "another folder")
    done = found.get("done", 0)
    if not found:
        reserve(folder, 6 * int(np.prod(shape)))
        np.lib.format.open_memmap(folder / "log_p.npy", "w+", np.float16, shape)
        np.lib.format.open_memmap(folder / "ids.npy", "w+", np.uint32, shape)
        write_text(json.dumps({"of": asked, "done": 0}), note)
    if done < len(windows):
        log_p, ids = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("log_p", "ids"))
        live = teacher()
        for i in tqdm(range(done, len(windows)), initial=done, total=len(windows), desc="teacher", unit="window",
                      disable=not progress, leave=False):
            logits, _ = live(model_inputs(live.model, windows[i], live.device))
            top = TopK.of(logits, k, temperature)
            log_p[i], ids[i] = top.log_p[0].half().cpu().numpy(), top.ids[0].cpu().numpy().astype(np.uint32)
            if (i + 1) % EVERY == 0 or i + 1 == len(windows):
                log_p.flush()
                ids.flush()
                write_text(json.dumps({"of": asked, "done": i + 1}), note)
    return Cached(folder)


def reserve(folder: Path, size: int) -> None:
    """Make the folder. Raises ValueError naming `--heal-cache` if its disk has no `size` bytes left."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"--heal-cache {folder}: needs {size / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} left; "
                         "lower --heal-top-k or --heal-tokens, or leave it out")


def model_inputs(model: nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The model's own arguments of one window, as a batch of one, or of a batch of windows."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    names = ("input_ids", "position_ids") if takes else ("input_ids",)
    return {name: (batch[name] if batch[name].ndim > 1 else batch[name][None]).to(device) for name in names}
