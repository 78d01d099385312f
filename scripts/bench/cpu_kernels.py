"""The compiled CPU kernels: 2:4 against its dense twin, torch, and the speed of memory, interleaved in one run.

    python scripts/bench/cpu_kernels.py                   # results/bench/cpu_kernels.csv; some minutes
    python scripts/bench/cpu_kernels.py --toy --out DIR   # the same at toy size, for the tests

Every method takes its turn in every round: it passes over its copies of the weight (together at least 256 MB, and as
much as the last-level cache), as a model passes over its layers, once unmeasured and once measured; a pass of more than
TURN seconds goes on in the next round. Medians over the rounds. Results are compared with float64 before anything is
timed.

    torch     F.linear in the same dtype, for integers in bfloat16
    torch's   its own product of the very codes, dense, inputs in bfloat16 and not rounded, where this torch has one
    dense     the dense twin: same source, same tiles, as many weights read at once
    2:4       cpu/linear.py on tiles, or cpu/integers.py (int8, int4; inputs in bfloat16, rounded to int8)
    layer     the same through its module, as a model calls it
    read      reading as many bytes as the dense weight has with four streams a thread: the limit of `dense`

Errors of integers are against float64 on the very codes; torch's is then that of rounding. `limit` is the share of the
read limit that a method reaches, by its own bytes. `load` is what other processes took, in cores, at the worst moment
(the average of a minute less this program's threads); above 0.3 the row is marked `busy`: only its ratios count.
Before each weight and number of tokens memory is read for a while (common.Memory), up to --tries times as long as it is
slower than 0.8 of the best of this run; `memory` is that share, and below 0.8 the row is marked `slow memory`. Rows of
other machines, and those that this run does not measure, stay in the file.
"""

import argparse
import csv
import functools
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Memory, last_level, others, thread_counts
from oneshot_kernels import Sparse24Linear, reference
from oneshot_kernels.cpu import bandwidth, codes, integers, layout, library, linear

from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

HEAD = ["rows", "k", "dtype", "tokens", "threads", "method", "us", "gb_s", "limit", "over_dense", "over_torch", "error",
        "load", "memory", "machine", "variant", "device", "torch", "commit", "date"]
TURN = 0.3
BUSY, QUIET = 0.3, 0.8  # load of others at most; share of the best memory speed at least
Run, Exact = Callable[[torch.Tensor, int], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]


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
    p.add_argument("--dtypes", default="bfloat16,float16,float32,int8,int4")
    p.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    p.add_argument("--rounds", type=int, default=7, help="the median is kept")
    p.add_argument("--tries", type=int, default=10, help="to wait for memory that is slower than it was")
    p.add_argument("--cold", type=int, default=max(256, last_level() // 10**6 + 1),
                   help="MB of all copies of a weight together, at least (default: as the last-level cache)")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="one small shape, two rounds")
    args = p.parse_args(argv)
    if args.toy:
        args.shapes, args.tokens, args.rounds, args.cold = "640x512", "1,3", 2, 4
    args.shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    args.tokens = [int(n) for n in args.tokens.split(",")]
    args.threads = thread_counts(args.threads, args.toy)
    args.dtypes = args.dtypes.split(",")
    return args


def work(args: argparse.Namespace) -> None:
    """Measure everything, print rows as they come, write the file at the end."""
    if not linear.available():
        raise ValueError(f"nothing to measure: {library.why('linear')}; install g++ or clang++")
    where, rows, before = environment.environment("cpu"), [], torch.get_num_threads()
    about = [library.why("linear"), where["device"], where["torch"],
             where["commit"] + (" (dirty)" if where["dirty"] else ""), where["date"]]
    memory = Memory(args.cold, 0.0 if args.toy else 0.6)
    try:
        for rows_k, kind, threads in ((s, d, t) for t in args.threads for d in args.dtypes for s in args.shapes):
            torch.set_num_threads(threads)
            for line in measure(*rows_k, kind, memory, args):
                rows.append([*line, *about])
                print(",".join(map(str, rows[-1][:15])), flush=True)
    finally:
        torch.set_num_threads(before)
    text, file = io.StringIO(), args.out / "cpu_kernels.csv"
    csv.writer(text, lineterminator="\n").writerows([HEAD, *others_of(file, rows), *rows])
    write_text(text.getvalue(), file)


