"""What each ingredient gains over SparseGPT and costs, `--method best` above all: rows in results/best/MODEL.json.

    python scripts/bench/best.py --shared ../shared                    # all; continues where it was stopped
    python scripts/bench/best.py --shared ../shared --only stories260k --seeds 0
    python scripts/bench/best.py --shared ../shared --ways ingredients
    python scripts/tables/best_table.py                                # best.md and best.svg from the rows
    python scripts/tables/tables.py                                    # the README's table from the rows

    excess   log ppl pruned - log ppl dense, on held-out text
    share    of the excess of SparseGPT (this program's, same calibration) that a way removes
    cost     processor time of pruning, in multiples of SparseGPT done the published way (published.py) on the same
             machine in the same run; evaluation is not counted. With one thread, as here, it is the wall time of a
             machine that has nothing else to do; the wall seconds stand in the JSON beside it

Every row is for one model, pattern and calibration seed. ways.yaml names the ways and their flags.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import published
import small_models
import torch
import yaml
from common import asking, caller, chosen, flags_for, quality, removed, replace, rows_of, without
from torch import nn
from tqdm import tqdm

from oneshot import calibrate, measure, models
from oneshot.data import Tokens, choose
from oneshot.pipeline.command import load
from oneshot.pipeline.compress import compress, sparsity
from oneshot.pipeline.plan import make_plan
from oneshot.prune import patterns
from oneshot.runtime import environment
from oneshot.runtime.command import exit_code
from oneshot.settings import parse, presets

MODELS = ("stories260k", "craftgpt-5m", "demo-wikitext2")
WAYS = yaml.safe_load(Path(__file__).with_name("ways.yaml").read_text(encoding="utf-8"))
Recipe = dict[str, str | float | bool]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: measure_all(arguments(argv)), interrupted=lambda: "the same command continues")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = asking("best.py", __doc__, MODELS, 200, "main, ingredients")
    p.add_argument("--out", type=Path, default=Path("results/best"))
    p.add_argument("--patterns", default="0.5,0.6,0.7,2:4,4:8")
    return p.parse_args(argv)


def measure_all(args: argparse.Namespace) -> None:
    """Run what is missing; every row is stored as soon as it is there."""
    models.quiet()
    torch.set_num_threads(args.threads)
    every = small_models.flags_of(args.shared)
    for name in args.only.split(","):
        for seed in args.seeds.split(","):
            flags = flags_for(args, name, [*without(every[name], "--pattern"), "--seed", seed])
            with_pattern = [text for text in args.patterns.split(",") if missing(args, name, seed, text)]
            for text in tqdm(with_pattern, desc=f"{name} seed {seed}", unit="pattern"):
                cell(args, name, seed, text, flags)


# ------------------------------------------------------------------ which ways

def ways_of(args: argparse.Namespace, text: str) -> dict[str, Recipe]:
    """{way: flags} of what is wanted at a pattern. Raises ValueError naming `--ways`."""
    found = chosen(args.ways, {group: WAYS[group] for group in ("main", "ingredients")})
    if args.ways != "ingredients":
        return found
    return {way: flags for way, flags in found.items() if text == "0.7" or (
        text == "2:4" and "allocate" not in flags)}  # an N:M leaves nothing to allocate


def missing(args: argparse.Namespace, name: str, seed: str, text: str) -> dict[str, Recipe]:
    """The ways without a row yet, or whose row is of another recipe (a preset that was changed since) or version."""
    done = {r["way"]: r["recipe"] for r in read(args.out / f"{name}.json")
            if (r["seed"], r["pattern"]) == (int(seed), text) and not is_old(r)}
    return {way: flags for way, flags in ways_of(args, text).items() if done.get(way) != presets.recipe(flags)}


def is_old(row: dict) -> bool:
    """Whether a row was healed by an older version; the version counts nothing else."""
    return "heal" in row["recipe"] and row.get("version", 1) < WAYS["version"]


def read(file: Path) -> list[dict]:
    """The rows of a model in today's words (healing was recovery once); none where there is no file."""
    rows = [{"heal" if key == "recovery" else key: value for key, value in row.items()} for row in rows_of(file)]
    return [row | {"recipe": presets.recipe(row["recipe"])} for row in rows]


def given(flags: Recipe) -> list[str]:
    """A way's flags as words of the command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value)) if word != "True"]


# ------------------------------------------------------------------ measuring

def cell(args: argparse.Namespace, name: str, seed: str, text: str, flags: list[str]) -> None:
    """All missing ways at one model, seed and pattern, SparseGPT the published way first."""
    [base] = parse([*flags, "--method", "sparsegpt", "--pattern", text])
    model, tokenizer = load(base)
    try:
        make_plan(base, model)
    except ValueError:
        return  # widths that 4:8 does not divide
    calibration = choose.calibration(base, model, tokenizer)
    texts = choose.evaluation(base, model, tokenizer)
    dense = quality(measure.Subject(model, tokenizer, base, texts))["ppl"]
    wall, cpu = published_seconds(model, calibration, patterns.parse(text))
    yardstick = {"published_seconds": wall, "published_cpu_seconds": cpu}
    for way, own in missing(args, name, seed, text).items():
        [cfg] = parse([*flags, "--pattern", text, *given(own)])
        subject = measure.Subject(copy.deepcopy(model), tokenizer, cfg, texts, calibration)
        store(args.out / f"{name}.json", {"model": name, "seed": int(seed), "pattern": text, "way": way,
                                          "recipe": presets.recipe(own), "version": WAYS["version"],
                                          "dense_ppl": dense, **yardstick, **measured(subject)})


def measured(subject: measure.Subject) -> dict:
    """Prune the model in place: perplexity, seconds and errors of one way."""
    cfg, model = subject.cfg, subject.model
    began, used = time.perf_counter(), time.process_time()
    result = compress(subject, make_plan(cfg, model))
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    errors = {}
    for row in result.layers:
        errors.setdefault(row["linear"], []).append(row["relative_error"])
    return spent | quality(subject) | {
        "sparsity": sparsity(model), "errors": {kind: statistics.fmean(e) for kind, e in errors.items()},
        "heal": result.heal, "warnings": result.warnings, "environment": environment.environment(cfg.device)}


def published_seconds(model: nn.Module, calibration: Tokens, pattern: patterns.Pattern) -> tuple[float, float]:
    """(wall, processor) seconds of SparseGPT the published way on the whole model, window by window, no Conv1D."""
    theirs = as_linears(copy.deepcopy(model).float())
    _, block_list = models.blocks(theirs)
    began, used = time.perf_counter(), time.process_time()
    activations = calibrate.capture(theirs, calibration.ids, calibration.mask, batch_size=1)
    for b, block in enumerate(block_list):
        activations.hidden = published.prune_block(block, list(activations.hidden), caller(activations, b),
                                                   "sparsegpt", removed(pattern))
    return time.perf_counter() - began, time.process_time() - used


def as_linears(model: nn.Module) -> nn.Module:
    """The model with every Conv1D as an equal nn.Linear, which is what the published code looks for."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, models.Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(module, name, linear)
    return model.requires_grad_(False)


def store(file: Path, row: dict) -> None:
    """Put a row into the file in place of an older one of its kind, whole or not at all."""
    replace(read(file), row, ("seed", "pattern", "way"), file)


if __name__ == "__main__":
    sys.exit(main())
