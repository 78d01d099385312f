"""A folder is trusted for what is in it: damaged blocks and files are made again, and nobody's own files are touched.
"""

import json
import os
import shutil

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import place, plain_pages  # noqa: F401

from oneshot import checkpoint
from oneshot.checkpoint import kept, verify
from oneshot.pipeline import compress, plan
from oneshot.prune import loop
from oneshot.runtime import files, sealed

pytestmark = pytest.mark.usefixtures("plain_pages")
LAST = tiny.BLOCKS - 1


def manifest(folder):
    return json.loads((folder / "oneshot.json").read_text())


def contents_of(folder):
    """Every file below a folder with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def command(place, folder, *more, **changed):  # noqa: F811
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
def whole(place):  # noqa: F811
    """An uninterrupted result, for copies, and its command."""
    argv = command(place, place / "whole", method="sparsegpt")
    assert tiny.main(*argv) == 0
    return place / "whole"


def same_weights(one, other):
    return one.read_bytes() == other.read_bytes()


# ---------------------------------------------------------------- kept blocks

def block(folder, number):
    return folder / ".oneshot" / f"block_{number:05d}.safetensors"


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 64
    file.write_bytes(data)


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


# ---------------------------------------------------------------- finished earlier

@pytest.fixture
def finished(place, whole, tmp_path):  # noqa: F811
    """A copy of a finished folder, with a file of the user's in it, and its command."""
    folder = tiny.copy(whole, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    return folder, command(place, folder, method="sparsegpt")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json",
                                  "tokenizer_config.json", "report.html"])
