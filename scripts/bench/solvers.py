"""Every solver and refiner on single layers: seconds against its floor, error against SparseGPT's.

    python scripts/bench_solvers.py                  # results/bench_solvers.json and .md; minutes to an hour
    python scripts/bench_solvers.py --toy            # the same at toy size, for the tests

Random weights; inputs correlated and of different size (an eighth of the directions carries most of them). Statistics
are given; what linears fed by the same tensor would share (factors, the scaled Gram matrix) is made anew each time. A
refiner is timed alone, behind the solver named before it. Floor: the operations that its file names, at the rate of
large float32 products in the same run; "-" where the work is bound by memory or its floor is not written down below.
So for swaps: rows that are settled leave its rounds, and how many were left in each is not noted.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from bench_prune import matmul_rate

from oneshot import report
from oneshot.prune import patterns, solvers
from oneshot.runtime import environment
from oneshot.calibrate.statistics import NEEDS, Statistics

FLOORS = {  # operations of one linear (R, C), given what the solver notes about its steps
    "sparsegpt": lambda R, C, info: C**3 / 3 + R * C**2,
    "alps": lambda R, C, info: info["steps"] * (C**3 / 3 + 2 * R * C**2) +
            FLOORS["refit"](R, C, {"steps": info["refit_steps"]}),
    "refit": lambda R, C, info: (info["steps"] + 2) * 2 * R * C**2,
    "admm": lambda R, C, info: C**3 + 20 * 2 * R * C**2,  # one inverse, its default iterations
}


def main(argv=None):
    args = parse_args(argv)
    out = {"settings": {k: v for k, v in vars(args).items() if k not in ("out", "toy")},
           "environment": environment.environment(args.device), "matmul_flops_per_s": matmul_rate(args.product),
           "rows": []}
    for R, C in args.shapes:
        W, statistics = problem(R, C, args)
        for text in args.patterns:
            base = None
            for method in ["sparsegpt", *(m for m in args.methods if m != "sparsegpt")]:
                row = measure(W, statistics, patterns.parse(text), method, args)
                base = base or row["error"]
                out["rows"].append(row | {"shape": [R, C], "pattern": text, "error": row["error"] / base})
                print(json.dumps(out["rows"][-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(out, indent=1) + "\n", args.out / "bench_solvers.json")
    report.write_text(markdown(out), args.out / "bench_solvers.md")


def parse_args(argv):
    names = solvers.names()
    default = names["solver"] + [f"{s}+{r}" for s in ("wanda", "sparsegpt") for r in names["refiner"]]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="2048x2048,5504x2048,2048x5504", help="outputs x inputs, by commas")
    p.add_argument("--patterns", default="0.7,2:4", type=lambda t: t.split(","))
    p.add_argument("--methods", default=default, type=lambda t: t.split(","), help="default: every solver and refiner")
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--product", type=int, default=2048, help="size of the products that set the rate")
    p.add_argument("--repeats", type=int, default=3, help="the median is kept")
    p.add_argument("--device", default="cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--toy", action="store_true", help="64x64 and 32x172, 256 tokens")
    args = p.parse_args(argv)
    if args.toy:
        args.shapes, args.tokens, args.product, args.repeats = "64x64,32x172", 256, 256, 1
    args.shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    return args


def problem(R, C, args):
    """W (R, C) and the Statistics of its inputs."""
    gen = torch.Generator(args.device).manual_seed(args.seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, device=args.device)

    few = max(1, C // 8)
    mix, size, statistics = 2 * randn(few, C) / few**0.5, (0.7 * randn(C)).exp(), Statistics(C, NEEDS, args.device)
    for n in [min(2048, args.tokens - i) for i in range(0, args.tokens, 2048)]:
        statistics.update((randn(n, C) + randn(n, few) @ mix) * size)
    _ = statistics.G  # the mean itself is no solver's work
    return randn(R, C) / C**0.5, statistics


def measure(W, statistics, pattern, method, args):
    """Seconds of the method's last part (median), the error of the whole, the floor in operations."""
    *before, (last, cfg) = ((module, module.Config()) for module in solvers.chain(method))
    pattern = pattern.with_default_group((before or [(last, cfg)])[0][1].group)
    start, times = solvers.solve(W, statistics, pattern, before) if before else None, []
    for _ in range(args.repeats):
        statistics._derived.clear()
        began = time.perf_counter()
        solution = (last.refine(W, start, statistics, pattern, cfg) if before else last.prune(W, statistics, pattern, cfg))
        if W.is_cuda:
            torch.cuda.synchronize(W.device)
        times.append(time.perf_counter() - began)
    D, info = W - solution.W_hat, solution.info
    floor = FLOORS.get(solvers.short(last))
    return {"method": method, "group": pattern.group, "seconds": statistics.median(times),
            "floor_flops": floor(*W.shape, info) if floor else None, "error": ((D @ statistics.G) * D).sum().item(),
            "zeros": int((~solution.mask).sum()), "info": info}


def markdown(out):
    """The results as a page."""
    s, e, rate = out["settings"], out["environment"], out["matmul_flops_per_s"]
    lines = ["# Solvers and refiners on single layers", "",
             f"Written by `scripts/bench_solvers.py`; commit {e['commit']}{' (dirty)' if e['dirty'] else ''}, "
             f"{e['device']}, {e['threads']} threads, torch {e['torch']}, {e['date']}.", "",
             f"Random layers, statistics of {s['tokens']} tokens, seed {s['seed']}; seconds: median of {s['repeats']}; "
             f"float32 product of {s['product']}: {rate / 1e9:.0f} GFLOP/s. A refiner's seconds are its own.", ""]
    by_layer = itertools.groupby(out["rows"], key=lambda r: (r["shape"], r["pattern"]))
    for ((R, C), pattern), rows in by_layer:
        lines += [f"## {R} x {C}, {pattern}", "",
                  "| method | group | seconds | floor | times floor | error / sparsegpt | zeros | steps |",
                  "|---|---|---|---|---|---|---|---|"]
        for r in rows:
            floor = r["floor_flops"] / rate if r["floor_flops"] else None
            cells = ("-", "-") if floor is None else (f"{floor:.3g}", f"{r['seconds'] / floor:.1f}")
            notes = ", ".join(f"{k} {v}" for k, v in r["info"].items()
                              if "step" in k or k in ("swaps", "exchanges", "rounds"))
            lines.append(f"| {r['method']} | {r['group'] or ''} | {r['seconds']:.3g} | {' | '.join(cells)} | "
                         f"{r['error']:.3f} | {r['zeros'] / (R * C):.2%} | {notes} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
