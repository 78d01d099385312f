"""What the benchmarks of pruning share: how fast this machine multiplies, how the published code is called, what a
model is measured on, the line that says where rows came about; and for those that measure many ways, their command
line and their rows in a file."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from oneshot_kernels.cpu import bandwidth, library
from torch import nn

from oneshot import calibrate, measure
from oneshot.calibrate import Activations
from oneshot.prune import patterns
from oneshot.runtime import products
from oneshot.runtime.command import Parser
from oneshot.runtime.environment import others  # noqa: F401 - for the benchmarks
from oneshot.runtime.files import write_json

BATCH = {"craftgpt-5m": "16"}  # its windows are single dialogues of some 30 tokens


def matmul_rate(n: int) -> float:
    """Floating-point operations a second of the best of five large float32 products: the ceiling of everything here."""
    a, b = torch.randn(4 * n, n), torch.randn(n, n)
    times = []
    with products.float32():
        for _ in range(6):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
    return 8 * n**3 / min(times)


def removed(pattern: patterns.Pattern) -> tuple[float, int, int]:
    """A pattern as published.py takes it: (share removed, n of each m REMOVED, m); n is 0 where it is unstructured."""
    return (pattern.sparsity, *((pattern.m - pattern.n, pattern.m) if isinstance(pattern, patterns.NM) else (0, 0)))


def caller(activations: Activations, b: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """The published loop's call(block, x) for block b: activations of one window a batch, which pass in their order,
    as often as they like."""
    order = cycle(range(len(activations)))

    def call(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        i = next(order)
        activations.hidden[i] = x
        return calibrate.forward(block, activations, b, i)
    return call


def quality(subject: measure.Subject) -> dict:
    """Perplexity on the one text that a model is measured on, and what was asked of tasks beside it."""
    found = measure.measure(subject)
    (metric, ppl), *rest = found.metrics.items()
    info = found.info[metric]
    tasks = {name: {"value": value, **{key: found.info[name][key] for key in ("stderr", "samples", "chance")}}
             for name, value in rest if name.endswith("/acc")}
    return {"metric": metric, "window": info["window"], "ppl": ppl, "tokens": info["tokens"]} | (
        {"tasks": tasks} if tasks else {})


def written(program: str, environment: dict) -> str:
    """The line of a page that says how and where it came about."""
    e = environment
    return (f"Written by `python scripts/bench/{program}`; commit {e['commit']}{' (dirty)' if e['dirty'] else ''}, "
            f"{e['device']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, {e['date']}.")


def last_level() -> int:
    """Bytes of this machine's largest cache; 0 where the system does not say."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)


class Memory:
    """How fast memory is read that was read a moment ago.

    A virtual machine may take pages from a program that has not touched them for a tenth of a second; the next touch
    of each page then takes microseconds, and a first reading runs at a tenth of the speed. A model's weights are
    touched at every token, so they are not read like that.

    best: {threads: bytes a second}, the fastest that this run has seen; the neighbours of a virtual machine slow memory
    down, and no load shows it.
    """

    def __init__(self, megabytes: int, seconds: float = 0.6) -> None:
        self.buffers = [library.huge_pages(torch.ones(1 << 23, dtype=torch.int32)) for _ in range(megabytes // 32 + 1)]
        self.seconds, self.best = seconds, {}

    def speed(self) -> float:
        """Read for `seconds`, all buffers at least; bytes a second in the last third (the median)."""
        speeds, began, threads = [], time.perf_counter(), torch.get_num_threads()
        while len(speeds) < len(self.buffers) or time.perf_counter() - began < self.seconds:
            buffer, start = self.buffers[len(speeds) % len(self.buffers)], time.perf_counter()
            bandwidth.read(buffer)
            speeds.append(buffer.nbytes / (time.perf_counter() - start))
        speed = statistics.median(speeds[len(speeds) * 2 // 3:])
        self.best[threads] = max(speed, self.best.get(threads, 0.0))
        return speed


def thread_counts(text: str, toy: bool) -> list[int]:
    """The numbers of threads that `--threads` names, by commas. Raises ValueError where waiting threads would sleep:
    a token takes less time than to wake them. toy: nobody reads these times."""
    counts = sorted({int(n) for n in text.split(",")})
    if counts[-1] > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" and not toy:
        raise ValueError("OMP_WAIT_POLICY=passive lets threads sleep while they wait, half the speed of short layers: "
                         "unset it, or give --threads 1")
    return counts


# ------------------------------------------------------------------ many ways

def asking(program: str, doc: str, models: tuple[str, ...], windows: int, groups: str) -> Parser:
    """The command line that they share, but for `--out`. groups: names of groups of ways, the first one by default."""
    p = Parser(prog=f"python scripts/bench/{program}", description=doc, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")
    p.add_argument("--only", default=",".join(models), help="models, separated by commas")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--ways", default="main", help=f"{groups}, or names separated by semicolons")
    p.add_argument("--eval-windows", type=int, default=windows)
    p.add_argument("--flags", default="", help="more flags for every run, separated by spaces (for a quick look)")
    p.add_argument("--threads", type=int, default=1)
    return p


def flags_for(args: argparse.Namespace, name: str, own: list[str]) -> list[str]:
    """The flags of every run of a model, of which some are its `own`."""
    return [*own, "--batch-size", BATCH.get(name, "8"), "--eval-windows", str(args.eval_windows), "--device", "cpu",
            "--no-progress", "--no-dense", *args.flags.split()]


def without(flags: list[str], name: str) -> list[str]:
    """Flags without one of them and its value, if it is there."""
    i = flags.index(name) if name in flags else len(flags)
    return flags[:i] + flags[i + 2:]


def chosen(names: str, groups: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """{way: its flags} of what `--ways` names: a group, or ways of any. Raises ValueError naming `--ways`."""
    if names in groups:
        return groups[names]
    every = {way: own for group in groups.values() for way, own in group.items()}
    if unknown := [way for way in names.split(";") if way not in every]:
        raise ValueError(f"--ways {unknown[0]}: there are {'; '.join(every)}")
    return {way: every[way] for way in names.split(";")}


def rows_of(file: Path) -> list[dict]:
    """The rows in a file; none where it is not there."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def replace(rows: list[dict], row: dict, kind: tuple[str, ...], file: Path) -> None:
    """Write rows, with a new one at the end in place of an older one of its kind, whole or not at all."""
    write_json({"rows": [*(r for r in rows if any(r[key] != row[key] for key in kind)), row]}, file)
