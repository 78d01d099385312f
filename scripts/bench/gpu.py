"""Measure the 2:4 kernels on this GPU: correctness first, then the tables, in slices that resume.

    python scripts/bench/gpu.py --budget-s 540                 repeat until it says "done"
    TRITON_INTERPRET=1 python scripts/bench/gpu.py --toy       CPU: everything but the timing

Writes into --results: bench/kernels.csv, bench/decode.csv, bench/tuned (the tuned table of this card),
bench/gpu_state.json, from which the next slice continues, a section of tables.md and figures/kernels_speedup.png. A
wrong result stops it with exit code 1.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from gpu_baselines import BYTES, baselines
from gpu_checks import Wrong, fragment_map, paths, variants
from gpu_measure import Bench, ceilings, decode_model, fused_mlp, sweep
from gpu_report import write_report
from oneshot_kernels import dispatch
from oneshot_kernels.gpu import decode, expand, tune
from oneshot_kernels.gpu.mma_sp import INTERPRET

from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json

SHAPES = {  # (outputs, inputs) of the fused layers
    "Llama-2-7B": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "Llama-3-8B": {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "Qwen3-8B": {"gate_up": (24576, 4096), "down": (4096, 12288)},
    "Llama-3-70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
SWEEP_SHAPES = ((28672, 4096), (4096, 4096), (4096, 11008))  # large, small, 43 blocks for 8 warps
SWEEP_TOKENS = (1, 8, 16, 32, 64, 256)
KEEP = 3
"""How many of a sweep's best launch parameters are tried at every other shape."""
FIELDS = {
    "kernels": ["stage", "n", "k", "tokens", "method", "config", "us", "tb_per_s", "tflop_per_s", "percent_of_read",
                "speedup", "error"],
    "decode": ["stage", "method", "batch", "ms_per_step", "tokens_per_s", "speedup", "peak_gib", "error"],
}
STAMP = ("commit", "device", "torch", "triton", "dtype")


class Results:
    """The folder of results: rows appended as they are measured, and which units are done."""

    def __init__(self, folder: Path, stamp: dict, restart: bool):
        self.folder, self.stamp = folder, stamp
        self.state_path = folder / "gpu_state.json"
        folder.mkdir(parents=True, exist_ok=True)
        state = json.loads(self.state_path.read_text()) if self.state_path.exists() and not restart else {}
        self.done = state.get("done", []) if state.get("stamp") == stamp else []  # other code or card: start over

    def rows(self, name: str) -> list[dict]:
        """This run's rows of kernels.csv or decode.csv, numbers as floats."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            mine = [row for row in csv.DictReader(file) if all(row[key] == self.stamp[key] for key in STAMP)]
        return [{key: number(value) for key, value in row.items()} for row in mine]

    def add(self, unit: str, rows: list[dict]) -> None:
        """Append a finished unit's rows and remember that it is done."""
        for name in FIELDS:
            chosen = [row for row in rows if (row["stage"] == "decode") == (name == "decode")]
            if chosen:
                self._append(name, chosen)
        self.done.append(unit)
        write_json({"stamp": self.stamp, "done": self.done}, self.state_path)

    def _append(self, name: str, rows: list[dict]) -> None:
        path = self.folder / f"{name}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*STAMP, *FIELDS[name]])
            if new:
                writer.writeheader()
            writer.writerows({**self.stamp, **{k: text(v) for k, v in row.items()}} for row in rows)


def number(text: str) -> float | str:
    """A cell as it was before it was written."""
    try:
        return float(text)
    except ValueError:
        return text


def text(value) -> str | int:
    """A value as a cell."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return json.dumps(value) if isinstance(value, dict) else value


def stamp(commit: str | None, device: torch.device, dtype: torch.dtype) -> dict:
    """What every row carries."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (toy run, no timing)"
    commit = commit or environment.git("describe", "--always", "--dirty", "--exclude=*") or "unknown"
    return {"commit": commit, "device": name, "torch": torch.__version__, "triton": triton.__version__,
            "dtype": str(dtype).removeprefix("torch.")}


