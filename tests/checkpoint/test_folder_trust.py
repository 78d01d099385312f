"""A folder is trusted for what is in it: damaged blocks and files are made again, and nobody's own files are touched.
"""

import json
import os
import shutil

import pytest
import tiny
import torch
from folders import LAST, block, command, flip, interrupted, manifest, same_weights, whole  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import place, plain_pages  # noqa: F401

from oneshot.checkpoint import kept, verify
from oneshot.pipeline import compress, plan
from oneshot.prune import loop

pytestmark = pytest.mark.usefixtures("plain_pages")


# ---------------------------------------------------------------- kept blocks


def header_changed(folder, **changes):
    """The first block with another header, whole but for its seal."""
    file = block(folder, 0)
    with safe_open(file, "pt") as f:
        entries = f.metadata()
    save_file(load_file(file), file, metadata=entries | changes)


def pruned_on_another(folder):
    """Block 1 as a run would keep it whose block 0 was another: whole in itself."""
    state, rows, used, _ = kept.read(block(folder, 1), owner(folder), 1, before_of(folder, 1))
    save_file(state, block(folder, 1), metadata=kept.header(owner(folder), 1, state, rows, used, "0" * 64))


def anothers(folder):
    """Block 1 as another run kept it, as the same number."""
    state, rows, used, _ = kept.read(block(folder, 1), owner(folder), 1, before_of(folder, 1))
    save_file(state, block(folder, 1), metadata=kept.header("other-run", 1, state, rows, used, before_of(folder, 1)))


def owner(folder):
    return json.loads((folder / ".oneshot" / "run.json").read_text())["run_id"]


def before_of(folder, number):
    with safe_open(block(folder, number), "pt") as f:
        return f.metadata()["before"]


def become_a_folder(folder):
    block(folder, 1).unlink()
    block(folder, 1).mkdir()
    (block(folder, 1) / "x").write_text("x")


