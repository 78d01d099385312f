"""Pruning time and memory: this program against the published way, side by side, block by block, in one run.

    python scripts/bench/prune.py                    # results/bench/prune.json and .md: about ten minutes on two cores
    python scripts/bench/prune.py --toy --out DIR    # the same at toy size, for the tests
    python scripts/bench/prune.py --page             # only the page, from the JSON

A random Llama (hidden 2048, intermediate 5504, 4 blocks), 32 windows of 512 random tokens, on the CPU. Both sides prune
copies of the same block on the same inputs, one after the other, so a noisy machine hurts both. The published way is in
published.py.

    forward      two passes of the samples through the block
    statistics   Gram matrices, or Wanda's norms; and for ours the sampled inputs on which errors are measured
    factor       SparseGPT's factorisations of the Gram matrix
    columns      masks, column loop, compensation
    other        what is left of the wall time: here, measuring every linear's error, checking the stored pattern
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import published
import torch
from common import caller, matmul_rate, removed, written
from transformers import LlamaConfig, LlamaForCausalLM

from oneshot import calibrate, models
from oneshot.calibrate import Activations, Statistics
from oneshot.prune import linalg, loop, patterns, solvers
from oneshot.prune.solvers import sparsegpt
from oneshot.report import table
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text

PARTS = published.PARTS
RUNS = (("sparsegpt", "0.5"), ("sparsegpt", "2:4"), ("wanda", "0.5"))
SUMS = {"statistics + solving": ("statistics", "factor", "columns"),
        "all but forward": tuple(part for part in PARTS if part != "forward"), "total": PARTS}


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(parse_args(argv)))


def work(args: argparse.Namespace) -> None:
    """Measure, unless only the page is wanted; write both files and print the page."""
    file = args.out / "prune.json"
    if not args.page:
        write_json(measure(args), file)
    page = markdown(json.loads(file.read_text()))
    write_text(page, args.out / "prune.md")
    print(page, end="")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/prune.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--intermediate", type=int, default=5504)
    p.add_argument("--blocks", type=int, default=4)
    p.add_argument("--windows", type=int, default=32)
    p.add_argument("--seqlen", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=4, help="ours; the published way runs one window at a time")
    p.add_argument("--repeats", type=int, default=3, help="of the column loop alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--page", action="store_true", help="measure nothing: the page of the JSON in --out")
    p.add_argument("--toy", action="store_true", help="hidden 64, 1 block, 4 windows of 16")
    args = p.parse_args(argv)
    if args.toy:
        args.hidden, args.intermediate, args.blocks, args.windows, args.seqlen, args.repeats = 64, 176, 1, 4, 16, 1
    return args


def measure(args: argparse.Namespace) -> dict:
    """All numbers, as the JSON holds them."""
    torch.manual_seed(args.seed)
    heads = max(1, args.hidden // 64)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.blocks,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=1024,
        max_position_embeddings=args.seqlen)).eval().requires_grad_(False)
    ids = torch.randint(0, 1024, (args.windows, args.seqlen))
    h, i = args.hidden, args.intermediate
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "toy", "page")}
    return {"settings": settings, "environment": environment.environment("cpu"),
            "matmul_flops_per_s": matmul_rate(args.hidden),
            "runs": {f"{method} {text}": compare(model, ids, method, text, args) for method, text in RUNS},
            "columns_alone": [columns_alone(R, C, text, args.repeats) for R, C in ((h, h), (i, h), (h, i))
                              for text in ("0.5", "2:4")]}


# ------------------------------------------------------------------ whole blocks

@torch.no_grad()
def compare(model: LlamaForCausalLM, ids: torch.Tensor, method: str, text: str, args: argparse.Namespace) -> dict:
    """Seconds by part and peak memory of both ways over all blocks, and the floor in operations."""
    pattern, chain = patterns.parse(text), [(m, m.Config()) for m in solvers.chain(method)]
    job = loop.Job(loop.make_plan(model, pattern, chain), chain, loop.Options(device="cpu", progress=False))
    activations = calibrate.capture(model, ids, batch_size=args.batch_size)
    single = calibrate.capture(model, ids, batch_size=1)
    theirs, ours = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    memory = {"published": 0, "oneshot": 0}
    for block in models.walk(model):
        module = copy.deepcopy(block.module)
        with peak_memory(memory, "published"):
            single.hidden = published.prune_block(module, list(single.hidden), caller(single, block.number), method,
                                                  removed(pattern), theirs)
        mine = copy_of(block)
        with peak_memory(memory, "oneshot"):
            ours_block(mine, activations, job, ours)
        del module, mine
    return {"published": theirs, "oneshot": ours, "peak_above_model_bytes": memory,
            "allowed_bytes": allowed(args, method), "floor_flops": floor(args, method)}


def copy_of(block: models.Block) -> models.Block:
    """The same block with weights of its own."""
    module = copy.deepcopy(block.module)
    weights, skipped = models.weights_of(module, block.name)
    return dataclasses.replace(block, module=module, weights=weights, skipped=skipped)


def ours_block(block: models.Block, activations: Activations, job: loop.Job, seconds: dict[str, float]) -> None:
    """One block through this program's own loop, with its parts timed."""
    spent = dict.fromkeys(("statistics", "factor", "solver"), 0.0)
    began = time.perf_counter()
    with timing(Statistics, "update", spent, "statistics"), timing(sparsegpt, "upper_factor", spent, "factor"), \
            timing(solvers, "solve", spent, "solver"):
        rows = loop.prune_block(job, block, activations)
    whole, of = time.perf_counter() - began, rows.block["seconds"]
    parts = {"forward": of["collect"] + of["replay"] - spent["statistics"], "statistics": spent["statistics"],
             "factor": spent["factor"], "columns": spent["solver"] - spent["factor"]}
    parts["other"] = whole - sum(parts.values())
    for key, value in parts.items():
        seconds[key] += value


