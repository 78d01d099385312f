"""Measure the kernel and expanding on this CPU, and write the table that `dispatch` reads.

    python -m oneshot_kernels.cpu.tune --model DIR        the layers of a Hugging Face model, from DIR/config.json
    python -m oneshot_kernels.cpu.tune --shapes 2048x2048,11008x4096:swiglu --tokens 1,4,16,64 --dtype float32
    python -m oneshot_kernels.cpu.tune --model DIR --dtype int8    or int4: 2:4 and dense layers, inputs in bfloat16

The two take turns, on weights that change with every call (together larger than the caches); medians are kept, for the
number of threads that torch has.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .. import dispatch, ops, reference
from ..reference import random_24
from ..shapes import Shape, arguments, chosen
from . import codes, integers, layout, library, linear

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
COLD = 128 << 20
"""Bytes of all copies of a weight together: twice the last-level cache of most machines."""
Rows = dict[str, dict[str, dict]]  # {key of the table: its row}


def time_paths(shape: Shape, tokens: int, dtype: torch.dtype, rounds: int = 9, cold: int = COLD) -> Rows:
    """The row of a 2:4 weight, see `timed`."""
    generator = torch.Generator().manual_seed(0)
    weight = random_24(shape.rows, shape.k, dtype, generator)
    packed = reference.pack(weight)
    weights = copies_of(layout.to_tiles(packed, linear.lanes()), cold)
    x = torch.randn(tokens, shape.k, generator=generator).to(dtype)
    options = {"swiglu": shape.swiglu}
    runs = {path: lambda i, path=path: ops.run(dispatch.Choice(path, None, "tune", ""), x, *weights[i % len(weights)],
                                               shape.outputs, **options) for path in ("tiles", "expand")}
    device = torch.device("cpu")
    at = dispatch.Problem(tokens, shape.rows, shape.k, dtype, device, False, tiles=True, threads=library.threads(),
                          **options)
    return {at.key: timed(runs, reference.linear(x, packed, **options), rounds)}


def time_integers(shape: Shape, tokens: int, bits: int, rounds: int = 9, cold: int = COLD) -> Rows:
    """The rows of a 2:4 and of a dense weight with integers, for bfloat16 inputs that stay as they are."""
    generator, found = torch.Generator().manual_seed(0), {}
    weight, x = random_24(shape.rows, shape.k, torch.float32, generator), torch.randn(tokens, shape.k).bfloat16()
    rounded = codes.round_rows(weight) if bits == 8 else codes.round_groups(weight)
    for sparse in (True, False):
        first = integers.prepare(*rounded, sparse=sparse, bits=bits)
        weights = [first._replace(values=values, scale=scale) for values, scale in copies_of(first[:2], cold)]
        runs = {"kernel": lambda i, own=weights: integers.by_kernel(x, own[i % len(own)], plain=True),
                "expand": lambda i, own=weights: integers.through_dense(x, own[i % len(own)])}
        truth = codes.emulate(x, *rounded, None, plain=True)
        found[first.problem(tokens, x.dtype, plain=True).key] = timed(runs, truth, rounds)
    return found


def copies_of(tensors: Sequence[torch.Tensor], cold: int) -> list[tuple[torch.Tensor, ...]]:
    """A packed weight, and copies of it until all together have as many bytes as `cold`, 64 at most."""
    copies = max(1, min(64, cold // sum(t.nbytes for t in tensors)))
    return [tuple(tensors), *(tuple(t.clone() for t in tensors) for _ in range(copies - 1))]


def timed(runs: dict[str, Callable[[int], torch.Tensor]], truth: torch.Tensor, rounds: int) -> dict[str, dict]:
    """A row of the table: {path: {"us": median, "config": None}}. runs: {path: f(round)}. Raises RuntimeError for a
    path with wrong results."""
    times: dict[str, list[float]] = {path: [] for path in runs}
    for i in range(rounds + 1):
        for path, run in runs.items():
            began = time.perf_counter()
            y = run(i)
            if i:  # the first round warms up
                times[path].append(time.perf_counter() - began)
            elif not (error := reference.relative_error(y, truth)) <= 1e-2:
                raise RuntimeError(f"{path} is wrong: {tuple(y.shape)}, relative error {error:.3g}")
    return {path: {"us": statistics.median(seconds) * 1e6, "config": None} for path, seconds in times.items()}


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m oneshot_kernels.cpu.tune", description=__doc__.splitlines()[0])
    arguments(parser, TOKENS, ("bfloat16", "float16", "float32", "int8", "int4"))
    args = parser.parse_args(argv)
    whole = args.dtype.startswith("int")
    shapes, path = chosen(parser, args, fused=not whole), dispatch.table_path(torch.device("cpu"))
    if not (integers if whole else linear).available():
        parser.error(f"nothing to tune, there is one path: {library.why('integers' if whole else 'linear')}")
    for shape, tokens in itertools.product(shapes, map(int, args.tokens.split(","))):
        if whole:
            found = time_integers(shape, tokens, int(args.dtype.removeprefix("int")))
        else:
            found = time_paths(shape, tokens, getattr(torch, args.dtype))
        entries = {name: dict(rows) for name, rows in dispatch.load_table(path).items()}
        for key, row in found.items():
            entries.setdefault(key, {})[tokens] = row
            times = ", ".join(f"{name} {row[name]['us']:.1f}" for name in sorted(row, key=lambda name: row[name]["us"]))
            print(f"{key}, {tokens} tokens, us: {times}", flush=True)
        dispatch.save_table(path, entries, {"device": library.why("linear"), "torch": torch.__version__})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
