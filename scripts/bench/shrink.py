"""What smaller dense models lose, by each way to make them: rows in results/shrink/MODEL.json.

    python scripts/bench/shrink.py --shared ../shared                    # all; continues where it was stopped
    python scripts/bench/shrink.py --shared ../shared --only demo --seeds 0 --ways ingredients --shares 0.7
    python scripts/tables/shrink_table.py                                # shrink.md from the rows

    share    of the parameters of the transformer blocks that is left
    excess   log ppl smaller - log ppl dense, on held-out text, nats
    less     share of the excess of the best of FLAP, Wanda-sp and ShortGPT that a way does without

Every row is for one model, share, calibration seed and way; shrink_ways.yaml names the ways and their flags.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import small_models
import torch
import yaml
from common import asking, chosen, flags_for, quality, replace, rows_of, without
from tqdm import tqdm

from oneshot import measure, models
from oneshot.data import choose
from oneshot.pipeline.command import load
from oneshot.pipeline.compress import compress
from oneshot.pipeline.plan import make_plan
from oneshot.runtime import environment
from oneshot.runtime.command import exit_code
from oneshot.settings import parse

MODELS = ("stories260k", "craftgpt-5m", "demo")  # and smollm2, of which a run takes minutes
WAYS = yaml.safe_load(Path(__file__).with_name("shrink_ways.yaml").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: measure_all(arguments(argv)), interrupted=lambda: "the same command continues")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = asking("shrink.py", __doc__, MODELS, 100, "main, ingredients")
    p.add_argument("--out", type=Path, default=Path("results/shrink"))
    p.add_argument("--shares", default="0.8,0.7,0.5")
    return p.parse_args(argv)


def flags_of(shared: Path) -> dict[str, list[str]]:
    """{name: flags of `oneshot prune`} of the models."""
    found = {name: without(flags, "--pattern") for name, flags in small_models.flags_of(shared).items()}
    found["demo"] = [*without(found["demo"], "--evaluate"), "--evaluate", "builtin:prose", "--nsamples", "128"]
    return found


def measure_all(args: argparse.Namespace) -> None:
    """Run what is missing; every row is stored as soon as it is there."""
    models.quiet()
    torch.set_num_threads(args.threads)
    every = flags_of(args.shared)
    for name in args.only.split(","):
        if name not in every:
            raise ValueError(f"--only {name}: there are {', '.join(every)}")
        jobs = [(seed, share, way) for seed in args.seeds.split(",") for share in args.shares.split(",")
                for way in chosen(args.ways, WAYS) if not done(args, name, seed, share, way)]
        dense = {}
        for job in tqdm(jobs, desc=name, unit="run"):
            one(args, name, job, flags_for(args, name, [*every[name], "--pattern", "dense"]), dense)


def done(args: argparse.Namespace, name: str, seed: str, share: str, way: str) -> bool:
    """Whether there is a row of these flags."""
    own = chosen(args.ways, WAYS)[way]
    return any((r["seed"], r["asked"], r["way"], r["flags"]) == (int(seed), float(share), way, own)
               for r in rows_of(args.out / f"{name}.json"))


def given(own: dict, share: str, blocks: int) -> list[str]:
    """A way's flags as words of the command line."""
    depth = blocks - math.floor((1 - float(share)) * blocks + 1e-9)
    words = ["--shrink", share]
    for name, value in own.items():
        if value == "DEPTH":
            words += ["--layers", str(depth)] if depth < blocks else []
        elif name == "order" and "DEPTH" in own.values() and depth == blocks:
            continue  # no whole block fits: neurons alone
        else:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words + (["--tries", "1"] if "DEPTH" in own.values() and depth == blocks else [])


def one(args: argparse.Namespace, name: str, job: tuple[str, str, str], flags: list[str], dense: dict) -> None:
    """Measure one way and store its row. dense: {model: its perplexity}, filled on first use."""
    (seed, share, way), own = job, chosen(args.ways, WAYS)[job[2]]
    [base] = parse([*flags, "--method", "magnitude", "--seed", seed])
    model, tokenizer = load(base)
    blocks = len(models.blocks(model)[1])
    [cfg] = parse([*flags, "--method", own.get("shrink-method", "obs"), "--seed", seed, *given(own, share, blocks)])
    calibration, texts = choose.calibration(cfg, model, tokenizer), choose.evaluation(cfg, model, tokenizer)
    if name not in dense:
        dense[name] = quality(measure.Subject(model, tokenizer, base, texts))
    began, used = time.perf_counter(), time.process_time()
    result = compress(measure.Subject(model, tokenizer, cfg, texts, calibration), make_plan(cfg, model))
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    found = quality(measure.Subject(model, tokenizer, cfg, texts))
    shrunk = {key: result.shrunk[key] for key in ("share", "blocks", "blocks_before", "cut", "order", "tried")}
    row = {"model": name, "seed": int(seed), "asked": float(share), "way": way, "flags": own, **found,
           "dense_ppl": dense[name]["ppl"], "excess": math.log(found["ppl"] / dense[name]["ppl"]), **spent, **shrunk,
           "warnings": result.warnings, "environment": environment.environment(cfg.device)}
    file = args.out / f"{name}.json"
    replace(rows_of(file), row, ("seed", "asked", "way"), file)


if __name__ == "__main__":
    sys.exit(main())
