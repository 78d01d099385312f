"""Quality against real bytes: pruned, rounded, both; rows in results/bench/integers.json, page and picture beside it.

    python scripts/bench/integers.py --shared ../shared                    # all; continues where it was stopped
    python scripts/bench/integers.py --shared ../shared --only stories260k --seeds 0 --ways "int3 by GPTQ"

    bits     of codes, scales and positions for each weight of the linears in the blocks
    excess   log ppl - log ppl dense, on held-out text, nats
    less     share of the excess of SparseGPT at 2:4, rounded to nearest int4, that a way of as many bytes does without

Every row is for one model, calibration seed and way; integers_ways.yaml names the ways and their flags.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from common import written
from shrink import flags_of, quality
from tqdm import tqdm

from oneshot import measure, models, report
from oneshot.checkpoint.bytes import model_bytes
from oneshot.data import choose
from oneshot.pipeline.command import load
from oneshot.pipeline.compress import compress
from oneshot.pipeline.plan import make_plan
from oneshot.quantise import grids, rtn
from oneshot.report.figures import drawing, size
from oneshot.report.table import render
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text
from oneshot.settings import parse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = ("stories260k", "craftgpt-5m", "demo")  # and smollm2, of which a run takes minutes
BATCH = {"craftgpt-5m": "16"}  # its windows are single dialogues of some 30 tokens
MARKED = {"smollm2": "its dense weights come off a 4-bit grid already, which flatters its rows of int4"}
WAYS = yaml.safe_load(Path(__file__).with_name("integers_ways.yaml").read_text(encoding="utf-8"))
NEAREST = "2:4, then int4 to nearest"  # what `less` compares with
LEAST = 1e-4  # nats; what loses less, or gains, is drawn there


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: measure_all(arguments(argv)), interrupted=lambda: "the same command continues")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/integers.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--only", default=",".join(MODELS), help="models, separated by commas")
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--ways", default="main", help="main, more, or names separated by semicolons")
    p.add_argument("--eval-windows", type=int, default=100)
    p.add_argument("--flags", default="", help="more flags for every run, separated by spaces (for a quick look)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--page", action="store_true", help="measure nothing, write the page from the rows")
    return p.parse_args(argv)


def measure_all(args: argparse.Namespace) -> None:
    """Run what is missing; every row is stored as soon as it is there, and the page at the end."""
    models.quiet()
    torch.set_num_threads(args.threads)
    file, ways = args.out / "integers.json", ways_of(args)
    if not args.page:
        every = flags_of(args.shared)
        for name in args.only.split(","):
            if name not in every:
                raise ValueError(f"--only {name}: there are {', '.join(every)}")
            jobs = [(int(seed), way) for seed in args.seeds.split(",") for way in ways
                    if not done(read(file), name, int(seed), way, ways[way])]
            flags = [*every[name], "--batch-size", BATCH.get(name, "8"), "--eval-windows", str(args.eval_windows),
                     "--device", "cpu", "--no-progress", "--no-dense", *args.flags.split()]
            dense = {}
            for seed, way in tqdm(jobs, desc=name, unit="run"):
                row = {"model": name, "seed": seed, "way": way, "flags": ways[way],
                       **one([*flags, "--seed", str(seed)], dict(ways[way]), dense)}
                rows = [r for r in read(file) if (r["model"], r["seed"], r["way"]) != (name, seed, way)]
                write_json({"rows": [*rows, row]}, file)
    rows = read(file)
    if not rows:
        raise ValueError(f"--out {args.out}: holds no integers.json yet; leave out --page")
    write_text(page(rows), args.out / "integers.md")
    drawing.save(picture(rows), args.out / "integers.svg")
    print(f"written: {args.out / 'integers.md'}")


def ways_of(args: argparse.Namespace) -> dict[str, dict]:
    """{way: its flags} of what is wanted. Raises ValueError naming `--ways`."""
    if args.ways in WAYS:
        return WAYS[args.ways]
    every = WAYS["main"] | WAYS["more"]
    if unknown := [way for way in args.ways.split(";") if way not in every]:
        raise ValueError(f"--ways {unknown[0]}: there are {'; '.join(every)}")
    return {way: every[way] for way in args.ways.split(";")}


def read(file: Path) -> list[dict]:
    """The rows; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def done(rows: list[dict], name: str, seed: int, way: str, flags: dict) -> bool:
    """Whether there is a row of these flags."""
    return any((r["model"], r["seed"], r["way"], r["flags"]) == (name, seed, way, flags) for r in rows)


def one(flags: list[str], own: dict, dense: dict) -> dict:
    """What one way costs and takes. dense: {"ppl"} of the dense model, filled on first use."""
    first = own.pop("FIRST", None)
    [cfg] = parse([*flags, *(word for name, value in own.items() for word in (f"--{name}", str(value)))])
    model, tokenizer = load(cfg)
    calibration, texts = choose.calibration(cfg, model, tokenizer), choose.evaluation(cfg, model, tokenizer)
    if not dense:
        dense.update(quality(measure.Subject(model, tokenizer, cfg, texts)))
    began = time.perf_counter()
    if first:
        rtn.quantise_model(model, grids.parse(first))
    result = compress(measure.Subject(model, tokenizer, cfg, texts, calibration), make_plan(cfg, model))
    seconds = time.perf_counter() - began
    sizes = model_bytes(model, [row | ({"grid": first} if first else {}) for row in result.layers])
    weights = sum(weight.size for weight in models.all_weights(model))
    found = quality(measure.Subject(model, tokenizer, cfg, texts))
    return {**found, "dense_ppl": dense["ppl"], "excess": math.log(found["ppl"] / dense["ppl"]), **sizes,
            "bits": 8 * sizes["stored"] / weights, "seconds": seconds,
            "rounded_to_zero": sum(row.get("rounded_to_zero", 0) for row in result.layers),
            "warnings": result.warnings, "environment": environment.environment(cfg.device)}


