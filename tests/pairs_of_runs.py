"""Not a test: two runs at once with one --save, again and again. Prints what came of each pair as JSON.

    python tests/pairs_of_runs.py PLACE        PLACE as tiny.make leaves it; prints {pair: [what each process told]}

Both processes are forked with one thread when everything is imported, wait for each other at the start, and sleep where
PAIRS says, so that they meet at every moment of a run. A process tells [exit code, blocks pruned, lines of stderr].
"""

import json
import os
import sys
import time
from pathlib import Path

import tiny
import torch

from oneshot.checkpoint import folder, lock
from oneshot.pipeline import run
from oneshot.prune import loop
from oneshot.report import page

SLEEP = 0.15  # seconds; an unhindered run takes about twice as long
DIFFERENT = (["--nsamples", "8"], ["--nsamples", "4"])
SAME = ([], [])
SEVERAL = (["--pattern", "0.5,2:4", "--method", "magnitude,wanda"],) * 2
OVERWRITE = ([*DIFFERENT[0], "--overwrite"], [*DIFFERENT[1], "--overwrite"])
PAIRS = {  # name: (both command lines, before what both sleep, by how much the second starts later)
    "different, at once": (DIFFERENT, "save_block", 0.0),
    "different, before the lock": (DIFFERENT, "FolderLock", 0.0),
    "different, before the folder": (DIFFERENT, "Folder", 0.0),
    "different, at the end": (DIFFERENT, "finish", 0.3),
    "different, while files move": (DIFFERENT, "_move", 0.3),
    "same, at once": (SAME, "save_block", 0.0),
    "same, while cleaning": (SAME, "drop_work", 0.3),
    "both overwrite": (OVERWRITE, "save_block", 0.05),
    "several each": (SEVERAL, "save_block", 0.0),
}


def slow(owner, name):
    """Sleep before each call."""
    real = getattr(owner, name)

    def sleeping(*args, **kwargs):
        time.sleep(SLEEP)
        return real(*args, **kwargs)
    setattr(owner, name, sleeping)


def slow_at(moment):
    if moment == "FolderLock":
        slow(lock, "FolderLock")
    elif moment == "Folder":
        slow(run.checkpoint, "Folder")
    else:
        slow(folder.Folder, moment)


def begin(argv, moment, start):
    """(process id, the pipe that tells its pruned blocks, its stderr) of a run that waits for a byte from `start`."""
    told, write = os.pipe()
    said, error = os.pipe()
    if not (pid := os.fork()):
        os.dup2(error, 2)
        real = loop.prune_block
        loop.prune_block = lambda *args: (os.write(write, b"."), real(*args))[1]
        slow_at(moment)
        os.read(start[0], 1)
        os._exit(tiny.main(*argv))
    os.close(write)
    os.close(error)
    return pid, told, said


def end(process):
    """[exit code, blocks pruned, lines of stderr] of a process."""
    pid, told, said = process
    with os.fdopen(told, "rb") as blocks, os.fdopen(said) as lines:
        text, pruned = lines.read(), len(blocks.read())
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), pruned, tiny.said(text)]


def pair(place, name, target):
    """What both processes of a pair told."""
    lines, moment, later = PAIRS[name]
    running = []
    for line, wait in zip(lines, (0, later), strict=True):
        start = os.pipe()
        argv = tiny.flags(place, "--no-dense", *line, evaluate="none", save=target, results=place / "pair-runs")
        running.append((start, begin(argv, moment, start), wait))
    for start, _, wait in running:
        time.sleep(wait)
        os.write(start[1], b".")
    return [end(process) for _, process, _ in running]


def main(place):
    torch.set_num_threads(1)
    page._pictures = lambda records: []
    stdout, sys.stdout = sys.stdout, sys.stderr
    assert tiny.main(*tiny.flags(place, "--no-dense", evaluate="none", save=place / "first")) == 0  # imports everything
    print(json.dumps({name: pair(place, name, place / f"pair{i}") for i, name in enumerate(PAIRS)}), file=stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
