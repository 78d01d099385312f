"""Checkpoints: a pruned model in a folder that `AutoModelForCausalLM.from_pretrained` loads, written crash-safe.

    DIR/.oneshot/run.json            which run is at work here (its run_id)
    DIR/.oneshot/block_00007.safetensors   a finished block: its tensors, and its rows of the record in the header
    DIR/.oneshot/final/              the checkpoint while it is being written
    DIR/oneshot.json                 the manifest, moved into place last: only a finished folder has it

Every file is written under a temporary name, synced and renamed, so a kill at any moment leaves nothing half-written
under a name that counts.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import models, report
from . import packed
from ..prune import patterns
from ..report.page import write_html

MANIFEST, WORK, SCHEMA = "oneshot.json", ".oneshot", 1


class Folder:
    """The folder that `--save` names, for one run. Nothing in it changes before the run's first block is kept.

    Raises ValueError naming `--save` when the folder belongs to something else.
    """

    def __init__(self, path, run_id, overwrite=False):
        self.path, self.run_id = Path(path), run_id
        self.work = self.path / WORK
        owner = owner_of(self.path)
        if owner not in (None, run_id) and not overwrite:
            raise ValueError(f"--save {path}: holds another run ({owner}); --overwrite replaces it")
        self.ours, self.claimed = owner == run_id, False

    @property
    def finished(self):
        return self.ours and (self.path / MANIFEST).is_file()

    @property
    def record(self):
        """The record of the finished run."""
        return read_manifest(self.path)["record"]

    def blocks(self):
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

    def claim(self):
        """Make the folder this run's and remove what earlier ones left; killed in between, it still has an owner."""
        if not self.claimed:
            self.work.mkdir(parents=True, exist_ok=True)
            write_json({"run_id": self.run_id}, self.work / "run.json")
            clear(self.path)
            self.ours = self.claimed = True

    def save_block(self, b, block, rows):
        """Keep a finished block, so that a killed run continues behind it."""
        with writing(self.path):
            self.claim()
            state = {k: v.contiguous() for k, v in block.state_dict().items()}
            part = self._block(b).with_suffix(".part")
            save_file(state, part, metadata={"run_id": self.run_id, "rows": json.dumps(rows)})
            sync(part)
            os.replace(part, self._block(b))

    def finish(self, model, tokenizer, record, form="dense"):
        """Write checkpoint, page and manifest, move them into place, drop the work files; the record as stored.

        form: "dense" (zeros among the weights) or "packed" (2:4 linears replaced in the model, see packed.py).
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
            write_html([record], final / "report.html")
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
def writing(path):
    """A write that fails, in whichever library, as one OSError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OSError(f"--save {path}: cannot be written ({why}); mend that and give the same command, it continues"
                      ) from error


def owner_of(path):
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


def clear(path):
    """Remove the files of an earlier checkpoint, first what makes it look finished, then what makes it load."""
    for name in (MANIFEST, "config.json"):
        (path / name).unlink(missing_ok=True)
    for file in path.iterdir():
        if file.is_file() and file.suffix in (".json", ".safetensors", ".html", ".jinja", ".txt", ".model"):
            file.unlink()


def manifest(model, record):
    """What was done to which tensor, and proof: {"schema", "record", "tensors": {linear: {...}}}."""
    weights = dict(models.all_weights(model))
    tensors = {}
    for row in record["layers"]:
        weight = weights[row["name"]]
        tensors[row["name"]] = {key: row[key] for key in ("shape", "pattern", "group", "target_zeros", "zeros")} | {
            "dtype": str(weight.stored).removeprefix("torch."), "sha256": digest(weight)}
    return {"schema": SCHEMA, "format": "dense", "record": record, "tensors": tensors}


def digest(weight):
    """sha256 of a linear's stored bytes, as (R, C) in row-major order."""
    stored = weight.get().to(weight.stored).contiguous()
    return hashlib.sha256(stored.view(-1).view(torch.uint8).numpy()).hexdigest()


def read_manifest(path):
    """The manifest of a finished folder.

    Raises ValueError when there is none, it is damaged, or from another version.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        inside = sorted(f.parent.name for f in Path(path).glob(f"*/{MANIFEST}"))
        raise ValueError(f"{path}: no {MANIFEST}, so no finished oneshot checkpoint"
                         + (" (a run was interrupted here; the same command continues it)"
                            if (Path(path) / WORK).is_dir() else "")
                         + (f"; it holds some: give one of {', '.join(inside)}" if inside else ""))
    try:
        data = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file}: not readable as JSON") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{file}: written by another version of oneshot; prune again")
    if not all(isinstance(data.get(key), dict) for key in ("record", "tensors")):
        raise ValueError(f"{file}: is damaged; prune again")
    return data


def pattern_of(entry):
    """The Pattern that a manifest's entry names."""
    return patterns.parse(entry["pattern"], entry.get("group"))


def write_json(data, path):
    """Write plain values as JSON, whole or not at all."""
    report.write_text(json.dumps(data, indent=1) + "\n", path)


def sync(path):
    """Make a file or folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
