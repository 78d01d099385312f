"""One process at a time writes into a folder; a kill frees it."""

import json
import os
import shutil
import signal
import sys

import pairs_of_runs
import processes
import pytest
import tiny
from tiny import place, plain_pages  # noqa: F401

from oneshot import checkpoint
from oneshot.checkpoint import verify
from oneshot.runtime import lock as locks
from oneshot.runtime.lock import Lock, Taken

pytestmark = [pytest.mark.usefixtures("plain_pages"),
              pytest.mark.skipif(sys.platform == "win32", reason="forks and POSIX locks")]


# ---------------------------------------------------------------- the lock

def test_one_at_a_time(tmp_path):
    first, second = Lock(tmp_path / "a" / "lock"), Lock(tmp_path / "a" / "lock")
    first.take()
    with pytest.raises(Taken, match=f"process {os.getpid()} on "):
        second.take()
    assert first.held and not second.held
    first.release()
    first.release()
    assert not (tmp_path / "a" / "lock").exists()
    second.take()
    assert second.held
    second.release()


def test_a_lock_whose_file_was_removed_is_not_held(tmp_path):
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    first.take()
    (tmp_path / "lock").unlink()
    assert not first.held
    second.take()
    first.release()  # leaves the other's file alone
    assert second.held
    second.release()


