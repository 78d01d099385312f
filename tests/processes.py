"""Functions in several processes at once, as torchrun starts them (gloo), each with one thread.

They are forked from a server that has imported what they need, so that starting them takes no time.
"""

import contextlib
import multiprocessing.forkserver
import os
import socket
import sys
from pathlib import Path

import torch

LIMIT = 240  # seconds after which a test fails
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tiny", "families", "jobs", "oneshot.pipeline.run", "transformers.models.llama."
                                 "modeling_llama"])


@contextlib.contextmanager
def environ(**changed):
    """Within the context, the environment has these variables."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def port() -> int:
    """One that is free."""
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(rank, n, at, folder, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(at), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    code = 1
    try:
        code = function(*args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code or 0)


def together(n: int, folder: Path, function, *args) -> list[int]:
    """The exit codes of n processes that call `function(*args)`, a function of a module; negative: killed by a signal.

    FOLDER/RANK.err and RANK.out are what they printed. If one dies and others are left, these are waited for.
    """
    folder.mkdir(exist_ok=True, parents=True)
    with environ(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    at = port()
    started = [_context.Process(target=_child, args=(rank, n, at, folder, function, args)) for rank in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(LIMIT)
    late = [process for process in started if process.is_alive()]
    for process in late:
        process.kill()
    assert not late, "".join((folder / f"{rank}.err").read_text()[-3000:] for rank in range(n))
    return [process.exitcode for process in started]


def said(folder: Path) -> str:
    """What the processes printed on stderr, without the line that names the device and torch's own warnings."""
    text = "".join((folder / name).read_text() for name in sorted(os.listdir(folder)) if name.endswith(".err"))
    return "\n".join(line for line in text.splitlines() if not line.startswith(("device: ", "[W", "[Gloo]")))
