"""Functions in several processes at once, as torchrun starts them (gloo), and scripts; each with one thread.

They are forked from a server that has imported what they need, so that starting them takes no time.
"""

import contextlib
import gc
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch

LIMIT = 240  # seconds after which a test fails
SCRIPT_LIMIT = 500  # the same for a script
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


def _begin(folder, name):
    """One thread; what is printed goes to FOLDER/NAME.out and .err; what is imported stays."""
    gc.freeze()
    torch.set_num_threads(1)
    for stream, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)


def _child(rank, n, at, folder, function, args):
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    if n > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(at))
    _begin(folder, rank)
    code = 1
    try:
        code = function(*args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code or 0)


def _script(file, argv, folder):
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    _begin(folder, "script")
    sys.argv, code = [str(file), *argv], 0
    sys.path.insert(0, str(Path(file).parent))
    try:
        runpy.run_path(str(file), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _started(function, *args):
    """A process that calls a function of this module."""
    with environ(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    process = _context.Process(target=function, args=args)
    process.start()
    return process


def script(file: str | Path, *argv, folder: Path) -> subprocess.CompletedProcess:
    """The finished process of `python FILE ARGV`, which prints into FOLDER/script.out and .err; see the file."""
    process = _started(_script, file, list(map(str, argv)), folder)
    process.join(SCRIPT_LIMIT)
    if late := process.is_alive():
        process.kill()
    said = [(folder / f"script.{end}").read_text() for end in ("out", "err")]
    assert not late, said[1][-3000:]
    return subprocess.CompletedProcess([str(file), *argv], process.exitcode, *said)


def together(n: int, folder: Path, function, *args) -> list[int]:
    """The exit codes of n processes that call `function(*args)`, a function of a module; negative: killed by a signal.

    One alone is not of torchrun. FOLDER/RANK.err and RANK.out are what they printed. If one dies and others are left,
    these are waited for.
    """
    folder.mkdir(exist_ok=True, parents=True)
    at = port()
    started = [_started(_child, rank, n, at, folder, function, args) for rank in range(n)]
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
