"""Every solver and refiner on single layers: seconds against its floor, error against SparseGPT's.

    python scripts/bench/solvers.py                  # results/bench/solvers.json and .md; minutes to an hour
    python scripts/bench/solvers.py --toy --out DIR  # the same at toy size, for the tests
    python scripts/bench/solvers.py --page           # only the page, from the JSON

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
from common import matmul_rate, written

from oneshot.calibrate import NEEDS, Statistics
from oneshot.prune import patterns, solvers
from oneshot.report import table
from oneshot.runtime import environment, products
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text

FLOORS = {  # operations of one linear (R, C), given what the solver notes about its steps
    "sparsegpt": lambda R, C, info: C**3 / 3 + R * C**2,
    "alps": lambda R, C, info: info["steps"] * (C**3 / 3 + 2 * R * C**2) +
            FLOORS["refit"](R, C, {"steps": info["refit_steps"]}),
    "refit": lambda R, C, info: (info["steps"] + 2) * 2 * R * C**2,
    "admm": lambda R, C, info: C**3 + 20 * 2 * R * C**2,  # one inverse, its default iterations
}
HEAD = ["method", "group", "seconds", "floor", "times floor", "error / sparsegpt", "zeros", "steps"]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(parse_args(argv)))


def work(args: argparse.Namespace) -> None:
    """Measure, unless only the page is wanted, and write both files."""
    file = args.out / "solvers.json"
    if not args.page:
        write_json(measure(args), file)
    write_text(markdown(json.loads(file.read_text())), args.out / "solvers.md")
    print(f"written: {args.out / 'solvers.md'}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = solvers.names()
    timed = [name for name in names["solver"] if "gradient" not in solvers.module(name).needs]  # it takes a model
    default = timed + [f"{s}+{r}" for s in ("wanda", "sparsegpt") for r in names["refiner"]]
    p = Parser(prog="python scripts/bench/solvers.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="2048x2048,5504x2048,2048x5504", help="outputs x inputs, by commas")
    p.add_argument("--patterns", default="0.7,2:4", type=lambda t: t.split(","))
    p.add_argument("--methods", default=default, type=lambda t: t.split(","), help="default: every solver and refiner")
    p.add_argument("--tokens", type=int, default=16384)
    p.add_argument("--product", type=int, default=2048, help="size of the products that set the rate")
    p.add_argument("--repeats", type=int, default=3, help="the median is kept")
    p.add_argument("--device", default="cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--page", action="store_true", help="measure nothing: the page of the JSON in --out")
    p.add_argument("--toy", action="store_true", help="64x64 and 32x172, 256 tokens")
    args = p.parse_args(argv)
    if args.toy:
        args.shapes, args.tokens, args.product, args.repeats = "64x64,32x172", 256, 256, 1
    args.shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    return args


@products.float32()
def measure(args: argparse.Namespace) -> dict:
    """All numbers, as the JSON holds them; a line on stdout for each."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "toy", "page")}
    out = {"settings": settings, "environment": environment.environment(args.device),
           "matmul_flops_per_s": matmul_rate(args.product), "rows": []}
    for R, C in args.shapes:
        W, inputs = problem(R, C, args)
        for text in args.patterns:
            base = None
            for method in ["sparsegpt", *(m for m in args.methods if m != "sparsegpt")]:
                row = solve(W, inputs, patterns.parse(text), method, args.repeats)
                base = base or row["error"]
                out["rows"].append(row | {"shape": [R, C], "pattern": text, "error": row["error"] / base})
                print(json.dumps(out["rows"][-1]), flush=True)
    return out


def problem(R: int, C: int, args: argparse.Namespace) -> tuple[torch.Tensor, Statistics]:
    """W (R, C) and the Statistics of its inputs."""
    gen = torch.Generator(args.device).manual_seed(args.seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, device=args.device)

    few = max(1, C // 8)
    mix, size, inputs = 2 * randn(few, C) / few**0.5, (0.7 * randn(C)).exp(), Statistics(C, NEEDS, args.device)
    for n in [min(2048, args.tokens - i) for i in range(0, args.tokens, 2048)]:
        inputs.update((randn(n, C) + randn(n, few) @ mix) * size)
    _ = inputs.G  # the mean itself is no solver's work
    return randn(R, C) / C**0.5, inputs


def solve(W: torch.Tensor, inputs: Statistics, pattern: patterns.Pattern, method: str, repeats: int) -> dict:
    """Seconds of the method's last part (median), the error of the whole, the floor in operations."""
    *before, (last, cfg) = ((module, module.Config()) for module in solvers.chain(method))
    pattern = pattern.with_default_group((before or [(last, cfg)])[0][1].group)
    start, times = solvers.solve(W, inputs, pattern, before) if before else None, []
    for _ in range(repeats):
        inputs.forget()
        began = time.perf_counter()
        solution = (last.refine(W, start, inputs, pattern, cfg) if before else last.prune(W, inputs, pattern, cfg))
        if W.is_cuda:
            torch.cuda.synchronize(W.device)
        times.append(time.perf_counter() - began)
    D, info = W - solution.W_hat, solution.info
    floor = FLOORS.get(solvers.short(last))
    return {"method": method, "group": pattern.group, "seconds": statistics.median(times),
            "floor_flops": floor(*W.shape, info) if floor else None, "error": ((D @ inputs.G) * D).sum().item(),
            "zeros": int((~solution.mask).sum()), "info": info}


def markdown(out: dict) -> str:
    """The results as a page."""
    s, rate = out["settings"], out["matmul_flops_per_s"]
    lines = ["# Solvers and refiners on single layers", "", written("solvers.py", out["environment"]), "",
             f"Random layers, statistics of {s['tokens']} tokens, seed {s['seed']}; seconds: median of {s['repeats']}; "
             f"float32 product of {s['product']}: {rate / 1e9:.0f} GFLOP/s. A refiner's seconds are its own.", ""]
    by_layer = itertools.groupby(out["rows"], key=lambda r: (r["shape"], r["pattern"]))
    for ((R, C), pattern), rows in by_layer:
        lines += [f"## {R} x {C}, {pattern}", "",
                  table.render(HEAD, [cells(row, R * C, rate) for row in rows], "markdown",
                               text={"method", "group", "steps"})]
    return "\n".join(lines)


def cells(row: dict, weights: int, rate: float) -> list[str]:
    """One line of a table: a way on a layer of so many weights."""
    floor = row["floor_flops"] / rate if row["floor_flops"] else None
    against = ("-", "-") if floor is None else (f"{floor:.3g}", f"{row['seconds'] / floor:.1f}")
    steps = ", ".join(f"{name} {value}" for name, value in row["info"].items()
                      if "step" in name or name in ("swaps", "exchanges", "rounds"))
    return [row["method"], str(row["group"] or ""), f"{row['seconds']:.3g}", *against, f"{row['error']:.3f}",
            f"{row['zeros'] / weights:.2%}", steps]


if __name__ == "__main__":
    sys.exit(main())