DAMAGES = {  # the block from which on all are pruned again, and how the damage is done
    "a bit of block 0": (0, lambda f: flip(block(f, 0), -1000)),
    "a bit of block 1": (1, lambda f: flip(block(f, 1), -1)),
    "a bit in the header": (1, lambda f: flip(block(f, 1), 200)),
    "the header's length": (1, lambda f: flip(block(f, 1), 6)),
    "cut off": (1, lambda f: os.truncate(block(f, 1), block(f, 1).stat().st_size // 2)),
    "cut off in the header": (0, lambda f: os.truncate(block(f, 0), 100)),
    "empty": (0, lambda f: os.truncate(block(f, 0), 0)),
    "longer": (0, lambda f: block(f, 0).write_bytes(block(f, 0).read_bytes() + b"\0")),
    "no safetensors": (0, lambda f: block(f, 0).write_bytes(b"{" * 500)),
    "exchanged": (1, lambda f: shutil.copy(block(f, 0), block(f, 1))),
    "swapped": (0, lambda f: (block(f, 0).rename(f / "x"), block(f, 1).rename(block(f, 0)),
                              (f / "x").rename(block(f, 1)))),
    "another run's": (1, anothers),
    "pruned on another": (1, pruned_on_another),
    "gone": (0, lambda f: block(f, 0).unlink()),
    "a folder": (1, become_a_folder),
    "other rows": (0, lambda f: header_changed(f, rows=json.dumps({"layers": [], "block": {}, "warnings": []}))),
    "another number": (0, lambda f: header_changed(f, number="1")),
    "by an older version": (0, lambda f: save_file(load_file(block(f, 0)), block(f, 0), metadata={
        "run_id": owner(f), "rows": "{}"})),
    "no header": (0, lambda f: save_file(load_file(block(f, 0)), block(f, 0))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_block_is_pruned_again_with_all_behind_it(place, whole, tmp_path, monkeypatch, damage):  # noqa: F811
    argv, (first, spoil) = command(place, tmp_path / "out", method="sparsegpt"), DAMAGES[damage]
    interrupted(argv, monkeypatch)
    spoil(tmp_path / "out")
    pruned, real = [], loop.prune_block
    monkeypatch.setattr(loop, "prune_block", lambda job, block, *a: (pruned.append(block.number),
                                                                     real(job, block, *a))[1])
    assert tiny.main(*argv) == 0
    assert pruned == list(range(first, tiny.BLOCKS))
    assert same_weights(tmp_path / "out" / "model.safetensors", whole / "model.safetensors")
    [warning] = manifest(tmp_path / "out")["record"]["warnings"]
    assert warning.startswith(f"block {first}, saved by the interrupted run, ") and "pruned again" in warning
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0


def test_dropped_blocks_do_not_come_back(place, tmp_path, monkeypatch):  # noqa: F811
    argv = command(place, tmp_path / "out")
    interrupted(argv, monkeypatch)
    flip(block(tmp_path / "out", 0), -1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "prune_block", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert tiny.main(*argv) == 130
    assert not block(tmp_path / "out", 0).exists() and not block(tmp_path / "out", 1).exists()


def test_undamaged_blocks_are_kept_without_a_word(place, whole, tmp_path, monkeypatch):  # noqa: F811
    argv = command(place, tmp_path / "out", method="sparsegpt")
    interrupted(argv, monkeypatch)
    assert tiny.main(*argv) == 0
    assert manifest(tmp_path / "out")["record"]["warnings"] == []
    assert same_weights(tmp_path / "out" / "model.safetensors", whole / "model.safetensors")


@pytest.mark.parametrize("spoil", [lambda text: text[:-20], lambda text: text.replace("model-", "madel-"),
                                   lambda text: text.replace('"files"', '"filos"'), lambda text: "[]",
                                   lambda text: "[" * 100_000, lambda text: '{"run_id": 3}'])
def test_damaged_run_file_is_one_line(place, tmp_path, monkeypatch, capfd, spoil):  # noqa: F811
    argv, file = command(place, tmp_path / "out"), tmp_path / "out" / ".oneshot" / "run.json"
    interrupted(argv, monkeypatch)
    file.write_text(spoil(file.read_text()))
    capfd.readouterr()
    assert tiny.main(*argv) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert "run.json is damaged" in error and "--save" in error


# ---------------------------------------------------------------- resumed under other circumstances

@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_resumed_with_other_threads_says_so(place, tmp_path, monkeypatch, threads, capfd):  # noqa: F811
    argv = command(place, tmp_path / "out", method="sparsegpt")
    threads(1)
    interrupted(argv, monkeypatch, after=0)
    threads(2)
    interrupted(argv, monkeypatch, after=1)
    threads(1)
    assert tiny.main(*argv) == 0
    [warning] = manifest(tmp_path / "out")["record"]["warnings"]
    assert warning.startswith("resumed: block 1 was computed with threads 2 (now 1); the result need not be bit-ident")
    assert warning in capfd.readouterr().out


def test_resumed_by_another_version_says_so(place, tmp_path, monkeypatch):  # noqa: F811
    argv, real = command(place, tmp_path / "out"), plan.environment.environment
    with monkeypatch.context() as patch:
        patch.setattr(plan.environment, "environment", lambda device: real(device) | {
            "commit": "0123456789", "torch": "1.0", "device": "another"})
        interrupted(argv, monkeypatch, after=1)
    assert tiny.main(*argv) == 0
    [warning] = manifest(tmp_path / "out")["record"]["warnings"]
    assert "blocks 0 to 1 were computed with commit 0123456789 (now" in warning and "torch 1.0 (now 2" in warning
    assert "device another (now cpu" in warning


def test_batch_size_and_device_are_part_of_the_identity(place, tmp_path, monkeypatch, capfd):  # noqa: F811
    argv = command(place, tmp_path / "out")
    interrupted(argv, monkeypatch)
    assert tiny.main(*argv, "--batch-size", 2) == 2
    assert "holds another run" in capfd.readouterr().err


def test_the_allocation_of_the_kept_blocks_goes_on(place, tmp_path, monkeypatch):  # noqa: F811
    """Computed again, with other threads, it could differ in one zero: blocks and plan would not fit."""
    argv = command(place, tmp_path / "out", "--allocate", "owl", pattern="0.5")
    assert tiny.main(*command(place, tmp_path / "whole", "--allocate", "owl", pattern="0.5")) == 0
    interrupted(argv, monkeypatch, after=0)
    monkeypatch.setattr(compress, "allocated", lambda *args: pytest.fail("allocated again"))
    assert tiny.main(*argv) == 0
    assert same_weights(tmp_path / "out" / "model.safetensors", tmp_path / "whole" / "model.safetensors")
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0
