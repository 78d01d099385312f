"""The folder of `--save`: killed at any moment it never looks finished, and the same command ends bit-identical."""

import errno
import json
import os
import signal

import killed_runs
import processes
import pytest
import tiny
import torch
from safetensors import SafetensorError, safe_open
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM

from oneshot import checkpoint
from oneshot.checkpoint import folder as writer
from oneshot.checkpoint import verify
from oneshot.data import windows
from oneshot.measure import perplexity
from oneshot.prune import loop
from oneshot.settings import flags

pytestmark = pytest.mark.usefixtures("plain_pages")


def manifest(folder):
    return json.loads((folder / "oneshot.json").read_text())


def untouched(folder):
    """Every file below a folder with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def looks_unfinished(folder):
    return verify.main([str(folder)]) == 2 and not (folder / "oneshot.json").exists()


# ---------------------------------------------------------------- SIGKILL

@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(place, what killed_runs reports), on a model stored in bfloat16: what is replayed must be what was saved."""
    place = tiny.make(tmp_path_factory.mktemp("killed"))  # noqa: F811
    tiny.save_model(place / "model", dtype=torch.bfloat16)
    done = processes.script(killed_runs.__file__, place, ",".join(killed_runs.MOMENTS), folder=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("moment", killed_runs.MOMENTS)
def test_killed_run_continues_to_the_same_bits(killed, moment):
    place, told = killed  # noqa: F811
    (code, before), (continued, after) = told[moment]
    assert (code, continued) == (-signal.SIGKILL, 0)
    kept = {"claimed": 0, "first-block": 1, "within-a-block": 1}.get(moment, tiny.BLOCKS)
    assert after == tiny.BLOCKS - kept, "finished blocks are pruned again, or lost"
    assert before == {"claimed": 1, "first-block": 1, "within-a-block": 2}.get(moment, tiny.BLOCKS)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (place / moment / name).read_bytes() == (place / "whole" / name).read_bytes()
    ours, whole = manifest(place / moment), manifest(place / "whole")
    assert ours["tensors"] == whole["tensors"]
    timeless = [{k: v for k, v in row.items() if k not in ("seconds", "info")} for row in whole["record"]["layers"]]
    assert timeless == [{k: v for k, v in row.items() if k not in ("seconds", "info")}
                        for row in ours["record"]["layers"]]
    assert ours["record"]["metrics"] == whole["record"]["metrics"]
    assert verify.main([str(place / moment), "--quiet"]) == 0


@pytest.mark.parametrize("moment", [m for m in killed_runs.MOMENTS if m != "cleaning"])
def test_killed_run_looks_unfinished(killed, moment, capfd):
    folder = killed[0] / f"{moment}.killed"
    assert looks_unfinished(folder)
    assert "interrupted" in capfd.readouterr().err
    if moment != "before-manifest":  # there the checkpoint is whole, and only the proof is missing
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
    for file in (folder / ".oneshot").glob("block_*.safetensors"):
        safe_open(file, "pt")  # a file under its final name is whole


def test_whole_run_leaves_no_work_files(killed):
    assert not (killed[0] / "whole" / ".oneshot").exists()
    assert {"model.safetensors", "config.json", "oneshot.json", "report.html", "generation_config.json",
            "tokenizer.json"} <= {f.name for f in (killed[0] / "whole").iterdir()}


# ---------------------------------------------------------------- who owns the folder

@pytest.fixture
def finished(place, tmp_path):  # noqa: F811
    """A finished folder and its command line."""
    argv = tiny.flags(place, save=tmp_path / "out", results=tmp_path / "runs")
    assert tiny.main(*argv) == 0
    return tmp_path / "out", argv


def test_finished_folder_prints_the_stored_result_without_computing(finished, capfd, monkeypatch):
    folder, argv = finished
    capfd.readouterr()
    assert tiny.main(*argv) == 0
    before, (first, _) = untouched(folder.parent), capfd.readouterr()

    def computing(*args, **kwargs):
        raise AssertionError("computed again")
    for owner, name in ((loop, "prune_model"), (perplexity, "token_losses"), (windows, "sample_from_model")):
        monkeypatch.setattr(owner, name, computing)
    assert tiny.main(*argv) == 0
    again, remark = capfd.readouterr()
    assert again == first and "stored result" in remark
    assert untouched(folder.parent) == before
    record = next((folder.parent / "runs").glob("*wanda*.json"))
    record.unlink()
    assert tiny.main(*argv) == 0
    assert record.is_file()


def test_calibration_on_itself_is_not_sampled_again(place, tmp_path, monkeypatch):  # noqa: F811
    argv = tiny.flags(place, save=tmp_path / "out", results=tmp_path / "runs", calibration="self")
    assert tiny.main(*argv) == 0
    monkeypatch.setattr(windows, "sample_from_model", lambda *args: pytest.fail("sampled again"))
    assert tiny.main(*argv) == 0


def test_another_command_is_refused_unless_it_overwrites(finished, capfd):
    folder, argv = finished
    before = untouched(folder)
    capfd.readouterr()
    assert tiny.main(*argv, "--nsamples", 4) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert "--overwrite" in error
    assert untouched(folder) == before
    assert tiny.main(*argv, "--nsamples", 4, "--overwrite") == 0
    assert manifest(folder)["record"]["settings"]["nsamples"] == 4
    assert set(untouched(folder)) == set(before)
    assert verify.main([str(folder), "--quiet"]) == 0


def test_overwriting_destroys_nothing_before_it_has_something(finished, monkeypatch):
    folder, argv = finished
    before = untouched(folder)
    monkeypatch.setattr(loop, "prune_block", interrupt)
    assert tiny.main(*argv, "--nsamples", 4, "--overwrite") == 130
    assert untouched(folder) == before


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_interrupted_overwriting_belongs_to_the_new_command(finished, place, monkeypatch, capfd):  # noqa: F811
    """Its own blocks count, those of the run it replaces do not."""
    folder, argv = finished
    other = [*argv, "--method", "magnitude", "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Folder, "finish", interrupt)
        assert tiny.main(*argv, "--pattern", "4:8", "--overwrite") == 130  # all of its blocks are there
    assert len(list((folder / ".oneshot").glob("block_*"))) == tiny.BLOCKS
    with monkeypatch.context() as patch:
        patch.setattr(writer, "clear", interrupt)
        assert tiny.main(*other) == 130
    assert looks_unfinished(folder)
    assert tiny.main(*argv) == 2
    assert tiny.main(*other) == 0
    record = manifest(folder)["record"]
    assert {row["pattern"] for row in record["layers"]} == {"2:4"} and record["settings"]["method"] == "magnitude"
    assert verify.main([str(folder), "--quiet"]) == 0


def test_several_runs_get_a_folder_each(place, tmp_path):  # noqa: F811
    argv = tiny.flags(place, "--no-dense", method="magnitude,wanda", pattern="0.5,2:4", save=tmp_path / "out",
                      results=tmp_path / "runs", evaluate="none")
    assert tiny.main(*argv) == 0
    found = {f.name: manifest(f)["record"]["settings"] for f in (tmp_path / "out").iterdir()}
    assert set(found) == {"magnitude-0.5", "magnitude-2of4", "wanda-0.5", "wanda-2of4"}
    assert all(f"{s['method']}-{s['pattern'].replace(':', 'of')}" == name for name, s in found.items())


# ---------------------------------------------------------------- a full disk

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*args, **kwargs):
    raise SafetensorError("Error while serializing: No space left on device (os error 28)")


@pytest.mark.parametrize(("owner", "name", "failure", "allowed"), [
    (writer, "save_file", full_in_rust, 1), (writer, "save_file", full, 0), (writer, "sync", full, 2),
    (writer, "manifest", full, 0), (torch.nn.Module, "save_pretrained", full_in_rust, 0),
    (writer.sealed, "write", full, 1), (os, "replace", full, 6)], ids=lambda x: getattr(x, "__name__", x))
def test_full_disk(place, tmp_path, monkeypatch, capfd, owner, name, failure, allowed):  # noqa: F811
    argv = tiny.flags(place, "--no-dense", save=tmp_path / "out", results=tmp_path / "runs")
    if owner is torch.nn.Module:
        owner = AutoModelForCausalLM.from_pretrained(place / "model").__class__
    with monkeypatch.context() as patch:
        real, calls = getattr(owner, name), []

        def failing(*args, **kwargs):
            calls.append(args)
            return real(*args, **kwargs) if len(calls) <= allowed else failure()
        patch.setattr(owner, name, failing)
        capfd.readouterr()
        assert tiny.main(*argv) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert error.startswith("error: ") and "No space left" in error
    assert looks_unfinished(tmp_path / "out")
    assert not list((tmp_path / "runs").glob("*.json")), "a record says it is finished"
    assert tiny.main(*argv) == 0
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0


def test_folder_is_owned_from_its_first_block_on(tmp_path):
    folder = checkpoint.Folder(tmp_path / "out", "a")
    assert [*untouched(tmp_path / "out")] == [".oneshot/lock"] and not folder.finished and list(folder.blocks()) == []
    folder.release()
    assert not (tmp_path / "out").exists()
    folder = checkpoint.Folder(tmp_path / "out", "a")
    block = torch.nn.Linear(4, 4)
    folder.save_block(0, block.state_dict(), {"layers": [], "block": {"seconds": {"solve": 2.0}}})
    folder.release()
    again = checkpoint.Folder(tmp_path / "out", "a")
    [(state, rows)] = again.blocks()
    again.release()
    assert torch.equal(state["weight"], block.weight) and again.earlier == 2.0
    assert rows == {"layers": [], "block": {"seconds": {"solve": 2.0}}}
    with pytest.raises(ValueError, match=r"holds another run \(a\)"):
        checkpoint.Folder(tmp_path / "out", "b")


def test_what_a_search_found_is_kept(tmp_path):
    """Plain values under a key, looked up once; another run does not see them."""
    folder, asked = checkpoint.Folder(tmp_path / "out", "a"), []

    def look(value):
        asked.append(value)
        return value
    assert [folder.found(key, lambda key=key: look([key, 0.1])) for key in ("x", "y", "x")] == [
        ["x", 0.1], ["y", 0.1], ["x", 0.1]]
    folder.release()
    again = checkpoint.Folder(tmp_path / "out", "a")
    assert again.found("y", lambda: look(None)) == ["y", 0.1] and again.found("z", lambda: look(3)) == 3
    again.release()
    other = checkpoint.Folder(tmp_path / "out", "b", overwrite=True)
    assert other.found("x", lambda: look(4)) == 4
    other.release()
    assert asked == [["x", 0.1], ["y", 0.1], 3, 4]


def test_a_search_leaves_a_finished_model_alone_until_there_is_a_block(finished):
    folder, _ = finished
    before = untouched(folder)
    new = checkpoint.Folder(folder, "another", overwrite=True)
    assert new.found("x", lambda: 1) == 1
    new.release()
    assert untouched(folder) == before


def test_run_id_is_in_the_manifest(finished):
    folder, argv = finished
    record = manifest(folder)["record"]
    assert checkpoint.owner_of(folder) == record["run_id"]
    cfg = flags.parse(argv)[0]
    calibration, evaluation = (t["sha256"] for t in (record["data"]["calibration"],
                                                     record["data"]["evaluation"]["evaluation"]))
    assert cfg.run_id(record["model"]["fingerprint"], calibration, evaluation) == record["run_id"]


def test_seconds_of_earlier_processes_count_once(tmp_path, monkeypatch):
    """A search within another, the outer one killed, then repeated: what was noted counts with its seconds."""
    now = [0.0]
    monkeypatch.setattr(writer.time, "perf_counter", lambda: now[0])

    def look(seconds, value, folder=None, inner=None, end=True):
        def done():
            found = folder.found("inner", inner) if folder else None
            now[0] += seconds
            if not end:
                raise KeyboardInterrupt
            return [value, found]
        return done
    killed = writer.Folder(tmp_path / "out", "run")
    with pytest.raises(KeyboardInterrupt):
        killed.found("outer", look(50, 1, killed, look(7, 2), end=False))
    killed.release()
    assert killed.earlier == 0
    second = writer.Folder(tmp_path / "out", "run")
    assert second.found("outer", look(20, 1, second, look(7, 2))) == [1, [2, None]] and second.earlier == 7
    assert second.found("inner", None) == [2, None] and second.earlier == 7
    second.release()
    third = writer.Folder(tmp_path / "out", "run")
    assert third.found("outer", None) == [1, [2, None]] and third.earlier == 27
    third.release()
