"""`oneshot plan`: what a run will take, before anything runs: memory and disk by part, time by this machine's speeds.

    oneshot plan --model ./llama-70b --method sparsegpt --pattern 2:4 --save out --memory 24GiB

Takes the flags of `oneshot prune`. Where the run would not fit, it looks for flags that make it fit: --offload, then
--gram-budget, --eval-batch-size, --batch-size, on a GPU --activations, and last --activation-dtype, which alone rounds
something. Flags that are given stay as they are. It ends with the command to run; exit code 2 if nothing fits.

Under torchrun it plans the run of as many processes: parts and time are those of one, the peak of memory is that of all
on this machine. What they send each other is not in it.
"""

import argparse
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import measure, models
from ..report.table import render
from ..runtime import distributed, environment, together
from ..runtime.command import Parser, exit_code
from ..runtime.files import write_json, writing
from ..settings import RunConfig, flags
from ..settings.known import known
from . import checks, forecast, idle, machine, offloading
from .forecast import Part, Task
from .plan import pattern_of, pruning_chain
from .sizes import Shape, shape_of
from .task import task_of

UNITS = {"": 2**30, "g": 2**30, "m": 2**20, "gb": 10**9, "mb": 10**6, "gib": 2**30, "mib": 2**20}


@dataclass(frozen=True)
class Planned:
    """A plan. phases, disk: parts in bytes. seconds: {stage: time}. flags: {name: value} that had to be chosen. limits:
    bytes of memory, and of the GPU's, if there is one. speeds: the machine's, {kind of work: so much a second}.
    processes: of torchrun on this machine, each with phases like these.
    """

    phases: dict[str, list[Part]]
    disk: list[Part]
    seconds: dict[str, float]
    flags: dict[str, Any]
    limits: tuple[float, float | None]
    speeds: dict[str, float]
    processes: int = 1

    @property
    def peak(self) -> float:
        """The highest peak of memory, of all processes, in bytes."""
        return forecast.peak(self.phases, None if self.limits[1] is None else False)[1] * self.processes


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code (runtime/command.py)."""
    return together.lead(lambda: exit_code(lambda: work(sys.argv[1:] if argv is None else list(argv))))


def parser() -> Parser:
    """What `--help` shows."""
    p = Parser(prog="oneshot plan", usage="oneshot plan [--memory SIZE] [flags of oneshot prune]", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--memory", metavar="SIZE", help="what the run may take, such as 24GiB or 800MB (default: what is "
                                                    "free now)")
    p.add_argument("--out", type=Path, help="file for the plan, JSON")
    return p


def work(argv: list[str]) -> None:
    """Plan, print, and say which command to run. Raises ValueError if nothing fits."""
    distributed.start()
    args, rest = parser().parse_known_args(argv)
    given = flags.read(rest)
    configs = flags.expand(given)
    checks.check(configs)
    check_known(configs)
    idle.check(given, configs)
    models.quiet()
    limit = size(args.memory) if args.memory is not None else environment.free_memory("cpu")
    if limit is None:
        raise ValueError("--memory: this system does not say how much is free; give a size such as 24GiB")
    planned = plan(configs, given, limit)
    if args.out:
        with writing("--out", args.out):
            write_json(plain(planned), args.out)
    print(shown(planned))
    more = [part for name, value in planned.flags.items() for part in (known()[name].option, str(value))]
    print(start() + " prune " + shlex.join([*rest, *more]))


def start() -> str:
    """How a run of as many processes as this plan's is started."""
    nodes = f"--nnodes {machines} " if (machines := distributed.world() // distributed.local()) > 1 else ""
    several = f"torchrun {nodes}--nproc-per-node {distributed.local()} -m oneshot"
    return several if distributed.world() > 1 else "oneshot"


def plain(planned: Planned) -> dict[str, Any]:
    """A plan as plain values: bytes and seconds by part."""
    return {"peak": planned.peak, "processes": planned.processes, "seconds": planned.seconds,
            "flags": planned.flags, "speeds": planned.speeds,
            "phases": {name: {part.name: part.bytes for part in parts} for name, parts in planned.phases.items()},
            "disk": {part.name: part.bytes for part in planned.disk}}


def size(text: str) -> float:
    """Bytes of "24GiB", "800MB" or "24" (GiB). Raises ValueError naming `--memory` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise ValueError(f"--memory {text}: give a size such as 24GiB or 800MB")
    return float(match[1]) * UNITS[match[2]]


def plan(configs: Sequence[RunConfig], given: dict[str, Any], limit: float) -> Planned:
    """The plan of a command's runs, one after the other. given: its flags, which stay. limit: bytes of memory.

    Raises ValueError naming the flag of what does not fit.
    """
    cfg = configs[0]
    model, tokenizer, files = models.skeleton(cfg.model, dtype=cfg.dtype, revision=cfg.model_revision,
                                              cache_dir=cfg.cache_dir, trust_remote_code=cfg.trust_remote_code)
    models.compute_as_stored(model, cfg.compute == "stored")
    shape, writes = shape_of(model), offloading.existing(Path(cfg.save or tempfile.gettempdir()))
    tasks = [task_of(c, model, tokenizer) for c in configs]
    limits = (limit, environment.total_memory(cfg.device))
    program = machine.resident()
    pruned = next((c for c in configs if c.prunes), None)
    chosen = fit(shape, tasks, limits, program, free_flags(configs, given))
    tasks = [applied(task, chosen) for task in tasks]
    found = [forecast.phases(shape, task, program) for task in tasks]
    check_disk(shape, tasks, writes, bool(cfg.save))
    dtype = models.compute_dtype(model, cfg.device, model.dtype)
    what = (pruning_chain(pruned), pattern_of(pruned)) if pruned else ((), None)
    speeds = machine.speeds(cfg.device, dtype, *what, files[0] if files else None, writes)
    stages = [forecast.work(shape, task) for task in tasks]
    seconds = {name: sum(forecast.seconds(own[name], speeds) for own in stages if name in own)
               for own in stages for name in own}
    largest = max(found, key=lambda own: forecast.peak(own)[1])
    return Planned(largest, max((forecast.disk(shape, task) for task in tasks), key=lambda own: sum(
        part.bytes for part in own)), seconds, chosen, limits, speeds, distributed.local())


def check_known(configs: Sequence[RunConfig]) -> None:
    """Raise ValueError naming the first flag whose memory and time the plan's arithmetic does not know."""
    for cfg in configs:
        beside = [f"--{name}" for name in ("divergence", "damage") if measure.module(name) in measure.asked(cfg)]
        if found := offloading.whole(cfg) + ([f"--heal {cfg.heal}"] if cfg.prunes and cfg.heals else []) + beside:
            raise ValueError(f"{found[0]}: a plan does not know what it takes; plan without it, and leave room")


def free_flags(configs: Sequence[RunConfig], given: dict[str, Any]) -> list[str]:
    """The flags that a plan may change: those that are not given; --offload only where all runs go with it."""
    free = [name for name in forecast.STEPS if name not in given]
    try:
        for cfg in configs:
            offloading.check(replace(cfg, offload="disk"))
    except ValueError:
        free = [name for name in free if name != "offload"]
    return free


def fit(shape: Shape, tasks: Sequence[Task], limits: tuple[float, float | None], program: float,
        free: Sequence[str]) -> dict[str, Any]:
    """{flag: value} of what has to change so that every task fits. Raises ValueError naming `--memory`."""
    def fits(task: Task) -> bool:
        found = forecast.phases(shape, task, program)
        if limits[1] is None:
            return forecast.peak(found)[1] * distributed.local() <= limits[0]
        return forecast.peak(found, False)[1] * distributed.local() <= limits[0] and (
            forecast.peak(found, True)[1] <= limits[1])

    chosen: dict[str, Any] = {}
    for task in sorted(tasks, key=lambda own: -max(forecast.peaks(shape, own))):
        try:
            smaller, changed = forecast.fitted(shape, applied(task, chosen), fits, free)
        except ValueError as error:
            raise ValueError(why_not(shape, smallest(shape, task, free), limits, program)) from error
        chosen |= {name: value_of(smaller, name) for name in changed}
    return chosen


def smallest(shape: Shape, task: Task, free: Sequence[str]) -> Task:
    """The task with every free flag as far down as it goes."""
    for flag in free:
        while smaller := forecast.STEPS[flag](task, max(forecast.gram_bytes(own, task) for own in shape.layers)):
            task = smaller
    return task


def why_not(shape: Shape, task: Task, limits: tuple[float, float | None], program: float) -> str:
    """The message for a run that does not fit even as small as it can be."""
    found = forecast.phases(shape, task, program)
    on_gpu = None if limits[1] is None else forecast.peak(found, False)[1] * distributed.local() <= limits[0]
    n = 1 if on_gpu else distributed.local()
    name, total = forecast.peak(found, on_gpu)
    parts = sorted((p for p in found[name] if on_gpu in (None, p.on_gpu)), key=lambda part: -part.bytes)
    limit, flag = (limits[1], "--device: its memory") if on_gpu else (limits[0], "--memory")
    how = "with --offload disk and the smallest batches" if task.offload else "with the whole model in memory"
    how += f", and there are {n} processes" if n > 1 else ""
    told = ", ".join(f"{part.name} {part.bytes / 2**30:.3g}" for part in parts[:3])
    return (f"{flag} {limit / 2**30:.3g} GiB: the run takes {total * n / 2**30:.3g} GiB while {name}, {how}; the "
            f"largest parts{' of each' * (n > 1)}: {told}")


def value_of(task: Task, name: str) -> Any:
    """The value of a flag that gives this Task."""
    return {"offload": "disk", "gram_budget": f"{task.budget / 2**30:.4g}", "eval_batch_size": task.eval_batch,
            "batch_size": task.batch, "activations": "cpu", "activation_dtype": "bfloat16"}[name]


def applied(task: Task, chosen: dict[str, Any]) -> Task:
    """A Task with the flags that were chosen."""
    own = {"offload": ("offload", True), "gram_budget": ("budget", int(float(chosen.get("gram_budget", 1)) * 2**30)),
           "eval_batch_size": ("eval_batch", chosen.get("eval_batch_size")), "batch_size": ("batch", chosen.get(
               "batch_size")), "activations": ("waits_on_cpu", True), "activation_dtype": ("activation", 2)}
    return replace(task, **dict(own[name] for name in chosen))


def check_disk(shape: Shape, tasks: Sequence[Task], folder: Path, saves: bool) -> None:
    """Raise ValueError naming the flag if what the runs write does not fit on the disk."""
    parts = [forecast.disk(shape, task) for task in tasks]
    sums = [sum(part.bytes for part in own) for own in parts]
    needed = sum(sums) if saves else max(sums)  # every saved run stays; what waits in a temporary folder goes
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ValueError(f"{'--save' if saves else '--offload disk'}: the runs write {needed / 1e9:.3g} GB, and "
                         f"{folder} has {free / 1e9:.3g} GB free; free some, or choose another folder")


def shown(planned: Planned) -> str:
    """The plan as the terminal shows it."""
    def gib(amount: float) -> str:
        return f"{amount / 2**30:.3g}"

    gpu = planned.limits[1] is not None
    body = [[phase, part.name, "GPU" if gpu and part.on_gpu else "memory", gib(part.bytes)]
            for phase, parts in planned.phases.items() for part in parts if part.bytes]
    for on_gpu in (False, True) if gpu else (None,):
        phase, total = forecast.peak(planned.phases, on_gpu)
        limit, n = planned.limits[1 if on_gpu else 0], 1 if on_gpu else planned.processes
        body.append([phase, f"PEAK, of {gib(limit)}" + f", {n} processes" * (n > 1), "GPU" if on_gpu else "memory",
                     gib(total * n)])
    text = render(["phase", "part", "where", "GiB"], body, "terminal", text={"phase", "part", "where"})
    text += "\n" + render(["on disk", "GB"], [[part.name, f"{part.bytes / 1e9:.3g}"] for part in planned.disk] or [
        ["nothing but the record", "0"]], "terminal", text={"on disk"})
    times = [[name, f"{own:.3g}"] for name, own in planned.seconds.items()]
    times.append(["all", f"{sum(planned.seconds.values()):.3g}"])
    return text + "\n" + render(["time", "s"], times, "terminal", text={"time"})


if __name__ == "__main__":
    sys.exit(main())
