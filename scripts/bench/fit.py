"""One shot or step by step: `oneshot fit` at the same heal tokens, beside single-shot recipes and plain rounding.

    python scripts/bench/fit.py --shared ../shared                 # all; continues where it was stopped
    python scripts/bench/fit.py --shared ../shared --only stories260k --seeds 0
    python scripts/bench/fit.py --page                             # only fit.md from the rows

    step by step  `oneshot fit --step 25%`, healed after each round and at the end
    one shot      `oneshot fit --step 100%`, healed once, on as many tokens as all heals of the former together
    shrink        `oneshot shrink` with its own search of mixtures, to the share that the former reached, healed alike
    all forms     `oneshot fit` with 2:4, int8 and int4 allowed, to half of the bytes under a floor of 1.2x perplexity

Rows are for one model, seed and way, in results/fit/MODEL.json. excess: log ppl - log ppl of the dense model, nats, on
held-out text. The target of the first three is a share of the blocks' parameters, as it has no noise.
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
from oneshot.pipeline import checks, run
from oneshot.pipeline.fit import command
from oneshot.pipeline.fit.ledger import Round
from oneshot.report.table import render
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text
from oneshot.settings import parse

SHARE, STEP = 0.7, "25%"
TOKENS = {"stories260k": "30k", "craftgpt-5m": "6k"}  # of each round; the heal at the end has as many
HEAL = {"stories260k": ["--heal-seqlen", "256", "--heal-batch", "256"],
        "craftgpt-5m": ["--heal-seqlen", "64", "--heal-batch", "256"]}
WAYS = ("step by step", "one shot", "shrink", "all forms")


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/bench/fit.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")
    p.add_argument("--work", type=Path, default=Path("build/fit"), help="rounds and models")
    p.add_argument("--out", type=Path, default=Path("results/fit"))
    p.add_argument("--only", default=",".join(TOKENS), help="models, separated by commas")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--ways", default=";".join(WAYS), help="names separated by semicolons")
    p.add_argument("--flags", default="", help="more flags for every run, separated by spaces (for a quick look)")
    p.add_argument("--page", action="store_true", help="only write the page")
    args = p.parse_args(argv)
    return exit_code(lambda: work(args), interrupted=lambda: "the same command continues")


def work(args: argparse.Namespace) -> None:
    """Run what is missing, then write the page. Raises ValueError naming the flag."""
    for name in [] if args.page else args.only.split(","):
        if name not in TOKENS:
            raise ValueError(f"--only {name}: there are {', '.join(TOKENS)}")
        models.quiet()
        for seed in args.seeds.split(","):
            for way in args.ways.split(";"):
                if way not in WAYS:
                    raise ValueError(f"--ways {way}: there are {'; '.join(WAYS)}")
                if not any((r["seed"], r["way"]) == (int(seed), way) for r in rows_of(args.out / f"{name}.json")):
                    print(f"{name} seed {seed}: {way}", file=sys.stderr)
                    row, file = one(args, name, seed, way), args.out / f"{name}.json"
                    replace(rows_of(file), row, ("seed", "way"), file)
    write_text(page(args.out), args.out / "fit.md")


def one(args: argparse.Namespace, name: str, seed: str, way: str) -> dict:
    """One row. Raises ValueError where the row that it is compared with is missing."""
    flags, began = flags_of(args, name, seed), time.perf_counter()
    file, tokens = args.out / f"{name}.json", count(TOKENS[name])
    save = args.work / f"{name}-{seed}-{way.replace(' ', '-')}"
    if way == "shrink":
        before = other(file, seed, "step by step")
        row = shrunk(flags, save, before["shares"]["parameters"], before["tokens"])
    else:
        asked = {"target": f"parameters={SHARE}", "allow": "shrink,heal", "step": STEP, "tokens": str(tokens),
                 "final": str(tokens)}
        if way == "one shot":
            asked |= {"step": "100%", "tokens": str(other(file, seed, "step by step")["tokens"]), "final": "none"}
        elif way == "all forms":
            asked |= {"target": "bytes=0.5", "allow": "shrink,2:4,int8,int4,heal",
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
            "--eval-windows", "100", *HEAL[name], "--heal-data", calibration, *args.flags.split()]


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
    words = list(flags)
    at = words.index("--heal-data")
    data = words[at + 1]
    del words[at:at + 2]
    at = words.index("--device")
    del words[at:at + 2]
    given = [word for key, value in asked.items() if value for word in (f"--{key}", value)]
    found, said = command.fitted(*command.parser().parse_known_args(
        [*words, *given, "--data", data, "--save", str(save), "--device", "cpu"]))
    print(said, file=sys.stderr)
    metric = f"{text_of(flags)}/ppl"
    kept = [r for r in found.ledger.rounds if r.kept]
    return {"ppl": kept[-1].metrics[metric] if kept else found.dense["metrics"][metric],
            "tokens": trained(kept, asked),
            "dense_ppl": found.dense["metrics"][metric], "shares": found.shares, "met": found.met(found.shares),
            "stopped": found.stopped, "rounds": [[r.told, r.shares, r.metrics.get(metric), r.kept]
                                                 for r in found.ledger.rounds],
            "plain": {grid: {"bytes": r["shares"]["bytes"], "ppl": r["metrics"][metric], "floors": r["kept"]}
                      for grid, r in found.ledger.ending["plain"].items()}, "asked": asked}


def trained(kept: list[Round], asked: dict) -> int:
    """The heal tokens on the way to the result: a round that only rounds has none."""
    total, sparse = 0, []
    for r in kept:
        if r.name == "final":
            total += count(asked["final"])
        elif r.plan["drop"] or r.plan["heads"] or r.plan["widths"] or list(r.plan["sparse"]) != sparse:
            total += count(asked["tokens"])
        sparse = list(r.plan["sparse"])
    return total


def shrunk(flags: list[str], save: Path, share: float, tokens: int) -> dict:
    """What `oneshot shrink` gives, to a share of the parameters, healed once."""
    model = flags[flags.index("--model") + 1]
    words = ["--method", "obs", "--pattern", "dense", "--shrink", repr(share), "--heal", "fold,full", "--heal-tokens",
             str(tokens), "--heal-teacher", model, "--save", str(save), "--results", str(save.parent / "records")]
    [cfg] = parse([*flags, *words, "--no-dense"])
    checks.check([cfg])
    record, metric = run.run(cfg), f"{text_of(flags)}/ppl"
    [base] = parse([*without(flags, "--heal-data"), "--method", "dense", "--results", str(save.parent / "records")])
    return {"ppl": record["metrics"][metric], "dense_ppl": run.run(base)["metrics"][metric], "tokens": tokens,
            "shares": {"parameters": record["shrunk"]["share"]}, "met": True, "cut": record["shrunk"]["cut"]}


def page(folder: Path) -> str:
    """fit.md."""
    rows = [r for file in sorted(folder.glob("*.json")) for r in rows_of(file)]
    body = [[r["model"], str(r["seed"]), r["way"], f"{r['shares']['parameters']:.3f}",
             f"{r['shares']['bytes']:.3f}" if "bytes" in r["shares"] else "", f"{r['tokens']:,}",
             str(len(r.get("rounds", [1]))), f"{r['dense_ppl']:.3f}", f"{r['ppl']:.3f}",
             f"{math.log(r['ppl'] / r['dense_ppl']):.3f}", plain(r), f"{r['seconds'] / 60:.1f}"] for r in rows]
    head = ["model", "seed", "way", "parameters", "bytes", "heal tokens", "rounds", "dense ppl", "ppl", "excess",
            "plain rounding", "minutes"]
    commits = sorted({f"{r['environment']['commit']}{' (changed)' if r['environment']['dirty'] else ''}" for r in rows})
    places = sorted({r["environment"]["device"] for r in rows})
    about = __doc__.partition("\n\n    step by step")[2]
    return "\n".join([
        "# `oneshot fit`: one shot or step by step", "",
        f"`python scripts/bench/fit.py`; commit {', '.join(commits)}; {', '.join(places)}.", "",
        "```", "    step by step" + about.partition("\n\nRows are")[0], "```", "",
        "excess: log ppl - log ppl of the dense model, nats, on held-out text. plain rounding: ppl of the dense model "
        "rounded to nearest, and its bytes.", "",
        render(head, body, "markdown", text={"model", "way", "plain rounding"})])


def plain(row: dict) -> str:
    """Plain rounding of the dense model, in words."""
    return ", ".join(f"{grid} {own['ppl']:.3f} at {own['bytes']:.2f}" for grid, own in row.get("plain", {}).items())


if __name__ == "__main__":
    sys.exit(main())
