"""Checkpoints: a pruned model in a folder that `AutoModelForCausalLM.from_pretrained` loads, written crash-safe.

    DIR/.oneshot/run.json                  the run_id of the run that writes here
    DIR/.oneshot/block_00007.safetensors   a finished block: its tensors, and its rows of the record in the header
    DIR/.oneshot/final/                    the checkpoint while it is being written
    DIR/oneshot.json                       the manifest, moved into place last: only a finished folder has it

Every file is written under a temporary name, synced and renamed, so that a kill at any moment leaves no incomplete file
under its final name.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..models import Tokenizer, source_of
from ..runtime.files import sync, umask, write_json, write_text
from . import packed
from .manifest import MANIFEST, WORK, manifest, read_manifest
from .outcome import check_saved, copy_side_files


class Folder:
    """The folder that `--save` names, for one run. Nothing in it changes before the run's first block is saved.

    overwrite: whether it may replace the result of another run.

    Raises ValueError naming `--save` when the folder holds another run, or anything else.
    """

    def __init__(self, path: str | Path, run_id: str, overwrite: bool = False):
        self.path, self.run_id = Path(path), run_id
        self.work = self.path / WORK
        owner = owner_of(self.path)
        if owner not in (None, run_id) and not overwrite:
            raise ValueError(f"--save {path}: holds another run ({owner}); --overwrite replaces it")
        self.ours, self.claimed = owner == run_id, False

    @property
    def finished(self) -> bool:
        """Whether the folder holds this run's finished checkpoint."""
        return self.ours and (self.path / MANIFEST).is_file()

    @property
    def record(self) -> dict:
        """The record of the finished run."""
        return read_manifest(self.path)["record"]

    def blocks(self) -> Iterator[tuple[dict[str, torch.Tensor], dict]]:
        """Yield (state dict, rows of the record) of the blocks finished so far, in order."""
        b = 0
        while self.ours and (file := self._block(b)).is_file():
            with safe_open(file, "pt") as f:
                if f.metadata()["run_id"] != self.run_id:  # left by a run that --overwrite replaced
                    return
                yield {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["rows"])  # noqa: SIM118
            b += 1

    def _block(self, b: int) -> Path:
        """The file of block b."""
        return self.work / f"block_{b:05d}.safetensors"

    def claim(self) -> None:
        """Mark the folder as this run's, then remove what earlier runs left, so that it always has an owner."""
        if not self.claimed:
            self.work.mkdir(parents=True, exist_ok=True)
            write_json({"run_id": self.run_id}, self.work / "run.json")
            clear(self.path)
            self.ours = self.claimed = True

    def save_block(self, b: int, state: dict[str, torch.Tensor], rows: dict) -> None:
        """Save a finished block, its state dict and its rows of the record; an interrupted run resumes after it."""
        with writing(self.path):
            self.claim()
            state = {k: v.contiguous() for k, v in state.items()}
            part = self._block(b).with_suffix(".part")
            save_file(state, part, metadata={"run_id": self.run_id, "rows": json.dumps(rows)})
            sync(part)
            os.replace(part, self._block(b))

    def finish(self, model: nn.Module, tokenizer: Tokenizer, record: dict, form: str = "dense",
               page: Callable[[dict], str] | None = None) -> dict:
        """Write checkpoint, page and manifest, move them into place, remove the work files; returns the saved record.

        form: "dense" (zeros are stored) or "packed" (2:4 linears are replaced in the model, see packed.py). page:
        returns the text of report.html for a record.

        Raises OSError naming `--save` if writing fails, ProofError if what was saved is not the model.
        """
        data = manifest(model, record)
        if form == "packed":
            data |= packed.pack_checkpoint(model, data["tensors"])
            record = data["record"] = record | {"packed": data["packed"], "warnings": record["warnings"] + [
                f"{name}: stays dense in the packed checkpoint ({why})" for name, why in data["left_dense"].items()]}
        with writing(self.path):
            self.claim()
            final = self.work / "final"
            shutil.rmtree(final, ignore_errors=True)
            model.save_pretrained(final)
            tokenizer.save_pretrained(final)
            check_saved(final, model, source_of(model))
            copy_side_files(source_of(model).folder, final)
            if page:
                write_text(page(record), final / "report.html")
            write_json(data, final / MANIFEST)
            files = sorted(f.name for f in final.iterdir())
            last = ["config.json", MANIFEST]  # without the first nothing loads; without the second it is not finished
            for name in [f for f in files if f not in last] + last:
                if (final / name).is_file():
                    (final / name).chmod(0o666 & ~umask())  # safetensors writes 0600
                sync(final / name)
                os.replace(final / name, self.path / name)
            sync(self.path)
        shutil.rmtree(self.work, ignore_errors=True)
        return record


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within the context, a failure to write, in any library, becomes an OSError of one line that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(f"--save {path}: cannot be written ({why}); fix that and repeat the same command, it resumes"
                      ) from error


def owner_of(path: str | Path) -> str | None:
    """The run_id of the run that a folder belongs to, finished or not; None if it is empty or does not exist.

    Raises ValueError naming `--save` when the path is a file, or the folder holds anything else.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--save {path}: is a file; give a folder")
    for file, get in ((path / MANIFEST, lambda m: m["record"]["run_id"]), (path / WORK / "run.json",
                                                                           lambda m: m["run_id"])):
        if file.is_file():
            try:
                return get(json.loads(file.read_text()))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"--save {path}: {file.name} is damaged; remove the folder") from None
    if path.is_dir() and any(entry.name != WORK for entry in path.iterdir()):
        raise ValueError(f"--save {path}: this folder holds files that are not oneshot's; choose another")
    return None


def clear(path: Path) -> None:
    """Remove the files of an earlier checkpoint: first the one that marks it as finished, then the one it loads by."""
    for name in (MANIFEST, "config.json"):
        (path / name).unlink(missing_ok=True)
    for file in path.iterdir():
        if file.is_file() and file.suffix in (".json", ".safetensors", ".html", ".jinja", ".txt", ".model"):
            file.unlink()
