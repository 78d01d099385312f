"""A model larger than the memory it may take: a synthetic Llama pruned by `--offload disk`, against `oneshot plan`.

    python scripts/bench/scale.py                       # about 3B parameters; needs 13 GB of disk in --work
    python scripts/bench/scale.py --size tiny --work /tmp/scale --out /tmp/scale
    python scripts/bench/scale.py --page                # only scale.md, from scale.json

Each run is a process of its own. Its memory is the highest resident set that the system saw, files that are mapped into
it counted (VmHWM); its time is from start to end, with the processor time beside it, since other processes may be at
work. The last tables are on paper: the plan of larger models, with this machine's speeds on a CPU and with ASSUMED ones
on GPUs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import common
import synthetic
import torch
from transformers import AutoModelForCausalLM

from oneshot.pipeline import forecast, plan_command
from oneshot.pipeline.forecast import Task
from oneshot.pipeline.sizes import Shape, shape_of
from oneshot.report.table import render
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text

GIB, METHODS, LIMIT = 2**30, ("wanda", "sparsegpt"), "3GiB"
FEW = ["--pattern", "2:4", "--nsamples", "4", "--seqlen", "128", "--batch-size", "2", "--evaluate", "builtin:prose",
       "--eval-windows", "4", "--no-dense", "--no-progress", "--offload", "disk"]
ASSUMED = {  # a second, of one GPU: operations of bfloat16 products and of float32 solvers; bytes
    "start": 1 / 30, "product": 3e14, "solve": 2e13, "choice": 1e9, "touched": 2e12, "hashed": 1e9, "read": 2e9,
    "written": 1e9, "link": 5e10}
ON_PAPER = Task(("sparsegpt",), 1, 1, (128, 2048), (164, 2048), 8, 8, 4 * GIB, saves=True)  # 164: WikiText-2's windows
PROGRAM = 0.45 * GIB


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(arguments(argv)))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/scale.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=synthetic.SIZES, default="3b", help="which Llama (default: %(default)s)")
    p.add_argument("--work", type=Path, default=Path("build/scale"), help="folder for the model and what is pruned")
    p.add_argument("--out", type=Path, default=Path("results"), help="folder for scale.json and scale.md")
    p.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    p.add_argument("--page", action="store_true", help="only write the page anew")
    return p.parse_args(argv)


def work(args: argparse.Namespace) -> None:
    """Measure, unless only the page is asked for, and write both files after each method."""
    file = args.out / "scale.json"
    if args.page and not file.is_file():
        raise ValueError(f"{file}: is not there; leave out --page")
    for method in () if args.page else args.methods.split(","):
        write_json(with_run(before(file, args.size), method, args), file)
        write_text(page(read_json(file)), args.out / "scale.md")
    text = page(read_json(file))
    write_text(text, args.out / "scale.md")
    print(text, end="")


def read_json(file: Path) -> dict:
    """What a file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def before(file: Path, size: str) -> dict:
    """The runs in scale.json, if they are of this size and these flags: other methods' stay; else none."""
    found = read_json(file) if file.is_file() else {}
    return found if (found.get("size"), found.get("flags")) == (size, FEW) else {"size": size, "flags": FEW, "runs": []}


def with_run(data: dict, method: str, args: argparse.Namespace) -> dict:
    """scale.json with the run of one method, in place of an earlier one."""
    model = args.work / f"llama-{args.size}"
    if not synthetic.is_made(model, args.size):
        synthetic.make(model, args.size)
    runs = [run for run in data["runs"] if run["method"] != method] + [one_run(model, method, args.work)]
    return data | {"bytes": sum(f.stat().st_size for f in model.glob("*.safetensors")),
                   "runs": runs, "environment": environment.environment("cpu")}