@contextlib.contextmanager
def timing(owner, name: str, spent: dict[str, float], key: str) -> Iterator[None]:
    """Count the wall time inside owner.name."""
    real = getattr(owner, name)

    def timed(*args, **kwargs):
        began = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            spent[key] += time.perf_counter() - began
    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, real)


@contextlib.contextmanager
def peak_memory(memory: dict[str, int], who: str) -> Iterator[None]:
    """Peak resident bytes inside, above what was resident before; the largest so far."""
    gc.collect()
    environment.reset_peak_memory("cpu")
    before = environment.peak_memory("cpu")
    yield
    memory[who] = max(memory[who], environment.peak_memory("cpu") - before)


def allowed(args: argparse.Namespace, method: str) -> int:
    """The memory promised: activations in and out with one batch inside the block, the Grams gathered at once, three
    matrices of the widest C x C and three of the widest weight (bytes)."""
    h, i, tokens = args.hidden, args.intermediate, args.windows * args.seqlen
    inside = args.batch_size * args.seqlen * (10 * h + 5 * i)
    grams, squares = (3 * h * h + i * i, 3 * i * i) if method == "sparsegpt" else (0, 0)
    return 4 * (2 * tokens * h + inside + grams + squares + 3 * h * i)


def floor(args: argparse.Namespace, method: str) -> dict[str, float]:
    """Operations that the work needs at least, over all blocks: by part."""
    h, i, tokens = args.hidden, args.intermediate, args.windows * args.seqlen
    weights = 4 * h * h + 3 * h * i
    flops = {"forward": 2 * (2 * tokens * weights + 2 * args.windows * 2 * args.seqlen**2 * h)}
    if method == "sparsegpt":  # one symmetric Gram per distinct input; R·C² for every linear's compensation
        flops["statistics"] = tokens * (3 * h * h + i * i)
        flops["factor"] = (3 * h**3 + i**3) / 3
        flops["columns"] = 4 * h * h * h + 2 * i * h * h + h * i * i
    else:
        flops["statistics"] = 2 * tokens * (3 * h + i)
    return {k: v * args.blocks for k, v in flops.items()}