Unit = tuple[str, Callable[[], list[dict]]]


def units(bench: Bench, results: Results) -> Iterator[Unit]:
    """(name, function returning rows), in the order of what a reader must believe first."""
    toy = bench.toy
    shapes = [(32, 36)] if toy else sorted({s for group in SHAPES.values() for s in group.values()})
    tokens = (1, 16) if toy else TOKENS
    sweep_shapes, sweep_tokens = (shapes, (16,)) if toy else (SWEEP_SHAPES, SWEEP_TOKENS)

    def candidates(m: int) -> dict[str, list]:
        everything = {"decode": tune.decode_candidates(m), "middle": tune.middle_candidates(m)}
        everything["decode"] = everything["decode"] if m <= decode.MAX_TOKENS else []
        return {path: configs[:1] if toy else configs for path, configs in everything.items()}

    def check(function, *args) -> list[dict]:
        return [{"stage": "check", **row} for row in function(*args) or []]

    yield "check fragment map", lambda: check(fragment_map, bench.device, bench.dtype)
    yield "check paths", lambda: check(paths, bench.device, bench.dtype, toy)
    ks, workers = ((36,), 1) if toy else ((4096, 11008), min(12, os.cpu_count() or 1))
    for m in sweep_tokens:
        yield f"check variants {m}", lambda m=m: check(variants, bench.device, m, candidates(m), ks, workers)
    yield "ceilings", lambda: ceilings(bench)
    for n, k in sweep_shapes:
        for m in sweep_tokens:
            yield f"sweep {n}x{k} {m}", lambda n=n, k=k, m=m: sweep(bench, tune.Shape(n, k), m, candidates(m))
    for m in tokens:
        for n, k in shapes:
            yield f"table {n}x{k} {m}", lambda n=n, k=k, m=m: table_rows(bench, results, n, k, m)
    hidden, intermediate = (36, 20) if toy else (4096, 14336)
    for m in (1,) if toy else (1, 4, 16):
        yield f"mlp {m}", lambda m=m: fused_mlp(bench, hidden, intermediate, m)
    yield "decode", lambda: decode_model(bench, (1,) if toy else (1, 4, 16))


def table_rows(bench: Bench, results: Results, n: int, k: int, tokens: int) -> list[dict]:
    """One cell of the table: the baselines, and the fastest of each of our paths. Adds to this card's tuned table."""
    shape = tune.Shape(n, k)
    rows = baselines(bench, shape, tokens)
    swept = results.rows("kernels")
    ours = sweep(bench, shape, tokens, {path: best_configs(swept, path, tokens) for path in ("decode", "middle")})
    fastest = tune.fastest([{"path": row["method"], **row} for row in ours])
    if not bench.toy:
        path = dispatch.table_path(bench.device)
        tune.add_to_table(path, shape, bench.dtype, bench.device, tokens, fastest)
    for name, entry in fastest.items():
        if name == "sparselt":
            continue  # measured as a baseline
        error = max(row["error"] for row in ours if row["method"] == name)
        common = {"stage": "table", "n": n, "k": k, "tokens": tokens}
        rows.append({**common, "method": f"ours: {name}", "config": entry["config"], "us": entry["us"], "error": error})
    return rows


def best_configs(rows: list[dict], path: str, tokens: int) -> list:
    """The KEEP fastest launch parameters of each sweep at the next swept number of tokens up (or the largest)."""
    swept = [row for row in rows if row["stage"] == "sweep" and row["method"] == path]
    if not swept:
        return []
    nearest = min({row["tokens"] for row in swept}, key=lambda m: (m < tokens, abs(m - tokens)))
    kind = {"decode": decode.Config, "middle": expand.Config}[path]
    chosen = {}
    for shape in {(row["n"], row["k"]) for row in swept}:
        here = [row for row in swept if (row["n"], row["k"]) == shape and row["tokens"] == nearest]
        for row in sorted(here, key=lambda row: row["us"] or math.inf)[:KEEP]:
            chosen[row["config"]] = kind(**json.loads(row["config"]))
    return list(chosen.values())