def one_run(model: Path, method: str, work: Path) -> dict:
    """The plan of one run, then the run, as plain values."""
    out = work / method
    shutil.rmtree(out, ignore_errors=True)
    argv = ["--model", str(model), "--method", method, *FEW, "--save", str(out), "--results", str(work / "runs")]
    file = work / "plan.json"
    told = subprocess.run([sys.executable, "-m", "oneshot", "plan", *argv, "--memory", LIMIT, "--out", str(file)],
                          capture_output=True, text=True)
    if told.returncode:
        raise ValueError(f"oneshot plan {method}: {told.stderr.strip().splitlines()[-1]}")
    busy, began = common.others(), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "oneshot", "prune", *argv], stdout=subprocess.DEVNULL)
    peak, usage = watched(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise ValueError(f"oneshot prune {method}: exit code {process.returncode}; run it by hand: {' '.join(argv)}")
    saved = json.loads((out / "oneshot.json").read_text(encoding="utf-8"))["record"]
    shutil.rmtree(out)
    return {"method": method, "peak": peak, "seconds": seconds, "processor": usage,
            "others": max(busy, common.others()), "planned": json.loads(file.read_text(encoding="utf-8")),
            "sparsity": saved["sparsity"], "metrics": saved["metrics"]}


def watched(process: subprocess.Popen) -> tuple[int, float]:
    """(highest resident set in bytes, processor seconds) of a process, when it has ended.

    A run resets the system's own mark when it begins to prune, so it is read all the time.
    """
    peak, ended = 0, None
    while ended is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
            peak = max(peak, *(1024 * int(mark) for mark in marks), 0)
        except OSError:
            pass
        time.sleep(0.02)
        pid, code, usage = os.wait4(process.pid, os.WNOHANG)
        ended = usage if pid else None
    process.returncode = os.waitstatus_to_exitcode(code)
    return peak, ended.ru_utime + ended.ru_stime  # its own ru_maxrss begins with this process's


# ---------------------------------------------------------------- on paper

def shape(size: str) -> Shape:
    """The Shape of one of synthetic.SIZES."""
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(synthetic.config(size), dtype=torch.bfloat16))


def paper(name: str, size: str, task: Task, speeds: dict[str, float], limits: tuple[float, float | None] | None = None,
          gpus: int = 1) -> list[str]:
    """A row of the table: what a run takes within the limits (memory, the GPU's), or on many GPUs (a process each)."""
    own, changed = shape(size), {}
    task = replace(task, processes=gpus, calibration=shared(task.calibration, gpus),
                   evaluation=shared(task.evaluation, gpus))
    if limits:
        changed = plan_command.fit(own, [task], limits, PROGRAM, list(forecast.STEPS))
        task = plan_command.applied(task, changed)
    found = forecast.phases(own, task, PROGRAM)
    here, there = forecast.peak(found, False if task.gpu else None)[1], forecast.peak(found, True)[1] if task.gpu else 0
    stages = forecast.work(own, task)
    times = {kind: sum(stage.get(kind, 0) for stage in stages.values()) / speeds[kind] for kind in forecast.KINDS}
    grams = sum(forecast.gram_bytes(layer, replace(task, budget=2**62)) for layer in own.layers)
    moved = (grams + sum(layer.stored for layer in own.layers)) * (gpus - 1)
    if gpus > 1:
        times["link"] = moved / gpus / speeds["link"]
    total, bound = sum(times.values()), max(times, key=lambda kind: times[kind])
    moves = sum(stage.get(kind, 0) for stage in stages.values() for kind in ("read", "written"))
    return [name, ", ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in changed.items()) or "as it is",
            f"{here * gpus / GIB:.1f}", f"{there / GIB:.1f}" if task.gpu else "", f"{moves / 1e9:.0f}",
            f"{moved / 1e9:.0f}" if gpus > 1 else "", f"{total / 3600:.2f}", f"{bound} ({times[bound] / total:.0%})"]


