"""What each ingredient gains over SparseGPT and costs, `--method best` above all: results/best/MODEL.json, best.md,
best.svg.

    python scripts/best.py --shared ../shared                    # all; continues where it was stopped
    python scripts/best.py --shared ../shared --only stories260k --seeds 0
    python scripts/best.py --table                               # best.md and best.svg from the JSON
    python scripts/tables.py                                     # the README's table from the JSON

    excess   log ppl pruned - log ppl dense, on held-out text
    share    of the excess of SparseGPT (this program's, same calibration) that a way removes
    cost     processor time of pruning, in multiples of SparseGPT done the published way (published.py) on the same
             machine in the same run; evaluation is not counted. With one thread, as here, it is the wall time of a
             machine that has nothing else to do; the wall seconds stand in the JSON beside it

Every number is for one model, pattern and calibration seed; the table has means and sample standard deviations.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import _best_table
import published
import small_models
import torch
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from oneshot import calibrate, measure, models, report
from oneshot.data import choose
from oneshot.pipeline import run
from oneshot.prune import patterns
from oneshot.runtime import environment
from oneshot.settings import flags, presets

MODELS = ("stories260k", "craftgpt-5m", "demo-wikitext2")
MAIN = {"sparsegpt": {"method": "sparsegpt"}, "alps": {"method": "alps"},
        **{f"best-{k}": {"method": "best", "effort": k} for k in (3, 5, 1, 2, 4)}}  # those with a target first
BATCH = {"craftgpt-5m": "16"}  # its windows are single dialogues of some 30 tokens
DISTIL = {"recover": "distil", "distil.steps": 60}
INGREDIENTS = {  # at 2:4 and 0.7
    **{method: {"method": method} for method in (
        "wanda", "wanda+refit", "wanda+swaps", "wanda+swaps+refit", "sparsegpt+refit", "sparsegpt+swaps",
        "sparsegpt+swaps+refit", "admm", "alps+swaps")},
    "sparsegpt, dense target": {"method": "sparsegpt", "dense_target": 0.5},
    "alps, dense target": {"method": "alps", "dense_target": 0.5},
    "alps, dense target, true-sequential": {"method": "alps", "dense_target": 0.5, "true_sequential": True},
    "wanda, block": {"method": "wanda", "recover": "block", "block.steps": 60},
    "sparsegpt, block": {"method": "sparsegpt", "recover": "block", "block.steps": 60},
    "alps, block": {"method": "alps", "recover": "block", "block.steps": 60},
    "wanda, distil": {"method": "wanda", **DISTIL}, "sparsegpt, distil": {"method": "sparsegpt", **DISTIL},
    "alps, distil": {"method": "alps", **DISTIL},
    "alps, dense target, distil": {"method": "alps", "dense_target": 0.5, **DISTIL},
    "alps, block, distil": {"method": "alps", **DISTIL, "recover": "block,distil", "block.steps": 60},
    "sparsegpt, owl": {"method": "sparsegpt", "allocate": "owl"},
    "alps, owl, distil": {"method": "alps", "allocate": "owl", **DISTIL},
}

ORDER = [*dict.fromkeys([*(w for w in MAIN if "best" not in w), *sorted(MAIN), *INGREDIENTS])]  # of the table


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")
    p.add_argument("--out", type=Path, default=Path("results/best"))
    p.add_argument("--only", default=",".join(MODELS), help="models, separated by commas")
    p.add_argument("--patterns", default=",".join(_best_table.PATTERNS))
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--ways", default="main", help="main, ingredients, or names separated by semicolons")
    p.add_argument("--eval-windows", type=int, default=200)
    p.add_argument("--flags", default="", help="more flags for every run, separated by spaces (for a quick look)")
    p.add_argument("--threads", type=int, default=1, help="see cost above")
    p.add_argument("--table", action="store_true", help="only write best.md and its picture")
    args = p.parse_args(argv)
    if not args.table:
        measure_all(args)
    _best_table.write(args.out, recipes())


def measure_all(args):
    """Run what is missing; every row is stored as soon as it is there."""
    models.quiet()
    torch.set_num_threads(args.threads)
    every = small_models.flags(args.shared)
    for name in args.only.split(","):
        for seed in args.seeds.split(","):
            flags = [*without(every[name], "--pattern"), "--batch-size", BATCH.get(name, "8"), "--seed", seed,
                     "--eval-windows", str(args.eval_windows), "--no-progress", *args.flags.split()]
            with_pattern = [text for text in args.patterns.split(",") if missing(args, name, seed, text)]
            for text in tqdm(with_pattern, desc=f"{name} seed {seed}", unit="pattern"):
                cell(args, name, int(seed), text, flags)


def without(flags, name):
    i = flags.index(name)
    return flags[:i] + flags[i + 2:]


def ways_of(args, text):
    """{name: flags} of what is wanted at a pattern."""
    if args.ways == "main":
        return MAIN
    if args.ways == "ingredients":
        return {way: flags for way, flags in INGREDIENTS.items() if text == "0.7" or (
            text == "2:4" and "allocate" not in flags)}  # an N:M leaves nothing to allocate
    every = MAIN | INGREDIENTS
    return {way: every[way] for way in args.ways.split(";")}


def missing(args, name, seed, text):
    """The ways without a row yet, or whose row is of another recipe (a preset that was changed since) or version."""
    done = {r["way"]: r["recipe"] for r in _best_table.read(args.out / f"{name}.json")
            if (r["seed"], r["pattern"]) == (int(seed), text) and not _best_table.is_old(r)}
    return {way: flags for way, flags in ways_of(args, text).items() if done.get(way) != recipe(flags)}


def recipes():
    """{way: its flags} in the order of the tables."""
    return {way: recipe((MAIN | INGREDIENTS)[way]) for way in ORDER}


def recipe(own):
    """A way's flags with a preset written out."""
    return {k: v for k, v in presets.expand(own["method"], own).items() if k not in ("preset", "effort")}


