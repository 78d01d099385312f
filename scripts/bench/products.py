"""Float32 products as plain torch multiplies them on this CPU, and as the commands here do (runtime/products.py).

    python scripts/bench/products.py                  # results/bench/products.csv; a minute
    python scripts/bench/products.py --toy --out DIR  # the same at toy size, for the tests

Each row is one product (M, K) · (K, N): those of SmolLM2's blocks and Gram matrices on 4096 tokens, a solver's and a
token's. Both ways take turns, the best of each is kept.

    plain_gflops, ours_gflops   operations a second
    plain_error, ours_error     ‖found - want‖ / ‖want‖, want in float64
    load                        what other processes took of the machine, in cores: on a busy machine only ratios count
"""

import argparse
import contextlib
import csv
import io
import sys
import time
from pathlib import Path

import torch
from common import others

from oneshot.runtime import environment, products
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

SHAPES = [(4096, 576, 576), (4096, 576, 1536), (4096, 1536, 576), (576, 4096, 576), (1536, 4096, 1536),
          (512, 576, 49152), (1536, 64, 512), (128, 128, 128), (1, 576, 1536)]
WAYS = {"plain": contextlib.nullcontext, "ours": products.float32}
HEAD = ["shape", *(f"{name}_gflops" for name in WAYS), "times_plain", *(f"{name}_error" for name in WAYS), "threads",
        "load", "device", "torch", "commit", "date"]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/bench/products.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=1.0, help="of each way at each shape")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="two small shapes, for the tests")
    args = p.parse_args(argv)
    return exit_code(lambda: work(args))


def work(args: argparse.Namespace) -> None:
    """Measure all, print each row when it is there, write the file at the end."""
    e, rows = environment.environment("cpu"), []
    for shape in [(16, 8, 4), (1, 8, 4)] if args.toy else SHAPES:
        before, found = others(), measured(shape, 0.01 if args.toy else args.seconds)
        rows.append(dict(zip(HEAD, ["x".join(map(str, shape)), *found, e["threads"], f"{max(before, others()):.1f}",
                                    e["device"], e["torch"], e["commit"] + (" (dirty)" if e["dirty"] else ""),
                                    e["date"]], strict=True)))
        print(f"{rows[-1]['shape']}: {found[0]} and {found[1]} GFLOP/s, {found[2]} times", file=sys.stderr)
    text = io.StringIO()
    out = csv.DictWriter(text, HEAD, lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    write_text(text.getvalue(), args.out / "products.csv")
    print(f"written: {args.out / 'products.csv'}")


def measured(shape: tuple[int, int, int], seconds: float) -> list[str]:
    """The row's rates, their ratio, and the errors."""
    M, K, N = shape
    a, b = torch.randn(M, K), torch.randn(N, K)
    want, best, errors = a.double() @ b.double().T, dict.fromkeys(WAYS, float("inf")), {}
    for name, way in WAYS.items():
        with way():
            errors[name] = ((a @ b.T).double() - want).norm().item() / want.norm().item()
    began = time.perf_counter()
    while time.perf_counter() - began < 2 * seconds:
        for name, way in WAYS.items():
            with way():
                start = time.perf_counter()
                a @ b.T
                best[name] = min(best[name], time.perf_counter() - start)
    rates = {name: 2 * M * K * N / least / 1e9 for name, least in best.items()}
    return [*(f"{rate:.1f}" for rate in rates.values()), f"{rates['ours'] / rates['plain']:.2f}",
            *(f"{error:.1e}" for error in errors.values())]


if __name__ == "__main__":
    sys.exit(main())
