"""A sweep that is killed, workers that die, and the tasks of a Slurm array."""

import json
import os
import subprocess
from pathlib import Path

import processes
import pytest
import sweep
import workers
from sweeping import rows, write
from tiny import place  # noqa: F401


@pytest.mark.parametrize(("given", "gpus", "seen"), [
    (None, 0, [None, None]), (None, 1, [None, None]), (None, 2, ["0", "1", "0"]), ("3,5", 8, ["3", "5", "3"]),
    ("4", 1, [None])])
def test_workers_share_the_gpus_out(monkeypatch, given, gpus, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given) if given else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: gpus)
    assert [workers.gpu(i) for i in range(len(seen))] == seen


@pytest.fixture(scope="module")
def killed(place, tmp_path_factory):  # noqa: F811
    """What killed_sweep.py tells, what the second sweep printed, and the records it left."""
    folder = tmp_path_factory.mktemp("killed")
    first = write(folder / "first", place, seeds=[str(s) for s in range(30)])
    again = write(folder / "again", place, seeds=["0", "1", "2"])
    done = processes.script(Path(__file__).with_name("killed_sweep.py"), first, again, folder / "runs", folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, folder / "runs"


def test_a_kill_loses_at_most_the_run_in_flight(killed):
    told, err, results = killed
    assert 3 <= len(told["kept"]) < 61, "the kill came too late to test anything"
    assert all(json.loads(text)["status"] == "finished" for text in told["kept"].values())
    assert {name: (results / name).read_text() for name in told["kept"]} == told["kept"], "nothing is made again"
    assert told["code"] == 0 and "7 finished, 0 failed" in err
    asked = {(m, s) for m in ("magnitude", "wanda") for s in (0, 1, 2)}
    assert asked <= {(m, s) for _, m, _, s in rows(results)} and set(rows(results).values()) == {"finished"}


def test_a_worker_ends_with_its_sweep(killed):
    assert killed[0]["ended"]


def test_a_worker_that_dies_is_a_failed_row_and_is_replaced(killed):
    (_, first, _), (seed, second, error), (_, third, _) = killed[0]["dying"]
    assert (first, second, third, seed) == ("finished", "failed", "finished", 1)
    assert "SIGKILL" in error and "out of memory" in error


@pytest.mark.parametrize("flag", ["trust_remote_code", "trust-task-code"])
def test_no_file_can_say_that_code_is_to_be_trusted(flag, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(f"methods: [wanda]\npatterns: [0.5]\nmodels: [demo]\n{flag}: true\n")
    assert sweep.main([str(file), "--list", "--results", str(tmp_path)]) == 2
    assert f"give --{flag.replace('_', '-')} to the sweep" in capsys.readouterr().err
    file.write_text("methods: [wanda]\npatterns: [0.5]\nmodels: [demo]\n")
    assert sweep.main([str(file), "--list", "--results", str(tmp_path), f"--{flag.replace('_', '-')}"]) == 0


def test_the_tasks_of_a_slurm_array_share_the_runs(tmp_path):
    """slurm.sh as Slurm would run it, with tasks numbered from 3; a stand-in for python notes the command lines."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    script = Path(sweep.__file__).with_name("slurm.sh")
    found = []
    for task in (3, 4):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task),
               "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
        done = subprocess.run(["bash", script, "my.yaml", "--workers", "0"], env=env, capture_output=True, text=True,
                              check=True)
        found.append(done.stdout.split())
    assert found == [["scripts/sweep/sweep.py", "my.yaml", "--workers", "0", "--shard", f"{i}/2"] for i in (1, 2)]
    done = subprocess.run(["bash", script, "my.yaml"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode and "submit it as an array" in done.stderr
