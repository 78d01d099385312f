"""Measure the kernel and expanding on this CPU, and write the table that `dispatch` reads.

    python -m oneshot_kernels.cpu.tune --model DIR        the layers of a Hugging Face model, from DIR/config.json
    python -m oneshot_kernels.cpu.tune --shapes 2048x2048,11008x4096:swiglu --tokens 1,4,16,64 --dtype float32

The two take turns, on weights that change with every call (together larger than the caches); medians are kept, for the
number of threads that torch has.
"""

import argparse
import itertools
import statistics
import time

import torch

from .. import dispatch, ops, reference
from ..reference import random_24
from ..shapes import Shape, arguments, chosen
from . import layout, library, linear

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
COLD = 128 << 20
"""Bytes of all copies of a weight together: twice the last-level cache of most machines."""
PATHS = ("tiles", "expand")


def time_paths(shape: Shape, tokens: int, dtype: torch.dtype, rounds: int = 9, cold: int = COLD) -> dict[str, dict]:
    """A row of the table: {path: {"us": median, "config": None}}. Raises RuntimeError for a path with wrong results."""
    generator = torch.Generator().manual_seed(0)
    weight = random_24(shape.rows, shape.k, dtype, generator)
    packed = reference.pack(weight)
    first = layout.to_tiles(packed, linear.lanes())
    copies = max(1, min(64, cold // (weight.numel() * weight.element_size() * 9 // 16)))
    weights = [first, *((first[0].clone(), first[1].clone()) for _ in range(copies - 1))]
    x = torch.randn(tokens, shape.k, generator=generator).to(dtype)
    truth = reference.linear(x, packed, swiglu=shape.swiglu)
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    for i in range(rounds + 1):
        for path in PATHS:
            began = time.perf_counter()
            y = ops.run(dispatch.Choice(path, None, "tune", ""), x, *weights[i % copies], shape.outputs,
                        swiglu=shape.swiglu)
            if i:  # the first round warms up
                times[path].append(time.perf_counter() - began)
            elif not (error := reference.relative_error(y, truth)) <= 1e-2:
                raise RuntimeError(f"{path} is wrong at {shape}, {tokens} tokens: relative error {error:.3g}")
    return {path: {"us": statistics.median(seconds) * 1e6, "config": None} for path, seconds in times.items()}


def key(shape: Shape, tokens: int, dtype: torch.dtype) -> str:
    """The row's place in the table."""
    device = torch.device("cpu")
    return dispatch.Problem(tokens, shape.rows, shape.k, dtype, device, False, swiglu=shape.swiglu, tiles=True,
                            threads=library.threads()).key


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m oneshot_kernels.cpu.tune", description=__doc__.splitlines()[0])
    arguments(parser, TOKENS, ("bfloat16", "float16", "float32"))
    args = parser.parse_args(argv)
    shapes, dtype, path = chosen(parser, args), getattr(torch, args.dtype), dispatch.table_path(torch.device("cpu"))
    if not linear.available():
        parser.error(f"nothing to tune, there is one path: {library.why('linear')}")
    for shape, tokens in itertools.product(shapes, map(int, args.tokens.split(","))):
        row = time_paths(shape, tokens, dtype)
        entries = {name: dict(rows) for name, rows in dispatch.load_table(path).items()}
        entries.setdefault(key(shape, tokens, dtype), {})[tokens] = row
        dispatch.save_table(path, entries, {"device": library.why("linear"), "torch": torch.__version__})
        times = ", ".join(f"{name} {row[name]['us']:.1f}" for name in sorted(row, key=lambda name: row[name]["us"]))
        print(f"{key(shape, tokens, dtype)}, {tokens} tokens, us: {times}", flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
