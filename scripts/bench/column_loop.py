"""SparseGPT's column loop: the published one, ours in torch, ours compiled, and the floor, in one run.

    python scripts/bench/column_loop.py                  # results/bench/column_loop.csv; a few minutes
    python scripts/bench/column_loop.py --toy --out DIR  # the same at toy size, for the tests

Each row is one square layer and one pattern. Random weights, correlated inputs; the factor of the Gram matrix is given
to all three, so what is timed is everything behind it: compensation, masks, updates. The three run in turn, and medians
are kept.

    published_s   `published.prune_columns`, the public repository's loop
    reference_s   `oneshot.prune.solvers.sparsegpt` with its loop in torch
    compiled_s    the same with oneshot_kernels/cpu/column_loop.py
    floor_s       R·C² operations (every column's error goes to all columns right of it), at the rate of large float32
                  products measured in the same round, multiplied as the commands do (runtime/products.py)

`masks_differ` counts weights that only one of the last two keeps. `load` is what other processes took of the machine,
in cores (the average of a minute less this program's threads): on a busy machine only ratios mean something.
"""

import argparse
import csv
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import published
import torch
from common import matmul_rate, others, removed
from oneshot_kernels.cpu import column_loop, library

from oneshot.calibrate import Statistics
from oneshot.prune import linalg, patterns
from oneshot.prune.solvers import sparsegpt
from oneshot.runtime import environment, products
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

HEAD = ["shape", "pattern", "published_s", "reference_s", "compiled_s", "floor_s", "times_floor", "times_published",
        "masks_differ", "variant", "threads", "load", "device", "torch", "commit", "date"]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(parse_args(argv)))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/column_loop.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", default="576,1024,1536,2048,3072,4096", help="R = C, by commas")
    p.add_argument("--patterns", default="2:4,0.5")
    p.add_argument("--product", type=int, default=1024, help="size of the products that set the rate")
    p.add_argument("--repeats", type=int, default=5, help="the median is kept")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="64 columns, one repeat")
    args = p.parse_args(argv)
    if args.toy:
        args.sizes, args.product, args.repeats = "64", 128, 1
    args.sizes = [int(size) for size in args.sizes.split(",")]
    return args


def work(args: argparse.Namespace) -> None:
    """Measure all, print each row when it is there, write the file at the end."""
    if not column_loop.available(torch.empty(0)):
        raise ValueError(f"nothing to compare: {library.why('column_loop')}; install g++ or clang++")
    where = environment.environment("cpu")
    about = [library.why("column_loop"), where["threads"], None, where["device"], where["torch"],
             where["commit"] + (" (dirty)" if where["dirty"] else ""), where["date"]]
    rows = []
    for size in args.sizes:
        for text in args.patterns.split(","):
            before = others()
            row = measure(size, patterns.parse(text), args)
            about[2] = f"{max(before, others()):.1f}"
            rows.append([*row, *about])
            print(",".join(map(str, rows[-1])), flush=True)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])
    write_text(file.getvalue(), args.out / "column_loop.csv")


def measure(C: int, pattern: patterns.Pattern, args: argparse.Namespace) -> list:
    """A row up to `masks_differ`."""
    torch.manual_seed(args.seed)
    W, tokens = torch.randn(C, C), torch.randn(2 * C, C) @ (torch.eye(C) + torch.randn(C, C) / C**0.5)
    stats = Statistics(C, sparsegpt.needs)
    stats.update(tokens)
    V, _, _ = linalg.upper_factor(stats, 0.01, W.dtype)  # cached in the statistics
    Hinv = torch.linalg.inv(V).triu_()
    runs = {"published": lambda: published.prune_columns(W.clone(), Hinv, *removed(pattern), 128),
            "reference": lambda: ours(W, stats, pattern, False), "compiled": lambda: ours(W, stats, pattern, True)}
    differ = int((runs["reference"]().mask != runs["compiled"]().mask).sum())
    seconds: dict[str, list[float]] = {name: [] for name in [*runs, "floor"]}
    for _ in range(args.repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
        seconds["floor"].append(C**3 / matmul_rate(args.product))
    found = {name: statistics.median(times) for name, times in seconds.items()}
    return [f"{C}x{C}", str(pattern), *(f"{found[name]:.4g}" for name in seconds),
            f"{found['compiled'] / found['floor']:.2f}", f"{found['published'] / found['compiled']:.2f}", differ]


def ours(W: torch.Tensor, stats: Statistics, pattern: patterns.Pattern, compiled: bool) -> sparsegpt.Solution:
    """The solver, with or without the compiled loop."""
    real = column_loop.available
    column_loop.available = real if compiled else lambda W: False
    try:
        with products.float32():  # as in every command
            return sparsegpt.prune(W, stats, pattern, sparsegpt.Config())
    finally:
        column_loop.available = real


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