def killed_while_holding(file):
    """Let a process take the lock and be killed."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        Lock(file).take()
        os.write(write, b".")
        signal.pause()
    os.read(read, 1)
    with pytest.raises(Taken, match=f"process {pid} "):
        Lock(file).take()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_kill_frees_it(tmp_path):
    for _ in range(5):
        killed_while_holding(tmp_path / "lock")
        lock = Lock(tmp_path / "lock")
        lock.take()
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_many_processes_never_hold_it_together(tmp_path):
    """Eight processes take and release in turn; a file that only the holder may create tells of two at once."""
    pids = []
    for _ in range(8):
        if not (pid := os.fork()):
            code = 0
            for _ in range(100):
                lock = Lock(tmp_path / "work" / "lock")
                try:
                    lock.take()
                except Taken:
                    continue
                try:
                    os.close(os.open(tmp_path / "only", os.O_CREAT | os.O_EXCL))
                    os.unlink(tmp_path / "only")
                except FileExistsError:
                    code = 1
                lock.release()
            os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 8


@pytest.mark.parametrize("how", ["no fcntl", "not supported"])
def test_without_locks_a_file_stands_for_it(tmp_path, monkeypatch, how):
    if how == "no fcntl":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        def flock(*args):
            raise OSError(locks.errno.EOPNOTSUPP, "Operation not supported")
        monkeypatch.setattr(locks.fcntl, "flock", flock)
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    first.take()
    assert first.held
    with pytest.raises(Taken, match=r"if that process is gone, remove .*lock\.exclusive"):
        second.take()
    first.release()
    second.take()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        Lock(tmp_path / "lock").take()
    assert (tmp_path / "victim").read_text() == "mine"


# ---------------------------------------------------------------- the folder

def test_two_runs_in_one_folder(tmp_path):
    first = checkpoint.Folder(tmp_path / "out", "run-A")
    with pytest.raises(ValueError, match=r"--save .*out: another process is writing here \(process \d+ on "):
        checkpoint.Folder(tmp_path / "out", "run-B", overwrite=True)
    first.save_block(0, {}, {"layers": [], "block": {}, "warnings": []})
    first.release()
    with pytest.raises(ValueError, match=r"holds another run \(run-A\)"):
        checkpoint.Folder(tmp_path / "out", "run-B")
    checkpoint.Folder(tmp_path / "out", "run-B", overwrite=True).release()


def test_refused_before_the_model_is_read(place, tmp_path, capfd):  # noqa: F811
    """In every folder of the command, also the last one."""
    argv = tiny.flags(place, method="magnitude,wanda", pattern="0.5,2:4", save=tmp_path / "out", results=tmp_path / "r",
                      model=tiny.copy(place / "model", tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").write_text("damaged")
    held = checkpoint.FolderLock(tmp_path / "out" / "wanda-2of4")
    assert tiny.main(*argv) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert "wanda-2of4: another process is writing here" in error
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["wanda-2of4"], "what was made for the other locks"
    held.release()
    assert not (tmp_path / "out").exists()
    assert tiny.main(*argv) == 2 and "cannot be loaded" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_removed_while_a_run_works_is_one_line(place, tmp_path, monkeypatch, capfd):  # noqa: F811
    real = checkpoint.Folder.save_block

    def removed(self, number, state, rows):
        real(self, number, state, rows)
        shutil.rmtree(self.path)
    monkeypatch.setattr(checkpoint.Folder, "save_block", removed)
    assert tiny.main(*tiny.flags(place, "--no-dense", save=tmp_path / "out", results=tmp_path / "runs")) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert "its work files were removed by somebody else" in error and not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_as_it_is(place, tmp_path, capfd):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert tiny.main(*tiny.flags(place, save=tmp_path / "out", results=tmp_path / "runs")) == 2
    assert "not oneshot's" in capfd.readouterr().err
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------- two real processes

@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(place, what pairs_of_runs told)"""
    place = tiny.make(tmp_path_factory.mktemp("pairs"))  # noqa: F811
    done = processes.script(pairs_of_runs.__file__, place, folder=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", pairs_of_runs.PAIRS)
def test_two_processes(pairs, name, capsys):
    place, told = pairs  # noqa: F811
    target = place / f"pair{list(told).index(name)}"
    (first, second), several = told[name], name.startswith("several")
    assert sorted((first[0], second[0])) in ([0, 2], [0, 0] if name.startswith("same") else [0, 2]), told[name]
    for code, pruned, lines in told[name]:
        if code == 2:
            assert pruned == 0 and len(lines) == 1, "refused before it computes, in one line"
            assert "another process is writing here" in lines[0] or "holds another run" in lines[0]
    assert first[1] + second[1] == tiny.BLOCKS * (4 if several else 1), "no block was pruned twice"
    folders = list(target.iterdir()) if several else [target]
    for folder in folders:
        assert verify.main([str(folder), "--quiet"]) == 0, capsys.readouterr().out
        assert not (folder / ".oneshot").exists()
    if name.startswith("different"):
        winner = pairs_of_runs.PAIRS[name][0][0 if first[0] == 0 else 1]
        nsamples = json.loads((target / "oneshot.json").read_text())["record"]["settings"]["nsamples"]
        assert nsamples == int(winner[1])


def test_records_of_all_pairs_are_whole(pairs):
    """Many processes wrote into one --results."""
    for file in (pairs[0] / "pair-runs").iterdir():
        assert file.suffix in (".json", ".html")
        assert file.suffix == ".html" or json.loads(file.read_text())["status"] == "finished"


@pytest.mark.parametrize("error", [OSError(locks.errno.ENOSPC, "No space left on device"),
                                   PermissionError(locks.errno.EACCES, "Permission denied"),
                                   OSError(locks.errno.EROFS, "Read-only file system")], ids=lambda e: e.strerror)
def test_a_lock_that_cannot_be_written_is_one_line(place, tmp_path, monkeypatch, capfd, error):  # noqa: F811
    real = os.open

    def failing(path, *args, **kwargs):
        if str(path).endswith(".oneshot/lock"):
            raise error
        return real(path, *args, **kwargs)
    monkeypatch.setattr(locks.os, "open", failing)
    assert tiny.main(*tiny.flags(place, save=tmp_path / "a" / "out", results=tmp_path / "runs")) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith("error: --save ") and error.strerror in line and not (tmp_path / "a").exists()


def test_a_full_disk_does_not_hinder_the_lock(tmp_path, monkeypatch):
    """Only the name in it is missing."""
    real = os.write
    monkeypatch.setattr(locks.os, "write", lambda *args: (_ for _ in ()).throw(OSError(locks.errno.ENOSPC, "full")))
    first = Lock(tmp_path / "lock")
    first.take()
    monkeypatch.setattr(locks.os, "write", real)
    with pytest.raises(Taken, match="its name is not known"):
        Lock(tmp_path / "lock").take()
    first.release()
