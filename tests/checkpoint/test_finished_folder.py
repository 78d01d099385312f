"""Finished folders that were changed, are older or newer, or hold what is not oneshot's; links and leftovers."""

import json
import os
import shutil

import pytest
import tiny
from folders import LAST, as_older, command, contents_of, finished, flip, interrupted, manifest, same_weights, whole  # noqa: F401
from tiny import place, plain_pages  # noqa: F401

from oneshot.checkpoint import verify
from oneshot.prune import loop
from oneshot.runtime import files, sealed

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json",
                                  "tokenizer_config.json", "report.html"])
@pytest.mark.parametrize("damage", ["gone", "changed", "cut", "a folder"])
def test_finished_folder_that_is_not_whole_is_made_again(finished, whole, capfd, name, damage):  # noqa: F811
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


def test_changed_manifest_is_made_again(finished, whole, capfd):  # noqa: F811
    folder, argv = finished
    file = folder / "oneshot.json"
    file.write_text(file.read_text().replace('"sparsity": 0.5', '"sparsity": 0.9'))
    assert tiny.main(*argv) == 0
    assert "oneshot.json: was changed after it was written: pruning again" in capfd.readouterr().err
    assert manifest(folder)["record"]["sparsity"] == 0.5


def test_older_folder_is_finished_as_far_as_that_shows(finished, capfd):  # noqa: F811
    folder, argv = finished
    as_older(folder)
    assert tiny.main(*argv) == 0 and "stored result" in capfd.readouterr().err
    os.truncate(folder / "model.safetensors", 5000)
    assert tiny.main(*argv) == 0
    assert "finished earlier, but model.safetensors" in capfd.readouterr().err
    assert "files" in manifest(folder) and (folder / "notes.txt").exists()


def test_folder_of_a_newer_version_is_left_alone(finished, capfd):  # noqa: F811
    folder, argv = finished
    (folder / "oneshot.json").write_text(json.dumps(manifest(folder) | {"schema": 99}))
    before = contents_of(folder)
    assert tiny.main(*argv, "--overwrite") == 2
    assert "another version of oneshot" in capfd.readouterr().err and contents_of(folder) == before


def test_overwriting_leaves_the_users_files(finished):  # noqa: F811
    folder, argv = finished
    mine = {"notes.txt": "mine", "eval_results.json": "{}", "more.safetensors": "x", "card.html": "y", "x.model": "z",
            "template.jinja": "j", "sub/config.json": "{}"}
    for name, text in mine.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 0
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert verify.main([str(folder), "--quiet"]) == 0


def test_overwriting_an_older_folder_removes_what_oneshot_writes(finished):  # noqa: F811
    folder, argv = finished
    as_older(folder)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "eval_results.json",
                 "added_tokens.json"):
        (folder / name).write_text("{}")
    assert tiny.main(*argv, "--seed", 1, "--overwrite") == 0
    left = {f.name for f in folder.iterdir()} - set(manifest(folder)["files"])
    assert left == {"oneshot.json", "notes.txt", "eval_results.json", "added_tokens.json"}


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json"])
def test_weights_that_are_not_the_runs_are_refused_before_anything_is_computed(finished, capfd, monkeypatch, name):  # noqa: F811
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
def test_a_manifest_cannot_name_what_lies_elsewhere(finished, tmp_path, how):  # noqa: F811
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


def test_leftovers_in_a_finished_folder_go(finished):  # noqa: F811
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