def others_of(file: Path, rows: list[list]) -> list[list[str]]:
    """The rows in a file that were measured elsewhere, or of what `rows` do not hold."""
    same = [HEAD.index(name) for name in ("rows", "k", "dtype", "tokens", "threads", "device", "variant")]
    new = {tuple(str(row[i]) for i in same) for row in rows}
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    kept = [[row.get(name, "") for name in HEAD] for row in csv.DictReader(text.splitlines())]
    return [row for row in kept if tuple(row[i] for i in same) not in new]


def measure(n: int, k: int, kind: str, memory: Memory, args: argparse.Namespace) -> list[list]:
    """The rows of one weight with the number of threads that torch has now, up to `machine`."""
    generator = torch.Generator().manual_seed(n + k)
    integer = kind.startswith("int")
    floats = torch.bfloat16 if integer else getattr(torch, kind)
    weight = reference.random_24(n, k, floats, generator)
    copies = max(1, -(-args.cold * 10**6 // (weight.numel() * weight.element_size() * 9 // 16)))  # 2:4 has fewest bytes
    kinds, size, exact = (integer_forms if integer else forms)(weight, copies, kind)
    out = []
    for tokens in args.tokens:
        x = torch.randn(tokens, k, generator=generator).to(floats)
        truth = exact(x)
        errors = {name: reference.relative_error(run(x, 0), truth) for name, run in kinds.items() if name != "read"}
        limit = 2 * reference.relative_error(truth.to(floats), truth) + torch.finfo(floats).eps * 4
        if not max(errors[name] for name in ("dense", "2:4", "layer")) <= limit:
            raise ValueError(f"{n}x{k} {kind}, {tokens} tokens: wrong results, relative errors {errors}")
        busy = others()
        share = waited(memory, args.tries)
        us = interleaved({name: functools.partial(run, x) for name, run in kinds.items()}, args.rounds, copies)
        busy = round(max(busy, others()), 1)  # as it is written
        state = "busy" if busy > BUSY else "slow memory" if share < QUIET else "idle"
        for name, median in us.items():
            out.append([n, k, kind, tokens, torch.get_num_threads(), name, f"{median:.1f}",
                        f"{size[name] / median / 1e3:.2f}", f"{size[name] / median / (size['read'] / us['read']):.2f}",
                        f"{us['dense'] / median:.2f}", f"{us['torch'] / median:.2f}",
                        f"{errors.get(name, 0):.1e}", f"{busy:.1f}", f"{share:.2f}", state])
    return out


def waited(memory: Memory, tries: int) -> float:
    """Read memory, up to `tries` times while it is slow; its speed, of the best of this run."""
    for _ in range(tries):
        if (share := memory.speed() / memory.best[torch.get_num_threads()]) >= QUIET:
            break
    return share


def forms(weight: torch.Tensor, copies: int, kind: str) -> tuple[dict[str, Run], dict[str, int], Exact]:
    """({method: f(x, which copy) -> y}, its bytes, f(x) -> the exact result); every method has its own copies."""
    n, lanes = len(weight), linear.lanes()
    packed = reference.pack(weight)
    plain = [library.huge_pages(weight.clone()) for _ in range(copies)]
    dense = [layout.dense_tiles(weight, lanes) for _ in range(copies)]
    layers = [Sparse24Linear.from_packed(*packed[:2]) for _ in range(copies)]
    tiles = [(layer.weight.data, layer.metadata) for layer in layers]
    away = copies // 2  # not the copy that another method has just read
    runs = {"torch": lambda x, i: F.linear(x, plain[i]), "dense": lambda x, i: linear.linear(x, dense[i], None, n),
            "2:4": lambda x, i: linear.linear(x, *tiles[i], n), "layer": lambda x, i: layers[(i + away) % copies](x),
            "read": lambda x, i: bandwidth.read(plain[(i + away) % copies])}
    whole, sparse = held(plain[:1]), held(packed[:2])
    size = {"torch": whole, "dense": whole, "2:4": sparse, "layer": sparse, "read": whole}
    return runs, size, lambda x: F.linear(x.double(), weight.double())


def integer_forms(weight: torch.Tensor, copies: int, kind: str) -> tuple[dict[str, Run], dict[str, int], Exact]:
    """`forms` of int8 and int4 weights; twice and four times as many copies as of bfloat16."""
    bits, copies = int(kind.removeprefix("int")), copies * 16 // int(kind.removeprefix("int"))
    rounded = codes.round_rows(weight) if bits == 8 else codes.round_groups(weight)
    plain = [library.huge_pages(weight.clone()) for _ in range(max(1, copies * bits // 16))]
    dense = [integers.prepare(*rounded, sparse=False, bits=bits) for _ in range(copies)]
    sparse = [integers.prepare(*rounded, sparse=True, bits=bits) for _ in range(copies)]
    layers, away = [integers.IntegerLinear(weight, None, round_inputs=True) for weight in sparse], copies // 2
    own, own_size = torchs(*rounded, copies, bits)
    runs = {"torch": lambda x, i: F.linear(x, plain[i % len(plain)]),
            **own, "dense": lambda x, i: integers.linear(x, dense[i]),
            "2:4": lambda x, i: integers.linear(x, sparse[i]),
            "layer": lambda x, i: layers[(i + away) % copies](x),
            "read": lambda x, i: bandwidth.read(dense[(i + away) % copies].values)}
    half = held(sparse[0][:2])
    size = {"torch": held(plain[:1]), "torch's": own_size, "dense": held(dense[0][:2]), "2:4": half, "layer": half,
            "read": held(dense[0][:1])}
    return runs, size, lambda x: codes.emulate(x, *rounded, None, integers.stays(len(x), x.dtype))


def torchs(rounded: torch.Tensor, scale: torch.Tensor, copies: int, bits: int) -> tuple[dict[str, Run], int]:
    """({method: f(x, which copy) -> y}, its bytes) of torch's product of bfloat16 inputs and codes; ({}, 0) where this
    torch has none, or none for this shape."""
    try:
        if bits == 8:
            weight, scales, product = rounded, scale.bfloat16(), torch._weight_int8pack_mm
        else:
            weight = torch._convert_weight_to_int4pack_for_cpu((rounded + 8).int(), 1)
            scales = torch.stack((scale.t(), torch.zeros_like(scale.t())), -1).bfloat16().contiguous()  # and zeros
            product = functools.partial(int4_by_torch, torch._weight_int4pack_mm_for_cpu)
        product(torch.ones(1, rounded.shape[1], dtype=torch.bfloat16), weight, scales)
    except (AttributeError, RuntimeError):
        return {}, 0
    every = [library.huge_pages(weight.clone()) for _ in range(copies)]
    return {"torch's": lambda x, i: product(x, every[i], scales)}, held((weight, scales))


def int4_by_torch(product: Callable, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """torch's int4 product with its arguments in the order of the int8 one."""
    return product(x, weight, codes.BLOCK, scales)


def held(tensors: Sequence[torch.Tensor | None]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def interleaved(runs: dict[str, Callable[[int], object]], rounds: int, copies: int) -> dict[str, float]:
    """{method: median microseconds of a call}; all methods in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = dict.fromkeys(runs, 0)
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in runs.items():
                passed(run, first[name], copies)  # touches what is then timed, see common.Memory
                seconds, calls = passed(run, first[name], copies)
                times[name].append(seconds / calls)
                first[name] = (first[name] + calls) % copies
    return {name: statistics.median(seconds) * 1e6 for name, seconds in times.items()}


def passed(run: Callable[[int], object], first: int, copies: int) -> tuple[float, int]:
    """Call it for each copy from `first` on, for TURN seconds at most; (seconds, calls)."""
    began, calls, seconds = time.perf_counter(), 0, 0.0
    while calls < copies and seconds < TURN:
        run((first + calls) % copies)
        calls, seconds = calls + 1, time.perf_counter() - began
    return seconds, calls


if __name__ == "__main__":
    sys.exit(main())