# ------------------------------------------------------------------ the page

def page(rows: list[dict]) -> str:
    """The page: a table for each model, fewest bits last."""
    parts = ["# Quality against bytes\n", written("integers.py", rows[-1]["environment"]) + "\n",
             "bits: of codes, scales and positions for each weight of the linears in the blocks. excess: log "
             "perplexity above the dense model's, nats, mean over seeds (± standard deviation). less: share of the "
             f"excess of \"{NEAREST}\" that a way of as many bytes does without.\n",
             "![excess against bits, with the front of what no other way beats](integers.svg)\n"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        parts.append(f"## {name}\n")
        parts += [f"{MARKED[name].capitalize()}.\n"] if name in MARKED else []
        parts += [f"{winner(own)}\n"] if winner(own) else []
        parts.append(f"{own[0]['metric']}: dense {report.number(own[0]['dense_ppl'])} at {own[0]['window']} tokens.\n")
        parts.append(render(["way", "bits", "KB", "excess", "less", "to zero", "seconds"], body(own), "markdown",
                            text={"way"}))
    return "\n".join(parts)


def winner(rows: list[dict]) -> str:
    """Which way loses least of those that take as many bytes as NEAREST; "" where there is none to compare with."""
    groups = grouped(rows)
    if NEAREST not in groups:
        return ""
    same = {way: statistics.fmean(r["excess"] for r in met) for way, met in groups.items() if alike(met[0], groups)}
    best = min(same, key=same.get)
    return (f"At {groups[NEAREST][0]['bits']:.2f} bits the least is lost by **{best}**, {same[best]:.4f} nats; "
            f"by \"{NEAREST}\" {same[NEAREST]:.4f}.")


def kind(flags: dict) -> str:
    """What a way's point in the picture is called."""
    if "shrink" in flags:
        return "smaller dense model"
    if flags["pattern" if "pattern" in flags else "method"] == "dense":
        return "dense, to nearest" if flags.get("quantiser") == "rtn" else "dense, GPTQ"
    return ("50 %" if flags["pattern"] == "0.5" else flags["pattern"]) + (", healed" if "heal" in flags else "")


@drawing.drawn
def picture(rows: list[dict]) -> "Figure":
    """Excess against bits, a panel for each model; a line joins the ways that no other beats."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(kind(row["flags"]) for row in rows))
    styles = dict(zip(kinds, zip(drawing.COLOURS, drawing.MARKERS, strict=False), strict=False))
    fig = drawing.new_figure(drawing.WIDTH, 0.5 + 2.9 * len(names))
    for ax, name in zip(fig.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        groups = grouped([row for row in rows if row["model"] == name])
        points = {way: (met[0]["bits"], [max(r["excess"], LEAST) for r in met]) for way, met in groups.items()}
        for way, (bits, values) in points.items():
            drawing.mark(ax, bits, values, *styles[kind(groups[way][0]["flags"])])
        line = [(points[way][0], statistics.fmean(points[way][1])) for way in size.front(points)]
        ax.plot(*zip(*line, strict=True), color=drawing.MUTED, lw=1, zorder=1)
        drawing.scale_y([ax], [v for _, values in points.values() for v in values])
        ax.set(title=name, xlabel="bits of storage a weight", ylabel="excess log perplexity, nats")
    drawing.legend(fig, [drawing.handle(name, colour, "none", marker) for name, (colour, marker) in styles.items()])
    return fig


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    """{way: its rows}."""
    groups = {}
    for row in rows:
        groups.setdefault(row["way"], []).append(row)
    return groups


def alike(row: dict, groups: dict[str, list[dict]]) -> bool:
    """Whether a row takes as many bytes as NEAREST, to 1 %."""
    return abs(row["stored"] / groups[NEAREST][0]["stored"] - 1) <= 0.01


def body(rows: list[dict]) -> list[list[str]]:
    """The lines of a model's table."""
    groups = grouped(rows)
    excess = {way: statistics.fmean(r["excess"] for r in met) for way, met in groups.items()}
    lines = []
    for way, met in sorted(groups.items(), key=lambda item: (-item[1][0]["bits"], excess[item[0]])):
        spread = f" ± {statistics.stdev(r['excess'] for r in met):.4f}" if len(met) > 1 else ""
        lines.append([way, f"{met[0]['bits']:.2f}", f"{met[0]['stored'] / 1e3:.0f}", f"{excess[way]:.4f}{spread}",
                      less(way, groups, excess), str(round(statistics.fmean(r["rounded_to_zero"] for r in met))),
                      f"{statistics.fmean(r['seconds'] for r in met):.1f}"])
    return lines


def less(way: str, groups: dict[str, list[dict]], excess: dict[str, float]) -> str:
    """The share of NEAREST's excess that a way does without; "-" where it takes other bytes, by more than 1 %."""
    if NEAREST not in groups or way == NEAREST:
        return "-"
    return f"{100 * (1 - excess[way] / excess[NEAREST]):.0f} %" if alike(groups[way][0], groups) else "-"


if __name__ == "__main__":
    sys.exit(main())
