"""Not a test: runs the program in forked children that SIGKILL themselves at chosen moments, then lets each continue.

    python tests/killed_runs.py PLACE MOMENTS [FLAGS]

PLACE as tiny.make leaves it; MOMENTS separated by commas; more flags of oneshot prune. Prints {moment: [exit codes,
blocks pruned]}.

In PLACE: `whole` is an uninterrupted result, MOMENT what the continued run left, MOMENT.killed what the kill left. All
compute with one thread, which makes forking safe and the bits comparable.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import tiny
import torch

from oneshot.checkpoint import folder
from oneshot.prune import loop
from oneshot.report import page


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, when=lambda *args: True):
    """Die instead of the first call for which `when` is true."""
    real = getattr(owner, name)

    def dying(*args, **kwargs):
        if when(*args):
            kill()
        return real(*args, **kwargs)
    setattr(owner, name, dying)


def after_block(last):
    real = folder.Folder.save_block

    def dying(self, b, state, rows):
        real(self, b, state, rows)
        if b == last:
            kill()
    folder.Folder.save_block = dying


def within_a_block():
    """Half of the second block's file is written."""
    real, calls = folder.save_file, []

    def dying(state, path, metadata):
        real(state, path, metadata=metadata)
        calls.append(path)
        if len(calls) == 2:
            os.truncate(path, Path(path).stat().st_size // 2)
            kill()
    folder.save_file = dying


def moved(name):
    """Whether os.replace is about to move this file of the checkpoint into place."""
    return lambda source, target: Path(source).parent.name == "final" and Path(target).name == name


MOMENTS = {
    "claimed": lambda: before(folder, "save_file"),
    "first-block": lambda: after_block(0),
    "within-a-block": within_a_block,
    "last-block": lambda: after_block(tiny.BLOCKS - 1),
    "final-half-written": lambda: before(folder, "manifest"),
    "before-config": lambda: before(os, "replace", moved("config.json")),
    "before-manifest": lambda: before(os, "replace", moved("oneshot.json")),
    "cleaning": lambda: before(folder.Folder, "drop_work", lambda self, **_: (self.path / "oneshot.json").exists()),
}


def child(argv, prepare=lambda: None):
    """(exit code or minus the signal, how many blocks were pruned) of one run."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        real = loop.prune_block
        loop.prune_block = lambda *args: (os.write(write, b"."), real(*args))[1]
        prepare()
        os._exit(tiny.main(*argv))
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(read, "rb") as pipe:
        return code, len(pipe.read())


def main(place, moments, *more):
    torch.set_num_threads(1)
    page._pictures = lambda records: []
    sys.stdout = sys.stderr

    def command(name):
        return tiny.flags(place, "--no-dense", *more, method="sparsegpt", eval_windows=8, save=place / name)
    assert tiny.main(*command("whole")) == 0  # here, so that the children find everything imported
    told = {}
    for moment in moments.split(","):
        killed = child(command(moment), MOMENTS[moment])
        shutil.copytree(place / moment, place / f"{moment}.killed")
        told[moment] = [killed, child(command(moment))]
    print(json.dumps(told), file=sys.__stdout__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