def cell(args, name, seed, text, flags):
    """All missing ways at one model, seed and pattern, SparseGPT the published way first."""
    base = flags.parse([*flags, "--method", "sparsegpt", "--pattern", text, "--no-dense"])[0]
    model, tokenizer = run.load(base)
    try:
        run.make_plan(base, model)
    except ValueError:
        return  # widths that 4:8 does not divide
    calibration = choose.calibration(base, model, tokenizer)
    evaluations = choose.evaluation(base, model, tokenizer)
    dense = quality(base, model, tokenizer, evaluations)["ppl"]
    wall, cpu = published_seconds(model, calibration, patterns.parse(text))
    yardstick = {"published_seconds": wall, "published_cpu_seconds": cpu}
    for way, own in missing(args, name, seed, text).items():
        cfg = flags.parse([*flags, "--pattern", text, "--no-dense", *given(own)])[0]
        row = measured(cfg, model, tokenizer, calibration, evaluations)
        store(args.out / f"{name}.json", {"model": name, "seed": seed, "pattern": text, "way": way,
                                          "recipe": recipe(own), "version": _best_table.VERSION, "dense_ppl": dense,
                                          **yardstick, **row})


def given(own):
    """A way's flags as words of the command line."""
    return [word for key, value in own.items() for word in (f"--{key}", str(value)) if word != "True"]


def quality(cfg, model, tokenizer, evaluations):
    """Perplexity on the one text that a model is measured on."""
    metrics, info, _ = measure.measure(cfg, model, tokenizer, evaluations)
    (metric, ppl), = metrics.items()
    return {"metric": metric, "window": info[metric]["window"], "ppl": ppl, "tokens": info[metric]["tokens"]}


def measured(cfg, model, tokenizer, calibration, evaluations):
    """Perplexity, seconds and errors of one way, on a copy of the model."""
    mine = copy.deepcopy(model)
    began, used = time.perf_counter(), time.process_time()
    [plan] = run.allocated([cfg], mine, [run.make_plan(cfg, mine)], calibration)
    result = run.prune_model(cfg, mine, plan, calibration)
    run.prove(mine, plan, result.layers)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    errors = {}
    for row in result.layers:
        errors.setdefault(row["linear"], []).append(row["relative_error"])
    return spent | quality(cfg, mine, tokenizer, evaluations) | {
        "sparsity": run.sparsity(mine), "errors": {kind: statistics.fmean(e) for kind, e in errors.items()},
        "recovery": result.recovery, "warnings": result.warnings,
        "environment": environment.environment(cfg.device)}


def published_seconds(model, calibration, pattern):
    """(wall, processor) seconds of SparseGPT the published way on the whole model, window by window, no Conv1D."""
    theirs = as_linears(copy.deepcopy(model).float())
    _, block_list = models.blocks(theirs)
    n_m = (pattern.m - pattern.n, pattern.m) if isinstance(pattern, patterns.NM) else ()
    began, used = time.perf_counter(), time.process_time()
    activations = calibrate.capture(theirs, calibration.ids, calibration.mask, batch_size=1)
    for b, block in enumerate(block_list):
        calls = iter(2 * list(range(len(activations))))  # each window passes twice

        def call(block, x, b=b, calls=calls):
            i = next(calls)
            activations.hidden[i] = x
            return calibrate.forward(block, activations, b, i)
        activations.hidden = published.prune_block(block, list(activations.hidden), call, "sparsegpt", pattern.sparsity, *n_m)
    return time.perf_counter() - began, time.process_time() - used


def as_linears(model):
    """The model with every Conv1D as an equal nn.Linear, which is what the published code looks for."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)
    return model.requires_grad_(False)


def store(path, row):
    """Put a row into the file in place of an older one of its kind, whole or not at all."""
    def same(other):
        return all(other[k] == row[k] for k in ("seed", "pattern", "way"))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [r for r in _best_table.read(path) if not same(r)]
    report.write_text(json.dumps({"rows": [*rows, row]}, indent=1) + "\n", path)


if __name__ == "__main__":
    main()