def derive(rows: list[dict], read_tb_per_s: float | None) -> None:
    """Fill in bandwidth, its share of the read ceiling, and the speed-up over dense."""
    dense = {(r.get("n"), r.get("tokens"), r.get("batch")): r for r in rows if r["method"] == "dense"}
    for row in rows:
        if row["stage"] in ("table", "sweep", "mlp") and row.get("us"):
            share = BYTES.get(row["method"], 9 / 16)
            row["tb_per_s"] = row["n"] * row["k"] * 2 * share / row["us"] / 1e6
            if read_tb_per_s:
                row["percent_of_read"] = 100 * row["tb_per_s"] / read_tb_per_s
        base = dense.get((row.get("n"), row.get("tokens"), row.get("batch")))
        if base is not None and base is not row:
            for time_field in ("us", "ms_per_step"):
                if base.get(time_field) and row.get(time_field):
                    row["speedup"] = base[time_field] / row[time_field]


def run(bench: Bench, results: Results, budget_s: float) -> bool:
    """Run units until the budget is spent. Returns True when all are done."""
    start = time.monotonic()
    longest = 0.0
    for name, function in units(bench, results):
        if name in results.done:
            continue
        if time.monotonic() - start + longest > budget_s:
            print(f"budget spent before {name!r}; run again to go on", flush=True)
            return False
        began = time.monotonic()
        rows = function()
        read = [row["tb_per_s"] for row in results.rows("kernels") if row["method"] == "read"]
        derive(rows, read[-1] if read and isinstance(read[-1], float) else None)
        results.add(name, rows)
        longest = max(longest, time.monotonic() - began)
        print(f"{time.monotonic() - start:6.0f} s  {name}", flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Exit code: see above."""
    return exit_code(lambda: work(arguments(argv)), interrupted=lambda: "the same command continues")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError where it asks for what this machine does not have."""
    p = Parser(prog="python scripts/bench/gpu.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, help="folder to write to (default: results; build/gpu_toy for --toy, whose "
                                                "rows hold no times)")
    p.add_argument("--budget-s", type=float, default=540, help="stop before this many seconds; run again to continue")
    p.add_argument("--toy", action="store_true", help="CPU: toy sizes, no timing")
    p.add_argument("--restart", action="store_true", help="measure everything again")
    p.add_argument("--commit", help="commit to stamp the rows with, where there is no git")
    args = p.parse_args(argv)
    if args.toy and not INTERPRET:
        raise ValueError("--toy: runs the kernels on CPU, set TRITON_INTERPRET=1")
    if not args.toy and not torch.cuda.is_available():
        raise ValueError("no GPU here; --toy runs everything but the timing on CPU")
    args.results = args.results or Path("build/gpu_toy" if args.toy else "results")
    return args


def work(args: argparse.Namespace) -> int:
    """One slice, then the report of all there is. Exit code 1 where something is wrong."""
    device = torch.device("cpu") if args.toy else torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float16 if args.toy else torch.bfloat16  # the interpreter truncates bfloat16
    os.environ.setdefault("ONESHOT_KERNELS_CACHE", str(args.results / "bench" / "tuned"))
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench(device, dtype, args.toy)
    results = Results(args.results / "bench", stamp(args.commit, device, dtype), args.restart)
    try:
        finished = run(bench, results, args.budget_s)
    except (Wrong, RuntimeError) as failure:
        print(f"STOPPED: {failure}", file=sys.stderr)
        return 1
    write_report(args.results, results.rows("kernels"), results.rows("decode"), results.stamp, finished)
    print("done" if finished else "not done: run again", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
