"""What the soak needs before it begins: small models, commands, and what each gives when nothing disturbs it.

Everything runs in forked children of one process that has imported the program, with one thread: bits are comparable.
"""

import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import tiny
import torch

from oneshot import checkpoint
from oneshot.checkpoint import verify
from oneshot.report import page

LIMIT, MEMORY = 60, 6 * 2**30  # seconds and bytes of address space of one child
SWEEP = """methods: [wanda, magnitude]
patterns: [0.5]
seeds: [0, 1]
nsamples: 4
seqlen: 16
evaluate: {place}/evaluation.txt
calibration: {place}/calibration.txt
models: [{place}/llama]
"""


@dataclass
class Ended:
    """A child: exit code or minus the signal, lines of stderr, seconds."""

    code: int
    lines: list[str]
    seconds: float

    @property
    def traceback(self) -> str:
        """The last line of a traceback; "" where there is none."""
        broke = any(line.startswith("Traceback (most recent call last)") for line in self.lines)
        at = [line.split("/")[-1].strip() for line in self.lines if line.lstrip().startswith("File ")]
        broke = broke or self.code not in (0, 1, 2, -signal.SIGKILL)
        return " ".join([*self.lines[-1:], *at[-2:], f"(exit code {self.code})"]) if broke else ""

    @property
    def refused(self) -> bool:
        """Whether it ended with exit code 2 and one line."""
        errors = [line for line in self.lines if line.startswith("error: ")]
        return self.code == 2 and len(errors) == 1 and self.lines[-1] == errors[0]


def begin(work, log) -> int:
    """Process id of a forked child that does `work` and ends with the code it returns; 70 for what it raises."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:  # never on into the parent's code
        sys.stderr.flush()
        os._exit(code)


def end(pid: int, log, began: float, kill_after: float | None = None) -> Ended:
    """Wait for a child, or kill it after so many seconds (after LIMIT in any case)."""
    until, status = began + (LIMIT if kill_after is None else kill_after), None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    log.seek(0)
    lines = tiny.said(log.read())
    if kill_after is None and os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
        lines += ["Traceback (most recent call last)", f"killed: took more than {LIMIT} s"]
    return Ended(os.waitstatus_to_exitcode(status), lines, time.monotonic() - began)


def child(work, kill_after: float | None = None) -> Ended:
    """Do `work` in a forked child."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        return end(begin(work, log), log, began, kill_after)


def verified(folder: Path) -> Ended:
    """`oneshot verify` of a folder, its lines of stdout among those of stderr."""
    def work():
        with contextlib.redirect_stdout(sys.stderr):
            return verify.main([str(folder), "--quiet"])
    return child(work)


@dataclass
class World:
    """A folder with models and texts, and for each command its flags, its result undisturbed, its seconds."""

    place: Path
    flags: dict[str, list[str]] = field(default_factory=dict)
    whole: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def command(self, name: str, save: Path, *more, model: Path | None = None):
        """A command as work for a child. model: another than its own."""
        argv = [*self.flags[name], *(["--model", str(model)] if model else []), "--save", str(save), "--results",
                str(save.parent / "runs"), *map(str, more)]
        return lambda: tiny.main(*argv)

    def same(self, name: str, folder: Path) -> bool:
        """Whether a folder holds the weights that the command gives undisturbed."""
        files = [f.name for f in self.whole[name].glob("*.safetensors")]
        return all((folder / f).is_file() and (folder / f).read_bytes() == (self.whole[name] / f).read_bytes()
                   for f in files)


def build(place: Path) -> World:
    """Models, texts, and the undisturbed result of every command."""
    torch.set_num_threads(1)
    page._pictures = lambda records: []
    shutil.rmtree(place, ignore_errors=True)
    tiny.make(place)
    tiny.save_model(place / "llama", dtype=torch.bfloat16)
    tiny.save_model(place / "gpt2", "gpt2", torch.float16)
    shutil.copytree(place / "llama", place / "sharded")
    (place / "sharded" / "model.safetensors").unlink()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(place / "llama").save_pretrained(place / "sharded", max_shard_size="20KB")
    (place / "sweep.yaml").write_text(SWEEP.format(place=place))
    world = World(place)
    for name, changed, more in (
            ("wanda", {}, ()), ("sparsegpt", {"method": "sparsegpt", "pattern": "0.5"}, ()),
            ("four", {"nsamples": 4}, ()), ("owl", {"pattern": "0.6"}, ("--allocate", "owl")),
            ("gpt2", {"model": place / "gpt2", "method": "sparsegpt"}, ()),
            ("packed", {"format": "packed", "method": "magnitude"}, ()),
            ("healed", {}, ("--heal", "block", "--block.steps", 2)),
            ("measured", {"evaluate": place / "evaluation.txt", "method": "ria"}, ()),
            ("sharded", {"model": place / "sharded"}, ())):
        world.flags[name] = tiny.flags(place, "--no-dense", *more, **{"model": place / "llama", "evaluate": "none",
                                                                      "results": None} | changed)
        world.whole[name] = place / "whole" / name
        work = world.command(name, world.whole[name])
        ended = child(work) if name != "wanda" else child(lambda: 0) if tiny_main(work) else None
        if ended is None or ended.code:
            raise RuntimeError(f"{name}: {ended}")
        world.seconds[name] = max(ended.seconds, 0.2)
    world.seconds["wanda"] = world.seconds["four"]
    return world


def tiny_main(work) -> bool:
    """Whether the first command succeeds: in this process, so that all children find everything imported."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work() == 0


def interrupted(world: World, name: str, save: Path, after: int) -> None:
    """Leave the work files of a run that was killed after block `after`, or before its files were moved (-1)."""
    def work():
        real = checkpoint.Folder.save_block

        def dying(self, number, state, rows):
            real(self, number, state, rows)
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.Folder.save_block = dying
        if after < 0:
            checkpoint.Folder._move = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        return world.command(name, save)()
    child(work)
