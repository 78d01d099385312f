"""Pruning time and memory: this program against the published way, side by side, block by block, in one run.

    python scripts/bench_prune.py                    # results/bench_prune.json and .md: about ten minutes on two cores
    python scripts/bench_prune.py --toy              # the same at toy size, for the tests

A random Llama (hidden 2048, intermediate 5504, 4 blocks), 32 windows of 512 random tokens. Both sides prune copies of
the same block on the same inputs, one after the other, so a noisy machine hurts both. The published way stands in
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
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import published
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oneshot import calibrate, models, report
from oneshot.prune import linalg, loop, patterns, solvers
from oneshot.runtime import environment
from oneshot.calibrate.statistics import Statistics
from oneshot.prune.solvers import sparsegpt

PARTS = published.PARTS


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.blocks,
        num_attention_heads=max(1, args.hidden // 64), num_key_value_heads=max(1, args.hidden // 64), vocab_size=1024,
        max_position_embeddings=args.seqlen)).eval().requires_grad_(False)
    ids = torch.randint(0, 1024, (args.windows, args.seqlen))
    peak = matmul_rate(args.hidden)
    out = {"settings": {k: v for k, v in vars(args).items() if k not in ("out", "toy")},
           "environment": environment.environment("cpu"), "matmul_flops_per_s": peak, "runs": {}}
    for method, pattern in (("sparsegpt", "0.5"), ("sparsegpt", "2:4"), ("wanda", "0.5")):
        out["runs"][f"{method} {pattern}"] = compare(model, ids, method, pattern, args)
    out["columns_alone"] = [columns_alone(R, C, p, args) for R, C in shapes(args) for p in ("0.5", "2:4")]
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(out, indent=1) + "\n", args.out / "bench_prune.json")
    text = markdown(out)
    report.write_text(text, args.out / "bench_prune.md")
    print(text)


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--intermediate", type=int, default=5504)
    p.add_argument("--blocks", type=int, default=4)
    p.add_argument("--windows", type=int, default=32)
    p.add_argument("--seqlen", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=4, help="ours; the published way runs one window at a time")
    p.add_argument("--repeats", type=int, default=3, help="of the column loop alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--toy", action="store_true", help="hidden 64, 1 block, 4 windows of 16")
    args = p.parse_args(argv)
    if args.toy:
        args.hidden, args.intermediate, args.blocks, args.windows, args.seqlen, args.repeats = 64, 176, 1, 4, 16, 1
    return args


def shapes(args):
    """(R, C) of the block's linears."""
    h, i = args.hidden, args.intermediate
    return [(h, h), (i, h), (h, i)]


def matmul_rate(n):
    """Floating-point operations a second of the best of five large float32 products: the ceiling of everything here."""
    a, b = torch.randn(4 * n, n), torch.randn(n, n)
    a @ b
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 8 * n**3 / min(times)


# ------------------------------------------------------------------ whole blocks

def compare(model, ids, method, text, args):
    """Seconds by part and peak memory of both ways over all blocks, and the floor in operations."""
    pattern = patterns.parse(text)
    steps = [(m, m.Config()) for m in solvers.chain(method)]
    _, block_list = models.blocks(model)
    activations = calibrate.capture(model, ids, batch_size=args.batch_size)
    single = calibrate.capture(model, ids, batch_size=1)
    theirs, ours = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    memory = {"published": 0, "oneshot": 0}
    for b, dense in enumerate(block_list):
        block = copy.deepcopy(dense)
        with peak_memory(memory, "published"):
            single.hidden = published.prune_block(
                block, single.hidden, caller(single, b), method, pattern.sparsity,
                *((pattern.m - pattern.n, pattern.m) if isinstance(pattern, patterns.NM) else ()), seconds=theirs)
        block = copy.deepcopy(dense)
        with peak_memory(memory, "oneshot"):
            ours_block(block, activations, b, pattern, steps, ours)
        del block
    return {"published": theirs, "oneshot": ours, "peak_above_model_bytes": memory,
            "allowed_bytes": allowed(args, method), "floor_flops": floor(args, method)}