def shared(windows: tuple[int, int], processes: int) -> tuple[int, int]:
    """(windows, tokens of each) of the process that has most of them."""
    return -(-windows[0] // processes), windows[1]


def on_paper(speeds: dict[str, float] | None) -> str:
    """The table of larger models. speeds: this machine's with SparseGPT, if they were measured."""
    gpu = replace(ON_PAPER, gpu=True)
    body = [paper("70B, 24 GiB, this CPU", "70b", ON_PAPER, speeds, (24 * GIB, None))] if speeds else []
    body += [paper("70B, 24 GiB and a GPU of 24 GiB", "70b", gpu, ASSUMED, (24 * GIB, 24 * GIB)),
            paper("7B, a GPU", "7b", gpu, ASSUMED), paper("7B, 8 GPUs", "7b", gpu, ASSUMED, gpus=8),
            paper("70B, 8 GPUs", "70b", replace(gpu, offload=True, waits_on_cpu=True), ASSUMED, gpus=8)]
    return render(["run", "flags", "memory GiB", "GPU GiB", "disk GB", "between GPUs GB", "hours", "bound by"], body,
                  "markdown", text={"run", "flags", "bound by"})


def phases_on_paper() -> str:
    """Memory by part of 70B within 24 GiB, on a CPU, as `oneshot plan` prints it."""
    own = shape("70b")
    chosen = plan_command.fit(own, [ON_PAPER], (24 * GIB, None), PROGRAM, list(forecast.STEPS))
    found = forecast.phases(own, plan_command.applied(ON_PAPER, chosen), PROGRAM)
    body = [[phase, part.name, f"{part.bytes / GIB:.2f}"] for phase, parts in found.items() for part in parts
            if part.bytes]
    return render(["phase", "part", "GiB"], body, "markdown", text={"phase", "part"})


# ---------------------------------------------------------------- the page

def page(data: dict) -> str:
    """scale.md."""
    body = [[run["method"], f"{run['peak'] / GIB:.2f}", f"{run['planned']['peak'] / GIB:.2f}",
             f"{run['planned']['peak'] / run['peak'] - 1:+.0%}", f"{run['seconds']:.0f}", f"{run['processor']:.0f}",
             f"{(planned := sum(run['planned']['seconds'].values())):.0f}", f"{planned / run['seconds'] - 1:+.0%}",
             f"{planned / run['processor'] - 1:+.0%}", f"{run['others']:.1f}"] for run in data["runs"]]
    head = ["method", "peak GiB", "planned", "off", "seconds", "processor s", "planned s", "off", "off processor",
            "others"]
    stages = [[run["method"], stage, f"{own:.0f}"] for run in data["runs"]
              for stage, own in run["planned"]["seconds"].items()]
    speeds = {run["method"]: run["planned"]["speeds"] for run in data["runs"]}.get("sparsegpt")  # what is on paper
    kinds = [[kind, f"{speeds[kind]:.3g}" if speeds else "", f"{ASSUMED[kind]:.3g}"] for kind in forecast.KINDS]
    kinds.append(["link", "", f"{ASSUMED['link']:.3g}"])
    return f"""# A model larger than the memory it may take

A Llama of random weights, {data['bytes'] / 1e9:.3g} GB in bfloat16, pruned to 2:4 with `--offload disk` and few short
windows: 4 of 128 tokens, 4 to measure. Peak: the highest resident set, mapped files counted. Planned: by `oneshot
plan`, just before, for at most {LIMIT}. Others: cores that other processes took, by the load of a minute; the seconds
are longer for it, those of the processor are not.

{render(head, body, "markdown", text={"method"})}
The plan's time by stage, seconds:

{render(["method", "stage", "s"], stages, "markdown", text={"method", "stage"})}
## On paper: larger models

SparseGPT to 2:4 with 128 windows of 2048 tokens, WikiText-2 measured, by the plan's arithmetic and nothing else. The
CPU has the speeds that were measured here; those of a GPU are ASSUMED, as none was at hand (`oneshot plan` measures
them where there is one). Disk: what one process reads and writes, if nothing stays in the system's cache. Between
GPUs: Gram matrices to the one that solves a linear, and its weight back. Memory: of all processes, one a GPU; each
reads what it runs its windows on. GPU: of the one that has most. Hours: all work one after the other.

{on_paper(speeds)}
{phases_on_paper()}
The first of these runs, by part: the phases of 70B within 24 GiB on a CPU. Speeds, a second:

{render(["kind of work", "this CPU", "a GPU, assumed"], kinds, "markdown", text={"kind of work"})}
{common.written("scale.py", data["environment"])}
"""


if __name__ == "__main__":
    raise SystemExit(main())
