"""Checkpoints: a pruned model in a folder that `AutoModelForCausalLM.from_pretrained` loads, written crash-safe.

    DIR/.oneshot/run.json            which run is at work here (its run_id)
    DIR/.oneshot/block_00007.safetensors   a finished block: its tensors, and its rows of the record in the header
    DIR/.oneshot/final/              the checkpoint while it is being written
    DIR/oneshot.json                 the manifest, moved into place last: only a finished folder has it

Every file is written under a temporary name, synced and renamed, so a kill at any moment leaves nothing half-written
under a name that counts.
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

from ..models import source_of
from ..runtime.files import sync, umask, write_json, write_text
from . import packed
from .manifest import MANIFEST, WORK, manifest, read_manifest
from .outcome import check_saved, copy_side_files


class Folder:
    """The folder that `--save` names, for one run. Nothing in it changes before the run's first block is kept.

    Raises ValueError naming `--save` when the folder belongs to something else.
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
        return self.ours and (self.path / MANIFEST).is_file()

    @property
    def record(self) -> dict:
        """The record of the finished run."""
        return read_manifest(self.path)["record"]

    def blocks(self) -> Iterator[tuple[dict[str, torch.Tensor], dict]]:
        """(state dict, rows) of the blocks finished so far, in order."""
        b = 0
        while self.ours and (file := self._block(b)).is_file():
            with safe_open(file, "pt") as f:
                if f.metadata()["run_id"] != self.run_id:  # left by a run that --overwrite replaced
                    return
                yield {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["rows"])  # noqa: SIM118
            b += 1

    def _block(self, b):
        return self.work / f"block_{b:05d}.safetensors"

    def claim(self) -> None:
        """Make the folder this run's and remove what earlier ones left; killed in between, it still has an owner."""
        if not self.claimed:
            self.work.mkdir(parents=True, exist_ok=True)
            write_json({"run_id": self.run_id}, self.work / "run.json")
            clear(self.path)
            self.ours = self.claimed = True

    def save_block(self, b: int, state: dict[str, torch.Tensor], rows: dict) -> None:
        """Keep a finished block: its state dict and its rows of the record; a killed run resumes after it."""
        with writing(self.path):
            self.claim()
            state = {k: v.contiguous() for k, v in state.items()}
            part = self._block(b).with_suffix(".part")
            save_file(state, part, metadata={"run_id": self.run_id, "rows": json.dumps(rows)})
            sync(part)
            os.replace(part, self._block(b))

    def finish(self, model: nn.Module, tokenizer, record: dict, form: str = "dense",
               page: Callable[[dict], str] | None = None) -> dict:
        """Write checkpoint, page and manifest, move them into place, drop the work files; the record as stored.

        form: "dense" (zeros among the weights) or "packed" (2:4 linears replaced in the model, see packed.py). page:
        gives the text of report.html.
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
            last = ["config.json", MANIFEST]  # without the former nothing loads, without the latter nothing is finished
            for name in [f for f in files if f not in last] + last:
                if (final / name).is_file():
                    (final / name).chmod(0o666 & ~umask())  # safetensors writes 0600
                sync(final / name)
                os.replace(final / name, self.path / name)
            sync(self.path)
        shutil.rmtree(self.work, ignore_errors=True)
        return record


@contextlib.contextmanager
def writing(path: str | Path):
    """A write that fails, in whichever library, as one OSError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(f"--save {path}: cannot be written ({why}); mend that and give the same command, it continues"
                      ) from error


def owner_of(path: str | Path) -> str | None:
    """run_id of the run that a folder belongs to, finished or not; None when it is empty or absent.

    Raises ValueError when the path is a file, or the folder holds something else.
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
    """Remove the files of an earlier checkpoint, first what makes it look finished, then what makes it load."""
    for name in (MANIFEST, "config.json"):
        (path / name).unlink(missing_ok=True)
    for file in path.iterdir():
        if file.is_file() and file.suffix in (".json", ".safetensors", ".html", ".jinja", ".txt", ".model"):
            file.unlink()