def caller(activations, b):
    """The published loop's call(block, x), with the captured arguments of block b (equal for all windows)."""
    def call(block, x):
        args, kwargs = calibrate.tree_map(lambda t: x if t is calibrate.HIDDEN else t, activations.calls[b][0])
        out = block(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out
    return call


def ours_block(block, activations, b, pattern, steps, seconds):
    """One block through this program's own loop, with its parts timed."""
    weights, _ = models.linears(block)
    plan = {v.name: pattern.with_default_group(steps[0][1].group) for v in weights}
    needs = steps[0][0].needs | {"sample"}
    rows = {"layers": [], "block": {"block": b, "seconds": {}}, "warnings": []}
    spent = dict.fromkeys(("statistics", "factor", "solver"), 0.0)
    began = time.perf_counter()
    with timing(Statistics, "update", spent, "statistics"), timing(sparsegpt, "upper_factor", spent, "factor"), \
            timing(solvers, "solve", spent, "solver"):
        loop.prune_block(block, activations, b, weights, "", plan, steps, needs, loop.Options(progress=False), rows)
    whole, of = time.perf_counter() - began, rows["block"]["seconds"]
    parts = {"forward": of["collect"] + of["replay"] - spent["statistics"], "statistics": spent["statistics"],
             "factor": spent["factor"], "columns": spent["solver"] - spent["factor"]}
    parts["other"] = whole - sum(parts.values())
    for key, value in parts.items():
        seconds[key] += value


@contextlib.contextmanager
def timing(owner, name, spent, key):
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
def peak_memory(memory, who):
    """Peak resident bytes inside, above what was resident before; the largest so far."""
    gc.collect()
    environment.reset_peak_memory("cpu")
    before = environment.peak_memory("cpu")
    yield
    memory[who] = max(memory[who], environment.peak_memory("cpu") - before)


def allowed(args, method):
    """The memory promised: activations in and out with one batch inside the block, the Grams gathered at once, three
    matrices of the widest C x C and three of the widest weight (bytes)."""
    h, i, tokens = args.hidden, args.intermediate, args.windows * args.seqlen
    inside = args.batch_size * args.seqlen * (10 * h + 5 * i)
    grams, squares = (3 * h * h + i * i, 3 * i * i) if method == "sparsegpt" else (0, 0)
    return 4 * (2 * tokens * h + inside + grams + squares + 3 * h * i)


def floor(args, method):
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

def columns_alone(R, C, text, args):
    """Median seconds of masks, column loop and compensation of one linear, both ways in turn, the factor given."""
    pattern = patterns.parse(text)
    X = torch.randn(C + 64, C) @ (torch.randn(C, C) / C**0.5)
    W = torch.randn(R, C)
    statistics = Statistics(C, {"outer"})
    statistics.update(X)
    V, _, _ = linalg.upper_factor(statistics, 0.01, torch.float32)
    U = torch.linalg.solve_triangular(V, torch.eye(C), upper=True)
    removed = (pattern.m - pattern.n, pattern.m) if isinstance(pattern, patterns.NM) else (0, 0)
    theirs, ours = [], []
    for _ in range(args.repeats):
        copy_of_W = W.clone()
        began = time.perf_counter()
        published.prune_columns(copy_of_W, U, pattern.sparsity, *removed, 128)
        theirs.append(time.perf_counter() - began)
        began = time.perf_counter()
        sparsegpt.prune(W, statistics, pattern, sparsegpt.Config())
        ours.append(time.perf_counter() - began)
    a, b = statistics.median(theirs), statistics.median(ours)
    return {"shape": [R, C], "pattern": text, "published_s": a, "oneshot_s": b, "ratio": a / b,
            "floor_flops": R * C * C}


# ------------------------------------------------------------------ the page

def markdown(out):
    """The results as a page."""
    s, e = out["settings"], out["environment"]
    lines = ["# Pruning: this program against the published way", "",
             f"Written by `scripts/bench_prune.py`; commit {e['commit']}{' (dirty)' if e['dirty'] else ''}, "
             f"{e['device']}, {e['threads']} threads, torch {e['torch']}, {e['date']}.", "",
             f"Random Llama, hidden {s['hidden']}, intermediate {s['intermediate']}, {s['blocks']} blocks; "
             f"{s['windows']} windows of {s['seqlen']}; float32; seed {s['seed']}. Float32 product of {s['hidden']}: "
             f"{out['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s. Floor: operations over that rate.", ""]
    for name, run in out["runs"].items():
        lines += [f"## {name}", "", "| seconds | published | oneshot | ratio | floor |", "|---|---|---|---|---|"]
        a, b = run["published"], run["oneshot"]
        for part in (*PARTS, "statistics + solving", "all but forward", "total"):
            x, y = (total(t, part) for t in (a, b))
            f = total({**dict.fromkeys(PARTS, 0.0), **run["floor_flops"]}, part) / out["matmul_flops_per_s"]
            lines.append(f"| {part} | {x:.2f} | {y:.2f} | {x / y if y > 0.005 else float('nan'):.2f} | {f:.2f} |")
        rest = total(b, "all but forward") / b["forward"]
        m = run["peak_above_model_bytes"]
        lines += ["", f"Beside the two forwards, oneshot spends {rest:.1%} of their time. Peak memory above model and "
                  f"inputs: published {m['published'] / 2**20:.0f} MiB, oneshot {m['oneshot'] / 2**20:.0f} MiB "
                  f"(promised at most {run['allowed_bytes'] / 2**20:.0f} MiB).", ""]
    lines += ["## The column loop alone", "",
              "Median seconds of one linear; masks, loop and compensation, the factor given.", "",
              "| shape | pattern | published | oneshot | ratio | floor |", "|---|---|---|---|---|---|"]
    for c in out["columns_alone"]:
        lines.append(f"| {c['shape'][0]} x {c['shape'][1]} | {c['pattern']} | {c['published_s']:.2f} | "
                     f"{c['oneshot_s']:.2f} | {c['ratio']:.2f} | {c['floor_flops'] / out['matmul_flops_per_s']:.2f} |")
    return "\n".join(lines) + "\n"


def total(t, part):
    groups = {"statistics + solving": ("statistics", "factor", "columns"), "total": PARTS,
              "all but forward": [p for p in PARTS if p != "forward"]}
    return sum(t[p] for p in groups.get(part, (part,)))


if __name__ == "__main__":
    sys.exit(main())
