"""One shot or step by step: `oneshot fit` at the same heal tokens, beside single-shot recipes and plain rounding.

    python scripts/bench/fit.py --shared ../shared                 # all; continues where it was stopped
    python scripts/bench/fit.py --shared ../shared --only stories260k --seeds 0
    python scripts/bench/fit.py --page                             # only fit.md from the rows

    step by step  `oneshot fit --step 25%`, healed after each round and at the end
    one shot      `oneshot fit --step 100%`, healed once, on as many tokens as all heals of the former together
    shrink        `oneshot shrink` with its own search of mixtures, to the share that the former reached, healed alike
    all forms     `oneshot fit` with 2:4, int8 and int4 allowed, to 0.4 of the bytes under a floor of 1.2x perplexity
    int4 ...      single shots of `oneshot prune` to fewer bytes or as many, healed on as many tokens as "step by step"
    0.6x ...      of SmolLM2: `oneshot fit --target latency=0.6`, and 0.75 without integers, under floors

Rows are for one model, seed and way, in results/fit/MODEL.json. excess: log ppl - log ppl of the dense model, nats, on
held-out text. The toys' targets are shares of parameters or bytes, which have no noise.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import small_models
from common import replace, rows_of, without

from oneshot import models
from oneshot.heal.options import count
from oneshot.models import gguf
from oneshot.pipeline import checks, run
from oneshot.pipeline.fit import command, steps
from oneshot.pipeline.fit.ledger import Round
from oneshot.report.table import render
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text
from oneshot.settings import parse

SHARE, STEP, BYTES = 0.7, "25%", 0.4
TOKENS = {"stories260k": "30k", "craftgpt-5m": "6k"}  # of each round; the heal at the end has as many
HEAL = {"stories260k": ["--heal-seqlen", "256", "--heal-batch", "256"],
        "craftgpt-5m": ["--heal-seqlen", "64", "--heal-batch", "256"],
        "smollm2": ["--heal-seqlen", "512", "--eval-seqlen", "512"]}
WINDOWS = {"smollm2": "64"}
RECIPES = {  # flags of `oneshot prune`; tokens are added where it heals on text
    "int4": {"method": "dense", "quantise": "int4:64"},
    "2:4, int8": {"method": "sparsegpt", "pattern": "2:4", "heal": "full", "quantise": "int8:row"},
    "2:4 by ALPS, int8": {"method": "alps", "pattern": "2:4", "heal": "block,full", "quantise": "int8:row"},
    "cut, int8": {"method": "obs", "shrink": 0.77, "shrink-method": "obs", "heal": "fold,full", "quantise": "int8:row"},
}
GOALS = {  # flags of `oneshot fit`; TEXT stands for the text that is measured
    "0.6x, floor 1.1x": {"target": "latency=0.6", "floor": "TEXT/ppl<=1.1x", "allow": "2:4,int8,int4", "step": "100%",
                         "budget": "2h"},
    "0.75x without integers, floor 1.5x": {"target": "latency=0.75", "floor": "TEXT/ppl<=1.5x", "step": "50%",
                                           "allow": "shrink,2:4,heal", "tokens": "100k", "final": "none",
                                           "budget": "2h"},
}
KINDS = ("parameters", "bytes", "latency")
TOYS = ("step by step", "one shot", "shrink", "all forms", *RECIPES)
WAYS = {"stories260k": TOYS, "craftgpt-5m": TOYS, "smollm2": tuple(GOALS)}


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/bench/fit.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")
    p.add_argument("--work", type=Path, default=Path("build/fit"), help="rounds and models")
    p.add_argument("--out", type=Path, default=Path("results/fit"))
    p.add_argument("--only", default=",".join(TOKENS), help="models, separated by commas")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--ways", default="", help="names separated by semicolons (default: all of a model)")
    p.add_argument("--flags", default="", help="more flags for every run, separated by spaces (for a quick look)")
    p.add_argument("--page", action="store_true", help="only write the page")
    args = p.parse_args(argv)
    return exit_code(lambda: work(args), interrupted=lambda: "the same command continues")


def work(args: argparse.Namespace) -> None:
    """Run what is missing, then write the page. Raises ValueError naming the flag."""
    for name in [] if args.page else args.only.split(","):
        if name not in WAYS:
            raise ValueError(f"--only {name}: there are {', '.join(WAYS)}")
        models.quiet()
        for seed in args.seeds.split(","):
            for way in args.ways.split(";") if args.ways else WAYS[name]:
                if way not in WAYS[name]:
                    raise ValueError(f"--ways {way}: there are {'; '.join(WAYS[name])}")
                if not any((r["seed"], r["way"]) == (int(seed), way) for r in rows_of(args.out / f"{name}.json")):
                    print(f"{name} seed {seed}: {way}", file=sys.stderr)
                    row, file = one(args, name, seed, way), args.out / f"{name}.json"
                    replace(rows_of(file), row, ("seed", "way"), file)
    write_text(page(args.out), args.out / "fit.md")


def one(args: argparse.Namespace, name: str, seed: str, way: str) -> dict:
    """One row. Raises ValueError where the row that it is compared with is missing."""
    flags, began = flags_of(args, name, seed), time.perf_counter()
    file = args.out / f"{name}.json"
    save = args.work / f"{name}-{seed}-{way.replace(' ', '-').replace(',', '')}"
    if way == "shrink":
        before = other(file, seed, "step by step")
        row = single(flags, save, {
            "method": "obs", "shrink": before["shares"]["parameters"], "heal": "fold,full"}, before["tokens"])
    elif way in RECIPES:
        row = single(flags, save, RECIPES[way], other(file, seed, "step by step")["tokens"])
    elif way in GOALS:
        row = fitted([*flags, "--scale-columns"] if "int8" in GOALS[way]["allow"] else flags, save, {
            key: value.replace("TEXT", text_of(flags)) for key, value in GOALS[way].items()})
    else:
        tokens = count(TOKENS[name])
        asked = {"target": f"parameters={SHARE}", "allow": "shrink,heal", "step": STEP, "tokens": str(tokens),
                 "final": str(tokens)}
        if way == "one shot":
            asked |= {"step": "100%", "tokens": str(other(file, seed, "step by step")["tokens"]), "final": "none"}
        elif way == "all forms":
            asked |= {"target": f"bytes={BYTES}", "allow": "shrink,2:4,int8,int4,heal",
                      "floor": f"{text_of(flags)}/ppl<=1.2x"}
        row = fitted(flags, save, asked)
    about = {"model": name, "seed": int(seed), "way": way, "seconds": time.perf_counter() - began,
             "environment": environment.environment("cpu")}
    return about | row


def flags_of(args: argparse.Namespace, name: str, seed: str) -> list[str]:
    """The flags that all ways have."""
    own = small_models.flags_of(args.shared)[name]
    at = own.index("--pattern")
    calibration = own[own.index("--calibration") + 1]
    return [*own[:at], *own[at + 2:], "--seed", seed, "--device", "cpu", "--no-progress", "--no-layer-errors",
            "--eval-windows", WINDOWS.get(name, "100"), *HEAL[name], "--heal-data", calibration, *args.flags.split()]


def text_of(flags: list[str]) -> str:
    """The name of the text that is measured."""
    return Path(flags[flags.index("--evaluate") + 1]).stem


def other(file: Path, seed: str, way: str) -> dict:
    """The row of another way. Raises ValueError naming `--ways` where there is none."""
    found = [r for r in rows_of(file) if (r["seed"], r["way"]) == (int(seed), way)]
    if not found:
        raise ValueError(f"--ways: {way} comes first, as the others take its tokens")
    return found[0]


def fitted(flags: list[str], save: Path, asked: dict) -> dict:
    """What `oneshot fit` gives."""
    words = without(flags, "--device")
    at = words.index("--heal-data")
    words[at:at + 2] = ["--data", words[at + 1]] if "heal" in asked["allow"] else []
    given = [word for key, value in asked.items() if value for word in (f"--{key}", value)]
    found, said = command.fitted(*command.parser().parse_known_args(
        [*words, *given, "--save", str(save), "--device", "cpu"]))
    print(said, file=sys.stderr)
    metric = f"{text_of(flags)}/ppl"
    kept = [r for r in found.ledger.rounds if r.kept]
    return {"ppl": kept[-1].metrics[metric] if kept else found.dense["metrics"][metric],
            "tokens": trained(kept, asked),
            "dense_ppl": found.dense["metrics"][metric], "shares": found.shares, "met": found.met(found.shares),
            "stopped": found.stopped, "rounds": [[r.told, r.shares, r.metrics.get(metric), r.kept]
                                                 for r in found.ledger.rounds],
            "plain": {grid: {**r["shares"], "ppl": r["metrics"][metric], "floors": r["kept"]}
                      for grid, r in found.ledger.ending["plain"].items()}, "asked": asked,
            "seconds": sum(r.seconds for r in found.ledger.rounds)}  # also where it was killed and went on


def trained(kept: list[Round], asked: dict) -> int:
    """The heal tokens on the way to the result: a round that only rounds has none."""
    total, sparse = 0, []
    for r in kept:
        if r.name == "final":
            total += count(asked["final"])
        elif r.plan["drop"] or r.plan["heads"] or r.plan["widths"] or list(r.plan["sparse"]) != sparse:
            total += count(asked["tokens"]) if "tokens" in asked else 0
        sparse = list(r.plan["sparse"])
    return total


def single(flags: list[str], save: Path, own: dict, tokens: int) -> dict:
    """What one run of `oneshot prune` gives, healed once where it heals on text."""
    model, records = flags[flags.index("--model") + 1], str(save.parent / "records")
    trains = "full" in own.get("heal", "")
    words = [word for key, value in ({"pattern": "dense"} | own).items() for word in (f"--{key}", str(value))]
    words += ["--heal-tokens", str(tokens), "--heal-teacher", model] if trains else []
    [cfg] = parse([*(flags if trains else without(flags, "--heal-data")), *words, "--save", str(save), "--results",
                   records, "--no-dense"])
    checks.check([cfg])
    record, metric = run.run(cfg), f"{text_of(flags)}/ppl"
    [base] = parse([*without(flags, "--heal-data"), "--method", "dense", "--results", records])
    dense = run.run(base)
    return {"ppl": record["metrics"][metric], "dense_ppl": dense["metrics"][metric], "tokens": tokens * trains,
            "shares": steps.shares(record, dense), "met": True, "flags": own}


def page(folder: Path) -> str:
    """fit.md."""
    rows = [r for file in sorted(folder.glob("*.json")) for r in rows_of(file)]
    body = [[r["model"], str(r["seed"]), r["way"], *(
                 f"{r['shares'][kind]:.3f}" if kind in r["shares"] else "" for kind in KINDS), f"{r['tokens']:,}",
             str(len(r.get("rounds", [1]))), f"{r['dense_ppl']:.3f}", f"{r['ppl']:.3f}",
             f"{math.log(r['ppl'] / r['dense_ppl']):.3f}", plain(r), f"{r['seconds'] / 60:.1f}"] for r in rows]
    head = ["model", "seed", "way", *KINDS, "heal tokens", "rounds", "dense ppl", "ppl", "excess",
            "plain rounding", "minutes"]
    commits = sorted({f"{r['environment']['commit']}{' (changed)' if r['environment']['dirty'] else ''}" for r in rows})
    places = sorted({r["environment"]["device"] for r in rows})
    about = __doc__.partition("\n\n    step by step")[2]
    return "\n".join([
        "# `oneshot fit`: one shot or step by step", "",
        f"`python scripts/bench/fit.py`; commit {', '.join(commits)}; {', '.join(places)}.", "",
        "```", "    step by step" + about.partition("\n\nRows are")[0], "```", "",
        "excess: log ppl - log ppl of the dense model, nats, on held-out text. plain rounding: ppl of the dense model "
        "rounded to nearest, its share of the bytes, and of the time of a token where that was the target. "
        f"{gguf.beside_integers(r['model'] for r in rows)}".rstrip(), "",
        render(head, body, "markdown", text={"model", "way", "plain rounding"}), *refused(rows)])


def refused(rows: list[dict]) -> list[str]:
    """A line for each run that missed its target: the rounds that broke a floor, and why it ended."""
    lines = []
    for r in rows:
        broken = [f"{told} at {', '.join(f'{shares[kind]:.3f} of the {kind}' for kind in KINDS if kind in shares)}: "
                  f"ppl {ppl:.3f}" for told, shares, ppl, kept in r.get("rounds", []) if not kept and ppl is not None]
        if not r["met"]:
            lines.append(f"- {r['model']}, seed {r['seed']}, {r['way']}: target not met ({r['stopped']}). Taken back: "
                         f"{'; '.join(broken) or 'nothing'}.")
    return [*lines, ""] if lines else []


def plain(row: dict) -> str:
    """Plain rounding of the dense model, in words."""
    def at(own: dict) -> str:
        return " and ".join(f"{own[kind]:.2f}{unit}" for kind, unit in (("bytes", ""), ("latency", "x")) if kind in own)
    return ", ".join(f"{grid} {own['ppl']:.3f} at {at(own)}" for grid, own in row.get("plain", {}).items())


if __name__ == "__main__":
    sys.exit(main())
