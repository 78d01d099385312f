"""Measure every path on this GPU once, and write the table that `dispatch` reads.

    python -m oneshot_kernels.gpu.tune --model DIR        the layers of a Hugging Face model, from DIR/config.json
    python -m oneshot_kernels.gpu.tune --shapes 6144x4096,28672x4096:swiglu --tokens 1,8,64,512

A shape is ROWSxK; `:swiglu` means gate and up stacked, followed by the activation.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from .. import dispatch, ops, reference
from ..shapes import Shape, arguments, chosen
from . import decode, expand, prefill, timing
from .fragment import to_fragments
from .selftest import random_24, relative_error

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
LIMIT = 1e-2
"""Largest accepted relative error of a candidate, compared with float64; for unfused bfloat16 SwiGLU it is 4e-3."""


def decode_candidates(tokens: int) -> list[decode.Config]:
    """Launch parameters worth timing for the decode kernel. x is staged in shared memory only for one token tile."""
    row_tiles = (1, 2) if tokens <= 32 else (1, 2, 4)
    direct = (True, False) if tokens <= decode.TOKEN_TILE else (True,)
    return [decode.Config(*c) for c in itertools.product(row_tiles, (4, 8, 16), (2, 3, 4), direct)]


def middle_candidates(tokens: int) -> list[expand.Config]:
    """Launch parameters worth timing for the middle kernel; [] outside its useful range of tokens."""
    if not 16 <= tokens <= 1024:
        return []
    tile = max(16, min(128, triton.next_power_of_2(tokens)))
    tiles = sorted({tile, max(16, tile // 2)})
    out = []
    for rows, columns_of_x, columns, split in itertools.product((64, 128), tiles, (64, 128), (1, 2, 4)):
        warps = 8 if rows * columns_of_x >= 128 * 128 else 4
        out.append(expand.Config(rows, columns_of_x, columns, split, warps, stages=3))
    return out


Timer = Callable[[Sequence[Callable[[], object]]], float]


def time_candidates(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    copies: int,
    configs: dict[str, list] | None = None,
) -> list[dict]:
    """Time every path and candidate of one layer for one number of tokens -> [{path, config, us, error}].

    timer: gives the µs per call of a list of calls. copies: number of distinct weights to use in turn (see timing.py).
    configs: {path: its candidates} to replace the default ones. A candidate that does not fit the device is left out.

    Raises RuntimeError for a candidate with wrong results.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    weight = random_24(shape.rows, shape.k, dtype, generator)
    packed = reference.pack(weight)
    x = torch.randn(tokens, shape.k, generator=generator, device=device).to(dtype)
    truth = reference.linear(x, packed, swiglu=shape.swiglu)
    fragments = [to_fragments(packed, 2 if shape.swiglu else 1)]
    fragments += [tuple(t.clone() for t in fragments[0]) for _ in range(copies - 1)]
    has_copy = prefill.sparselt_refuses(shape.rows, shape.k, dtype, device) is None
    blobs = [prefill.compress(weight) for _ in range(copies)] if has_copy else [None] * copies

    problem = ops.make_problem(x, fragments[0][0], shape.outputs, shape.swiglu, blobs[0])
    rows = []
    for path, config in _candidates(problem, x, blobs[0], shape, configs or {}):
        choice = dispatch.Choice(path, config, "tune", "")
        calls = [
            functools.partial(ops.run, choice, x, *f, shape.outputs, swiglu=shape.swiglu, prefill_copy=blob)
            for f, blob in zip(fragments, blobs, strict=True)
        ]
        poison(tokens, shape.outputs, dtype, device)
        try:
            error = relative_error(calls[0](), truth)
        except triton.runtime.errors.OutOfResources:
            continue
        if not error <= LIMIT:
            raise RuntimeError(f"{path} {config} is wrong at {shape}, {tokens} tokens: relative error {error:.3g}")
        plain = asdict(config) if isinstance(config, decode.Config | expand.Config) else config
        rows.append({"path": path, "config": plain, "us": timer(calls), "error": error})
    return rows


def fastest(rows: list[dict]) -> dict:
    """A row of the table, the fastest candidate of each path: {path: {"us", "config"}}."""
    best = {}
    for row in rows:
        if row["path"] not in best or row["us"] < best[row["path"]]["us"]:
            best[row["path"]] = {"us": row["us"], "config": row["config"]}
    return best


def poison(m: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaNs where torch's allocator will most likely put the next (m, n) output, to reveal unwritten elements."""
    torch.full((m, n), torch.nan, dtype=dtype, device=device)


def _candidates(problem: dispatch.Problem, x: torch.Tensor, blob: torch.Tensor | None, shape: Shape,
                configs: dict[str, list]) -> Iterator[tuple[str, object]]:
    """(path, Config or algorithm or None) of everything to time."""
    usable = {name for name, reason in dispatch.refusals(problem).items() if reason is None}
    for path, everything in (("decode", decode_candidates), ("middle", middle_candidates)):
        if path in usable:
            yield from ((path, config) for config in configs.get(path) or everything(problem.tokens))
    if "sparselt" in usable:
        yield "sparselt", prefill.best_algorithm(x, blob, shape.rows)
    yield "scratch", None


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m oneshot_kernels.gpu.tune", description=__doc__.splitlines()[0])
    arguments(parser, TOKENS, ("bfloat16", "float16"))
    args = parser.parse_args(argv)
    shapes = chosen(parser, args)
    if not torch.cuda.is_available():
        parser.error("tuning needs a GPU; for a CPU: python -m oneshot_kernels.cpu.tune")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, args.dtype)
    path = dispatch.table_path(device)
    for shape, tokens in itertools.product(shapes, map(int, args.tokens.split(","))):
        copies = timing.copies_needed(shape.rows * shape.k * 9 // 8, device)
        row = fastest(time_candidates(shape, tokens, dtype, device, timing.graph_microseconds, copies))
        add_to_table(path, shape, dtype, device, tokens, row)
        times = ", ".join(f"{name} {row[name]['us']:.1f}" for name in sorted(row, key=lambda name: row[name]["us"]))
        print(
            f"{shape.rows}x{shape.k}{' swiglu' if shape.swiglu else ''}, {tokens} tokens, us: {times}",
            flush=True,
        )
    print(f"wrote {path}")


def add_to_table(path: Path, shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int, row: dict) -> None:
    """Add one measured row to the device's table in `path`, keeping the other rows."""
    entries = {key: dict(rows) for key, rows in dispatch.load_table(path).items()}
    key = dispatch.Problem(tokens, shape.rows, shape.k, dtype, device, swiglu=shape.swiglu).key
    entries.setdefault(key, {})[tokens] = row
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about = {"device": name, "torch": torch.__version__, "triton": triton.__version__}
    dispatch.save_table(path, entries, about)


if __name__ == "__main__":
    main()
