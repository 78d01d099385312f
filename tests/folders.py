"""Folders of `--save` in the tests: interrupted, finished, spoilt."""

import json

import pytest
import tiny

from oneshot import checkpoint
from oneshot.runtime import sealed

LAST = tiny.BLOCKS - 1


def manifest(folder):
    return json.loads((folder / "oneshot.json").read_text())


def contents_of(folder):
    """Every file below a folder with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def command(place, folder, *more, **changed):
    return tiny.flags(place, "--no-dense", *more, **{"evaluate": "none", "results": folder.parent / "runs"} | changed,
                      save=folder)


def interrupted(argv, monkeypatch, after=1):
    """Run a command until the block number `after` is kept."""
    real = checkpoint.Folder.save_block

    def stopping(self, number, state, rows):
        real(self, number, state, rows)
        if number == after:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Folder, "save_block", stopping)
        assert tiny.main(*argv) == 130


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted result, for copies, and its command."""
    argv = command(place, place / "whole", method="sparsegpt")
    assert tiny.main(*argv) == 0
    return place / "whole"


def same_weights(one, other):
    return one.read_bytes() == other.read_bytes()


def block(folder, number):
    return folder / ".oneshot" / f"block_{number:05d}.safetensors"


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 64
    file.write_bytes(data)


@pytest.fixture
def finished(place, whole, tmp_path):
    """A copy of a finished folder, with a file of the user's in it, and its command."""
    folder = tiny.copy(whole, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    return folder, command(place, folder, method="sparsegpt")


def as_older(folder):
    """The folder as an older oneshot left it."""
    data, _ = sealed.read(folder / "oneshot.json")
    (folder / "oneshot.json").write_text(json.dumps({"schema": 1} | {
        k: v for k, v in data.items() if k not in ("schema", "files", "stored_tensors")}))
