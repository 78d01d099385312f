"""Checkpoints: a pruned model in a folder that `AutoModelForCausalLM.from_pretrained` loads, written crash-safe.

    DIR/.oneshot/lock                      the lock of the process that writes here
    DIR/.oneshot/run.json                  the run_id of the run that writes here, the files in DIR that oneshot wrote,
                                           and the run's plan
    DIR/.oneshot/block_00007.safetensors   a finished block: its tensors, and its rows of the record in the header
    DIR/.oneshot/parts/                    the next block while it is being written (safetensors has files of its own)
    DIR/.oneshot/heal/                     checkpoints of healing on text (heal/text/)
    DIR/.oneshot/final/                    the checkpoint while it is being written
    DIR/oneshot.json                       the manifest, moved into place last: only a finished folder has it

Every file is written under a temporary name, synced and renamed, so that a kill at any moment leaves no incomplete file
under its final name.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ..models import OnDisk, Tokenizer, source_of
from ..prune import patterns
from ..runtime import sealed
from ..runtime.files import remove, remove_parts, sync, umask, write_text
from . import compressed, contents, gguf, kept, owner, packed, rounded, shards
from .lock import FolderLock, saving
from .manifest import MANIFEST, WORK, manifest, old, read_manifest, read_sealed
from .outcome import check_saved, copy_side_files
from .owner import Own, clear, owner_of

Plan = dict[str, patterns.Pattern]


class Folder:
    """The folder that `--save` names, locked for one run. Except for the lock, nothing in it changes before the run's
    first block is saved or its search has found something.

    overwrite: whether it may replace the result of another run. lock: the folder's lock, if the caller holds it;
    otherwise the Folder takes it and keeps it until `release`.

    computed_with: plain values that the bits of a block depend on (threads, device, versions), saved with each block.
    plan: the run's plan if it was computed from data, saved with the first block. scales: of rounded linears. disk:
    where the model's blocks are, if they are on disk; it is told where they go. earlier: the seconds that earlier
    processes took for what this one takes over from them.

    Raises ValueError naming `--save` when the folder holds another run or anything else, or when another process
    writes into it.
    """

    def __init__(self, path: str | Path, run_id: str, overwrite: bool = False, lock: FolderLock | None = None) -> None:
        self.path, self.run_id = Path(path), run_id
        self.work = self.path / WORK
        self.computed_with: dict = {}
        self.plan: Plan | None = None
        self.scales: dict = {}
        self.disk: OnDisk | None = None
        self.earlier = 0.0
        self._found: dict[str, tuple[Any, float]] = {}  # what a search has found so far, and the seconds that took
        self._used: list[dict] = []  # what each kept block was computed with
        self._first: dict = {}  # what the kept plan was computed with
        self._seal, self._warnings = "", []  # of the last kept block; of those that were dropped
        self._lock, self._own_lock = lock or FolderLock(path), lock is None
        try:
            self._open(overwrite)
        except BaseException:
            self.release()
            raise

    def _open(self, overwrite: bool) -> None:
        """Check what is in the folder, now that no other process can change it."""
        found = owner_of(self.path)
        if found not in (None, self.run_id) and not overwrite:
            raise ValueError(f"--save {self.path}: holds another run ({found}); --overwrite replaces it")
        self.ours, self.claimed = found == self.run_id, False
        self._own = owner.own_files(self.path)
        self._noted = owner.read_run(self.path) if self.ours else {}
        self._found = dict(self._noted.get("found", {}))
        self.finished = self.ours and (self.path / MANIFEST).is_file() and not self.faults
        if not self.finished:
            owner.check_foreign(self.path, self._own)
        else:  # left by a run that was killed at its very end, or when it began to replace this one
            self.drop_work()
        remove_parts(self.path)

    def release(self) -> None:
        """Release the lock, if this object took it."""
        if self._own_lock:
            self._lock.release()

    @functools.cached_property
    def faults(self) -> list[str]:
        """If this run finished earlier: one line for each file or tensor that is not as it was written.

        Every file is hashed, which takes as long as the fingerprint of the input model that each run computes.
        """
        if not (self.ours and (self.path / MANIFEST).is_file()):
            return []
        try:
            data, whole = read_sealed(self.path)
        except ValueError as error:
            return [str(error)]
        found = contents.absent(self.path) if old(data) else contents.differences(self.path, data)
        return [str(fault) for fault in found] + ([] if whole else [f"{MANIFEST}: was changed after it was written"])

    @property
    def record(self) -> dict:
        """The record of the finished run."""
        return read_manifest(self.path)["record"]

    def kept_plan(self) -> Plan | None:
        """The plan that the saved blocks were pruned by, if there is one: an allocation that is computed again, say
        with more threads, may differ by one zero."""
        if not (self.ours and self._block(0).is_file() and self._noted.get("plan")):
            return None
        self._first = self._noted["computed_with"]
        return {name: patterns.parse(*entry) for name, entry in self._noted["plan"].items()}

    def found(self, key: str, look: Callable[[], Any]) -> Any:
        """What a search finds under a key, plain values: what the interrupted run noted, else `look()`, noted then."""
        if key in self._found:
            self._first = self._noted.get("computed_with", {})
            self.earlier += self._noted.get("found", {}).pop(key, (None, 0.0))[1]
            return self._found[key][0]
        began = time.perf_counter() + self.earlier  # which grows where a search within this one was noted
        value = look()
        self._found[key] = value, time.perf_counter() + self.earlier - began
        if self.claimed or not self._own.removable:  # a finished model stays until there is a block
            self._lock.check()
            with saving(self.path):
                self.claim()
                self._note()
        return value

    def blocks(self) -> Iterator[tuple[kept.State, dict]]:
        """Yield (state dict, rows of the record) of the blocks finished so far, in order.

        The first block that is not as it was saved is removed together with all later ones; see `warnings`.
        """
        number = 0
        while self.ours and any(later >= number for later in self._numbers()):
            try:
                state, rows, used, self._seal = kept.read(self._block(number), self.run_id, number, self._seal,
                                                          bool(self.disk))
            except kept.Damaged as why:
                self._drop_from(number, f"block {number}, saved by the interrupted run, {why}; it is pruned again, and "
                                        "so are all later ones")
                return
            self._used.append(used)
            if self.disk:
                state = self.disk.local(number, state)
                self.disk.moved(number, self._block(number))
            self.earlier += sum(rows["block"]["seconds"].values())
            yield state, rows
            number += 1

    def warnings(self) -> list[str]:
        """What the record should say of the saved blocks: those that were removed, those computed otherwise."""
        plan = kept.other_circumstances("its search was", self._first, self.computed_with) if self._first else []
        return self._warnings + plan + kept.of_blocks(self._used, self.computed_with)

    def _block(self, number: int) -> Path:
        """The file of a block."""
        return self.work / kept.name_of(number)

    def _numbers(self) -> list[int]:
        """The numbers of the saved blocks."""
        return sorted(int(file.stem.removeprefix("block_")) for file in self.work.glob("block_*.safetensors")
                      if owner.WORK_FILES.fullmatch(file.name))

    @property
    def next_block(self) -> int:
        """The number of the block to be saved next."""
        return len(self._numbers()) if self.ours else 0

    def _drop_from(self, number: int, why: str) -> None:
        """Remove the saved blocks from `number` on."""
        with saving(self.path):
            for later in self._numbers():
                if later >= number:
                    remove(self._block(later))
        self._warnings.append(why)

    def claim(self) -> None:
        """Mark the folder as this run's, then remove what earlier runs left, so that it always has an owner."""
        if not self.claimed:
            self._note()
            if not self.ours:
                self.drop_work(but=owner.RUN)
            remove(self.work / "parts")
            (self.work / "parts").mkdir()
            if self.disk:
                shards.check_links(self.work / "parts")
            clear(self.path, self._own.removable)
            self.ours = self.claimed = True

    def heal_folder(self) -> Path:
        """The folder for what is needed to resume healing on text, made if it is not there."""
        self._lock.check()
        self.claim()
        (self.work / "heal").mkdir(exist_ok=True)
        return self.work / "heal"

    def _note(self) -> None:
        """Write run.json."""
        plan = {name: [str(p), p.group] for name, p in self.plan.items()} if self.plan else None
        sealed.write({"run_id": self.run_id, "files": sorted(self._own.removable), "nameless": self._own.nameless,
                      "computed_with": self._first or self.computed_with, "plan": plan,
                      **({"found": self._found} if self._found else {})}, self.work / owner.RUN)

    def save_block(self, number: int, state: kept.State, rows: dict) -> None:
        """Save a finished block, its state dict and its rows of the record; an interrupted run resumes after it."""
        with saving(self.path):
            self._lock.check()
            self.claim()
            state = self.disk.named(number, state) if self.disk else state
            state = {k: v.contiguous() for k, v in state.items()}
            header = kept.header(self.run_id, number, state, rows, self.computed_with, self._seal, bool(self.disk))
            part = self.work / "parts" / kept.name_of(number)
            save_file(state, part, metadata=header)
            sync(part)
            os.replace(part, self._block(number))
            if self.disk:
                self.disk.moved(number, self._block(number))
            self._seal = header["seal"]

    def finish(self, model: nn.Module, tokenizer: Tokenizer, record: dict, form: str = "dense",
               page: Callable[[dict], str] | None = None, more: dict | None = None) -> dict:
        """Write checkpoint, page and manifest, move them into place, remove the work files; returns the saved record.

        form: "dense" (zeros are stored), "packed" or "compressed-tensors" (linears are replaced in the model, see
        packed.py and compressed.py), or one of gguf.FORMS (a GGUF file beside it). page: returns the text of
        report.html for a record. more: further entries of the manifest.

        Raises OSError naming `--save` if writing fails, ProofError if what was saved is not the model.
        """
        data = manifest(model, record) | (more or {})
        if form in ("packed", compressed.METHOD):
            kind = packed if form == "packed" else compressed
            data |= kind.pack_checkpoint(model, data["tensors"], self.scales)
            record = data["record"] = record | {"packed": data["packed"], "warnings": record["warnings"] + [
                f"{name}: stays dense in the packed checkpoint ({why})" for name, why in data["left_dense"].items()
            ] + data.pop("warnings", [])}
        with saving(self.path):
            self._lock.check()
            self.claim()
            final = self.work / "final"
            remove(final)
            if self.disk:
                shards.write(final, model, self.disk, [*map(self._block, range(self.disk.blocks))])
            else:
                model.save_pretrained(final)
            tokenizer.save_pretrained(final)
            check_saved(final, model, source_of(model), compressed.replaced(model))
            copy_side_files(source_of(model).folder, final)
            rounded.write(final, self.scales)
            if form in gguf.FORMS:
                data |= gguf.write(final, model, tokenizer, form, data, self.scales)
                record = data["record"] = record | {"warnings": record["warnings"] + data.pop("warnings")}
            if page:
                write_text(page(record), final / "report.html")
            data |= contents.describe(final)
            sealed.write(data, final / MANIFEST)
            self._move(final, list(data["files"]))
        if self.disk:
            shards.moved(self.disk, self.path)
        self.drop_work()
        return record

    def _move(self, final: Path, names: list[str]) -> None:
        """Move the files of these names and the manifest into place. Raises ValueError for a foreign file there."""
        last = ["config.json", MANIFEST]  # without the former nothing loads, without the latter nothing is finished
        names = [name for name in names if name not in last] + last
        owner.refuse_foreign(self.path, [name for name in names if name not in self._own.replaceable and (
            contents.inside(self.path, name) is None or os.path.lexists(self.path / name))])
        self._own = Own(self._own.removable | {*names}, self._own.replaceable | {*names}, self._own.nameless)
        self._note()
        for name in names:
            (final / name).chmod(0o666 & ~umask())  # safetensors writes 0600
            sync(final / name)
            (self.path / name).parent.mkdir(exist_ok=True, parents=True)
            os.replace(final / name, self.path / name)
        sync(self.path)

    def drop_work(self, but: str = "") -> None:
        """Remove the work files of any run: those with the names that oneshot gives them, and nothing else."""
        for file in list(self.work.iterdir()) if self.work.is_dir() else ():
            if file.name != but and owner.WORK_FILES.fullmatch(file.name):
                with contextlib.suppress(OSError):
                    remove(file)