@pytest.mark.parametrize("damage", ["gone", "changed", "cut", "a folder"])
def test_finished_folder_that_is_not_whole_is_made_again(finished, whole, capfd, name, damage):
    folder, argv = finished
    file = folder / name
    if damage == "changed":
        flip(file, file.stat().st_size // 2)
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
    capfd.readouterr()
    code, told = tiny.main(*argv), tiny.said(capfd.readouterr().err)
    if damage == "a folder":  # it may hold anything
        assert code == 2 and len(told) == 1 and name in told[0]
        return
    assert code == 0 and any("finished earlier, but " in line and "pruning again" in line for line in told)
    assert same_weights(folder / "model.safetensors", whole / "model.safetensors")
    assert verify.main([str(folder), "--quiet"]) == 0 and (folder / "notes.txt").read_text() == "mine"
    capfd.readouterr()
    assert tiny.main(*argv) == 0 and "finished earlier, stored result" in capfd.readouterr().err


def test_changed_manifest_is_made_again(finished, whole, capfd):
    folder, argv = finished
    file = folder / "oneshot.json"
    file.write_text(file.read_text().replace('"sparsity": 0.5', '"sparsity": 0.9'))
    assert tiny.main(*argv) == 0
    assert "oneshot.json: was changed after it was written: pruning again" in capfd.readouterr().err
    assert manifest(folder)["record"]["sparsity"] == 0.5


def as_older(folder):
    """The folder as an older oneshot left it."""
    data, _ = sealed.read(folder / "oneshot.json")
    (folder / "oneshot.json").write_text(json.dumps({"schema": 1} | {
        k: v for k, v in data.items() if k not in ("schema", "files", "stored_tensors")}))


def test_older_folder_is_finished_as_far_as_that_shows(finished, capfd):
    folder, argv = finished
    as_older(folder)
    assert tiny.main(*argv) == 0 and "stored result" in capfd.readouterr().err
    os.truncate(folder / "model.safetensors", 5000)
    assert tiny.main(*argv) == 0
    assert "finished earlier, but model.safetensors" in capfd.readouterr().err
    assert "files" in manifest(folder) and (folder / "notes.txt").exists()


def test_folder_of_a_newer_version_is_left_alone(finished, capfd):
    folder, argv = finished
    (folder / "oneshot.json").write_text(json.dumps(manifest(folder) | {"schema": 99}))
    before = contents_of(folder)
    assert tiny.main(*argv, "--overwrite") == 2
    assert "another version of oneshot" in capfd.readouterr().err and contents_of(folder) == before


# ---------------------------------------------------------------- what is removed

def test_overwriting_leaves_the_users_files(finished):
    folder, argv = finished
    mine = {"notes.txt": "mine", "eval_results.json": "{}", "more.safetensors": "x", "card.html": "y", "x.model": "z",
            "template.jinja": "j", "sub/config.json": "{}"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 0
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert verify.main([str(folder), "--quiet"]) == 0


def test_overwriting_an_older_folder_removes_what_oneshot_writes(finished):
    folder, argv = finished
    as_older(folder)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "eval_results.json",
                 "added_tokens.json"):
        (folder / name).write_text("{}")
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 0
    left = {f.name for f in folder.iterdir()} - set(manifest(folder)["files"])
    assert left == {"oneshot.json", "notes.txt", "eval_results.json", "added_tokens.json"}


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_weights_that_are_not_the_runs_are_refused_before_anything_is_computed(finished, capfd, monkeypatch, name):
    folder, argv = finished
    (folder / name).write_text("mine")
    before = contents_of(folder)
    monkeypatch.setattr(loop, "prune_model", lambda *args, **kwargs: pytest.fail("computed"))
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 2
    assert name in capfd.readouterr().err and contents_of(folder) == before


def test_a_file_in_the_way_of_a_side_file_is_not_replaced(place, tmp_path, monkeypatch, capfd):  # noqa: F811
    model = tiny.copy(place / "model", tmp_path / "model")
    folder, argv = tmp_path / "out", command(place, tmp_path / "out", model=model)
    assert tiny.main(*argv) == 0
    (folder / "LICENSE").write_text("mine")
    (model / "LICENSE").write_text("the model's")
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 2
    assert "holds LICENSE, which oneshot did not put there" in capfd.readouterr().err
    assert (folder / "LICENSE").read_text() == "mine"
    (folder / "LICENSE").rename(tmp_path / "LICENSE")
    monkeypatch.setattr(loop, "prune_block", lambda *args: pytest.fail("pruned again"))
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 0
    assert (folder / "LICENSE").read_text() == "the model's" and "LICENSE" in manifest(folder)["files"]


@pytest.mark.parametrize("how", ["{up}/victim.txt", "{absolute}", "link/victim.txt", ".oneshot/victim.txt"])
def test_a_manifest_cannot_name_what_lies_elsewhere(finished, tmp_path, how):
    folder, argv = finished
    victim = tmp_path / "victims" / "victim.txt"
    victim.parent.mkdir()
    victim.write_text("mine")
    (folder / "link").symlink_to(victim.parent)
    (folder / ".oneshot").mkdir()
    (folder / ".oneshot" / "victim.txt").write_text("mine")
    data, _ = sealed.read(folder / "oneshot.json")
    data["files"][how.format(up="../victims", absolute=victim)] = {"bytes": 4, "sha256": "0"}
    sealed.write(data, folder / "oneshot.json")
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 0
    assert victim.read_text() == "mine" and (folder / ".oneshot" / "victim.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "file", "dangling"])
def test_work_files_behind_a_link_are_refused(place, tmp_path, capfd, kind):  # noqa: F811
    victim = tmp_path / "victim"
    (victim / "final").mkdir(parents=True)
    (victim / "final" / "thesis.tex").write_text("mine")
    (tmp_path / "out").mkdir()
    work = tmp_path / "out" / ".oneshot"
    if kind == "file":
        work.write_text("mine")
    else:
        work.symlink_to(victim if kind == "link" else tmp_path / "nowhere")
    assert tiny.main(*command(place, tmp_path / "out")) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert ".oneshot in it is" in error and "--save" in error
    assert (victim / "final" / "thesis.tex").read_text() == "mine" and len(list(victim.iterdir())) == 1


def test_links_among_the_work_files_are_not_followed(place, tmp_path, monkeypatch):  # noqa: F811
    argv, work, victim = command(place, tmp_path / "out"), tmp_path / "out" / ".oneshot", tmp_path / "victim"
    interrupted(argv, monkeypatch)
    victim.mkdir()
    (victim / "thesis.tex").write_text("mine")
    (work / "final").symlink_to(victim)
    shutil.rmtree(work / "parts")
    (work / "parts").symlink_to(victim)
    assert tiny.main(*argv) == 0
    assert contents_of(victim) == {"thesis.tex": b"mine"} and not work.exists()


def test_work_files_of_a_dead_run_go_and_nothing_else(place, tmp_path, monkeypatch):  # noqa: F811
    argv, work = command(place, tmp_path / "out"), tmp_path / "out" / ".oneshot"
    interrupted(argv, monkeypatch)
    (work / "final").mkdir()
    (work / "final" / "model.safetensors").write_text("half")
    (work / "block_00009.safetensors").write_text("of a larger model")
    (work / "mine.txt").write_text("mine")
    other = [*argv, "--method", "magnitude", "--overwrite"]
    interrupted(other, monkeypatch, after=0)
    assert sorted(f.name for f in work.iterdir()) == ["block_00000.safetensors", "mine.txt", "parts", "run.json"]
    assert tiny.main(*other) == 0
    assert [f.name for f in work.iterdir()] == ["mine.txt"]
    assert manifest(tmp_path / "out")["record"]["warnings"] == []


def test_leftovers_in_a_finished_folder_go(finished):
    folder, argv = finished
    work = folder / ".oneshot"
    (work / "final").mkdir(parents=True)
    (work / "parts").mkdir()
    for name in ("lock", "block_00000.safetensors", "final/config.json", ".run.json.99999999.part", "parts/.tmpAbCd"):
        (work / name).write_text("")
    assert tiny.main(*argv) == 0
    assert not work.exists()


def test_parts_of_killed_processes_go_and_nothing_else(place, tmp_path):  # noqa: F811
    runs, dead = tmp_path / "runs", 99999999
    runs.mkdir()
    stay = [f".a.json.{os.getpid()}.part", f".film.mp4.{dead}.part", f"a.json.{dead}.part", ".a.json.part", "a.part"]
    for name in [*stay, f".a.json.{dead}.part", f".b.html.{dead}.part"]:
        (runs / name).write_text("half")
    (runs / f".folder.json.{dead}.part").mkdir()
    (runs / f".link.json.{dead}.part").symlink_to(runs / "a.part")
    with open(runs / f".c.json.{dead}.part", "w") as open_file:  # another machine's: locked, its number unknown here
        assert files.try_lock(open_file.fileno())
        assert tiny.main(*command(place, tmp_path / "out")) == 0
    left = {f.name for f in runs.iterdir() if f.name.endswith(".part")}
    assert left == {*stay, f".folder.json.{dead}.part", f".link.json.{dead}.part", f".c.json.{dead}.part"}


def test_files_in_folders_below_are_hashed_moved_and_removed_too(place, tmp_path):  # noqa: F811
    model, folder = tiny.copy(place / "model", tmp_path / "model"), tmp_path / "out"
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(model)
    argv = command(place, folder, model=model)
    assert tiny.main(*argv) == 0
    nested = folder / "additional_chat_templates" / "tool_use.jinja"
    assert nested.is_file() and "additional_chat_templates/tool_use.jinja" in manifest(folder)["files"]
    assert verify.main([str(folder), "--quiet"]) == 0
    nested.write_text("{{ other }}")
    assert verify.main([str(folder), "--quiet"]) == 1
    assert tiny.main(*argv) == 0 and nested.read_text() == "{{ tools }}"
    assert tiny.main(*command(place, folder, "--overwrite")) == 0
    assert not nested.parent.exists()
