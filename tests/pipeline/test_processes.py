"""`torchrun -m oneshot prune`: two processes (gloo) share a run; one that dies ends it, and the command continues."""

import contextlib
import datetime
import os
import signal
import time

import processes
import pytest
import tiny
import torch
from joint_runs import both, command, program

from oneshot import __main__, calibrate
from oneshot.pipeline import api, checks, run
from oneshot.pipeline.fit import command as fit
from oneshot.prune import linear, loop
from oneshot.runtime import distributed
from oneshot.runtime.command import SHARED
from oneshot.settings import flags


def die(rank, number, *argv):
    """The program, in which process `rank` is killed when it comes to block `number`."""
    real = loop.prune_block

    def dying(job, block, *rest, **more):
        if os.environ["RANK"] == str(rank) and block.number == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(job, block, *rest, **more)
    loop.prune_block = dying
    return program(*argv)


def hang(*argv):
    """The program with little patience, in which process 1 does nothing any more when it comes to the second block."""
    distributed.LIMIT = datetime.timedelta(seconds=3)
    real = loop.prune_block

    def hanging(job, block, *rest, **more):
        if os.environ["RANK"] == "1" and block.number == 1:
            time.sleep(6)
            os._exit(9)
        return real(job, block, *rest, **more)
    loop.prune_block = hanging
    return program(*argv)


def wrong(*argv):
    """The program, in which a linear of process 1 cannot be solved."""
    real = linear.solve

    def failing(job, weight, statistics):
        if os.environ["RANK"] == "1":
            raise ValueError(f"{weight.name}: its inputs are not finite")
        return real(job, weight, statistics)
    linear.solve = failing
    return program(*argv)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What tiny.make makes; beside it `two`, the result of two processes, and `one`, that of one."""
    place = tiny.make(tmp_path_factory.mktemp("place"))
    assert both(place, *command(place, place / "two")) == [0, 0], processes.said(place / "said")
    assert tiny.main(*command(place, place / "one")) == 0
    return place


def runs(place, name):
    """{method: record}."""
    return {method: record for (method, _), record in tiny.records(place / f"{name}.runs").items()}


def test_two_processes_give_the_result_of_one(place):
    one, two = runs(place, "one"), runs(place, "two")
    [ppl] = one["sparsegpt"]["metrics"]
    assert two["sparsegpt"]["metrics"][ppl] == pytest.approx(one["sparsegpt"]["metrics"][ppl], rel=1e-3)
    first, other = (tiny.weights(place / name) for name in ("one", "two"))
    same = sum(int(((first[n] == 0) == (other[n] == 0)).sum()) for n in first)
    assert same >= 0.999 * sum(t.numel() for t in first.values())
    assert one["sparsegpt"]["warnings"] == two["sparsegpt"]["warnings"]
    assert [row["name"] for row in one["sparsegpt"]["layers"]] == [row["name"] for row in two["sparsegpt"]["layers"]]
    assert not (place / "two" / ".oneshot").exists()


def test_nothing_but_a_pruned_runs_identity_depends_on_how_many_there_are(place):
    one, two = runs(place, "one"), runs(place, "two")
    assert one["sparsegpt"]["run_id"] != two["sparsegpt"]["run_id"]
    assert one["dense"]["run_id"] == two["dense"]["run_id"] and one["dense"]["metrics"] == two["dense"]["metrics"]
    assert "processes" not in one["sparsegpt"]["environment"] and two["sparsegpt"]["environment"]["processes"] == 2


def test_only_the_first_speaks(place):
    assert (place / "said" / "1.out").read_text() == "" == (place / "said" / "1.err").read_text()
    assert "sparsegpt" in (place / "said" / "0.out").read_text()


@pytest.mark.parametrize("rank, offload", [(0, "disk"), (1, "none")])
def test_a_killed_process_ends_all_and_the_same_command_continues(place, tmp_path, rank, offload):
    argv = command(place, tmp_path / "out", "--no-dense", evaluate="none", offload=offload)
    codes = processes.together(2, tmp_path / "said", die, rank, 2, *argv)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == (1 if rank == 0 else 2)
    said = processes.said(tmp_path / "said").splitlines()
    assert len(said) == rank  # rank 0 says it
    assert not said or (said[0].startswith("error: another process has ended") and "same command resumes" in said[0])
    kept = sorted(file.name for file in (tmp_path / "out" / ".oneshot").glob("block_*"))
    assert kept == ["block_00000.safetensors", "block_00001.safetensors"]
    assert both(tmp_path, *argv) == [0, 0]
    whole, continued = (tiny.weights(folder) for folder in (place / "two", tmp_path / "out"))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_process_that_no_longer_answers_is_not_waited_for(place, tmp_path):
    assert processes.together(2, tmp_path / "said", hang, *command(place, tmp_path / "out")) == [2, 9]
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: another process has ended, or does not answer (") and "imed out" in line


def test_an_error_in_another_process_is_one_line(place, tmp_path):
    assert processes.together(2, tmp_path / "said", wrong, *command(place, tmp_path / "out")) == [2, 2]
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: process 1: model.layers.0.") and "its inputs are not finite" in line


def test_too_few_windows_are_one_line(place, tmp_path):
    argv = command(place, tmp_path / "out", nsamples=2, batch_size=1)
    assert both(tmp_path, *argv, n=3) == [2, 2, 2]
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: torchrun: 2 calibration windows") and "--batch-size" in line


@pytest.mark.parametrize("windows, batch, held, fits", [(5, 4, (), False), (9, 4, (), True), (2, 1, (), False),
                                                        (9, 4, (0,), False), (3, 1, (), True)])
def test_every_process_needs_a_batch_to_train_on(windows, batch, held, fits, monkeypatch):
    monkeypatch.setattr("oneshot.runtime.distributed.ranks", lambda: 3)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=f"^torchrun: {windows} calibration"):
        calibrate.check_parts(windows, batch, held)


def test_help_ends_in_all(tmp_path):
    assert both(tmp_path, "--help") == [0, 0]
    assert (tmp_path / "said" / "1.out").read_text() == "" and "--method" in (tmp_path / "said" / "0.out").read_text()


def test_what_cannot_be_shared_is_refused(monkeypatch, place, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^torchrun: shares the work of"):
        api.prune(None, calibration=torch.zeros(1, 4, dtype=torch.long))
    [cfg] = flags.parse(["--method", "dense"])
    with pytest.raises(ValueError, match=r"^torchrun: shares the work of"):
        run.run(cfg)
    argv = ["--model", place / "model", "--target", "parameters=0.5", "--save", place / "fit"]
    assert fit.main([str(word) for word in argv]) == 2
    assert capsys.readouterr().err.startswith("error: torchrun: shares the work of")
    assert not (place / "fit").exists()
    assert __main__.main(["compare", "nothing"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: torchrun: shares the work of") and ", ".join(SHARED[:-1]) in err
    assert f" and {SHARED[-1]} only" in err
    monkeypatch.setattr("oneshot.runtime.environment.check_device", lambda *args: None)
    with pytest.raises(ValueError, match=r"^--device cuda:1: is one GPU for all"):
        checks.check_devices(flags.build({"method": "wanda", "pattern": "2:4", "device": "cuda:1"}))