# ------------------------------------------------------------------ the column loop alone

def columns_alone(R: int, C: int, text: str, repeats: int) -> dict:
    """Median seconds of masks, column loop and compensation of one linear, both ways in turn, the factor given."""
    pattern = patterns.parse(text)
    X = torch.randn(C + 64, C) @ (torch.randn(C, C) / C**0.5)
    W = torch.randn(R, C)
    inputs = Statistics(C, {"outer"})
    inputs.update(X)
    V, _, _ = linalg.upper_factor(inputs, 0.01, torch.float32)
    U = torch.linalg.solve_triangular(V, torch.eye(C), upper=True)
    theirs, ours = [], []
    for _ in range(repeats):
        copy_of_W = W.clone()
        began = time.perf_counter()
        published.prune_columns(copy_of_W, U, *removed(pattern), 128)
        theirs.append(time.perf_counter() - began)
        began = time.perf_counter()
        sparsegpt.prune(W, inputs, pattern, sparsegpt.Config())
        ours.append(time.perf_counter() - began)
    a, b = statistics.median(theirs), statistics.median(ours)
    return {"shape": [R, C], "pattern": text, "published_s": a, "oneshot_s": b, "ratio": a / b,
            "floor_flops": R * C * C}


# ------------------------------------------------------------------ the page

def markdown(out: dict) -> str:
    """The results as a page."""
    s, rate = out["settings"], out["matmul_flops_per_s"]
    lines = ["# Pruning: this program against the published way", "", written("prune.py", out["environment"]), "",
             f"Random Llama, hidden {s['hidden']}, intermediate {s['intermediate']}, {s['blocks']} blocks; "
             f"{s['windows']} windows of {s['seqlen']}; float32; seed {s['seed']}. Float32 product of {s['hidden']}: "
             f"{rate / 1e9:.0f} GFLOP/s. Floor: operations over that rate.", ""]
    for name, run in out["runs"].items():
        lines += [f"## {name}", "", *run_section(run, rate)]
    head = ["shape", "pattern", "published", "oneshot", "ratio", "floor"]
    body = [["{} x {}".format(*c["shape"]), c["pattern"], f"{c['published_s']:.2f}", f"{c['oneshot_s']:.2f}",
             f"{c['ratio']:.2f}", f"{c['floor_flops'] / rate:.2f}"] for c in out["columns_alone"]]
    return "\n".join([*lines, "## The column loop alone", "",
                      "Median seconds of one linear; masks, loop and compensation, the factor given.", "",
                      table.render(head, body, "markdown", text={"shape", "pattern"})])


def run_section(run: dict, rate: float) -> list[str]:
    """The table of one method and pattern, and a line on memory."""
    a, b = run["published"], run["oneshot"]
    floors = {**dict.fromkeys(PARTS, 0.0), **run["floor_flops"]}
    body = []
    for part in (*PARTS, *SUMS):
        x, y, least = (total(t, part) for t in (a, b, floors))
        body.append([part, f"{x:.2f}", f"{y:.2f}", f"{x / y if y > 0.005 else math.nan:.2f}", f"{least / rate:.2f}"])
    rest, memory = total(b, "all but forward") / b["forward"], run["peak_above_model_bytes"]
    return [table.render(["seconds", "published", "oneshot", "ratio", "floor"], body, "markdown", text={"seconds"}),
            f"Beside the two forwards, oneshot spends {rest:.1%} of their time. Peak memory above model and "
            f"inputs: published {memory['published'] / 2**20:.0f} MiB, oneshot {memory['oneshot'] / 2**20:.0f} MiB "
            f"(promised at most {run['allowed_bytes'] / 2**20:.0f} MiB).", ""]


def total(seconds: dict[str, float], part: str) -> float:
    """One part, or a sum of several."""
    return sum(seconds[p] for p in SUMS.get(part, (part,)))


if __name__ == "__main__":
    sys.exit(main())
