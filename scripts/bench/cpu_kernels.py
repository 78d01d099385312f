"""The compiled CPU kernels: 2:4 against its dense twin, torch, and the speed of memory, interleaved in one run.

    python scripts/bench/cpu_kernels.py                   # results/bench/cpu_kernels.csv; some minutes
    python scripts/bench/cpu_kernels.py --toy --out DIR   # the same at toy size, for the tests

Every method takes its turn in every round, each time on other copies of the weight (together at least 256 MB, beyond
the last-level cache), and medians are kept. Results are compared with float64 before anything is timed.

    torch     F.linear in the same dtype        dense  the dense twin: same source, same tiles, same number of streams
    2:4       cpu/linear.py on tiles            layer  the same through Sparse24Linear, as a model calls it
    read      reading as many bytes as the dense weight has with four streams a thread: the limit of `dense`

`limit` is the share of the read limit that a method reaches, by its own bytes. `load` is what other processes took, in
cores, at the worst moment (the average of a minute less this program's threads); from 0.3 on the row is marked `busy`,
and only its ratios mean something.
"""

import argparse
import csv
import functools
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import others
from oneshot_kernels import Sparse24Linear, reference
from oneshot_kernels.cpu import bandwidth, layout, library, linear

from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

HEAD = ["rows", "k", "dtype", "tokens", "threads", "method", "us", "gb_s", "limit", "over_dense", "over_torch", "error",
        "load", "machine", "variant", "device", "torch", "commit", "date"]
PACKED = {torch.bfloat16: 0.5625, torch.float16: 0.5625, torch.float32: 0.53125}  # bytes of 2:4, of the dense ones
BUSY = 0.3


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(parse_args(argv)))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/cpu_kernels.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="576x576,1536x576,576x1536,2048x2048,5632x2048,4096x4096,11008x4096,4096x11008",
                   help="outputs x inputs, by commas")
    p.add_argument("--tokens", default="1,4,16,64")
    p.add_argument("--dtypes", default="bfloat16,float32")
    p.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    p.add_argument("--rounds", type=int, default=60, help="the median is kept")
    p.add_argument("--cold", type=int, default=256, help="MB of all copies of a weight together, at least")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="one small shape, two rounds")
    args = p.parse_args(argv)
    if args.toy:
        args.shapes, args.tokens, args.rounds, args.cold = "640x512", "1,3", 2, 4
    args.shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    args.tokens, threads = ([int(n) for n in text.split(",")] for text in (args.tokens, args.threads))
    args.threads = sorted(set(threads))
    args.dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    return args


def work(args: argparse.Namespace) -> None:
    """Measure everything, print rows as they come, write the file at the end."""
    if not linear.available():
        raise ValueError(f"nothing to measure: {library.why('linear')}; install g++ or clang++")
    where, rows, before = environment.environment("cpu"), [], torch.get_num_threads()
    about = [library.why("linear"), where["device"], where["torch"],
             where["commit"] + (" (dirty)" if where["dirty"] else ""), where["date"]]
    try:
        for rows_k, dtype, threads in ((s, d, t) for t in args.threads for d in args.dtypes for s in args.shapes):
            torch.set_num_threads(threads)
            for line in measure(*rows_k, dtype, args):
                rows.append([*line, *about])
                print(",".join(map(str, rows[-1][:14])), flush=True)
    finally:
        torch.set_num_threads(before)
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])
    write_text(file.getvalue(), args.out / "cpu_kernels.csv")


def measure(n: int, k: int, dtype: torch.dtype, args: argparse.Namespace) -> list[list]:
    """The rows of one weight with the number of threads that torch has now, up to `machine`."""
    generator = torch.Generator().manual_seed(n + k)
    weight = reference.random_24(n, k, dtype, generator)
    size = weight.numel() * weight.element_size()
    copies = max(1, -(-args.cold * 10**6 // size))
    kinds = forms(weight, copies)
    out = []
    for tokens in args.tokens:
        x = torch.randn(tokens, k, generator=generator).to(dtype)
        truth = F.linear(x.double(), weight.double())
        errors = {name: reference.relative_error(run(x, 0), truth) for name, run in kinds.items() if name != "read"}
        worst = max(errors.values())
        if not worst <= 2 * errors["torch"] + torch.finfo(dtype).eps:
            raise ValueError(f"{n}x{k} {dtype}, {tokens} tokens: wrong results, relative errors {errors}")
        busy = others()
        us = interleaved({name: functools.partial(run, x) for name, run in kinds.items()}, args.rounds, copies)
        busy = max(busy, others())
        for name, median in us.items():
            own = size * (PACKED[dtype] if name in ("2:4", "layer") else 1)
            out.append([n, k, str(dtype).removeprefix("torch."), tokens, torch.get_num_threads(), name, f"{median:.1f}",
                        f"{own / median / 1e3:.2f}", f"{own / median / (size / us['read']):.2f}",
                        f"{us['dense'] / median:.2f}", f"{us['torch'] / median:.2f}",
                        f"{errors.get(name, 0):.1e}", f"{busy:.1f}", "busy" if busy > BUSY else "idle"])
    return out


def forms(weight: torch.Tensor, copies: int) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """{method: f(x, which copy) -> y}, each with its own copies of the weight."""
    n, lanes = len(weight), linear.lanes()
    packed = reference.pack(weight)
    plain = [library.huge_pages(weight.clone()) for _ in range(copies)]
    dense = [layout.dense_tiles(weight, lanes) for _ in range(copies)]
    tiles = [layout.to_tiles(packed, lanes) for _ in range(copies)]
    layers = [Sparse24Linear.from_packed(*packed[:2]) for _ in range(copies)]
    return {"torch": lambda x, i: F.linear(x, plain[i]), "dense": lambda x, i: linear.linear(x, dense[i], None, n),
            "2:4": lambda x, i: linear.linear(x, *tiles[i], n), "layer": lambda x, i: layers[i](x),
            "read": lambda x, i: bandwidth.read(plain[(i + copies // 2) % copies])}  # not the one that torch just read


def interleaved(runs: dict[str, Callable[[int], object]], rounds: int, copies: int) -> dict[str, float]:
    """{method: median microseconds}; all methods in every round, on the next copy of the weight."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for i in range(rounds + 1):
            for name, run in runs.items():
                began = time.perf_counter()
                run(i % copies)
                if i:  # the first round warms up
                    times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) * 1e6 for name, seconds in times.items()}


if __name__ == "__main__":
    sys.exit(main())
