"""What healing on text gives back: one record a way in results/heal/MODEL.

    python scripts/bench/heal.py --shared ../shared                          # all ways; continues where it was stopped
    python scripts/bench/heal.py --shared ../shared --only smollm2 --ways "none;full 500k"
    python scripts/bench/heal.py --shared ../shared --tasks build/tasks      # tasks as well (local_tasks.py), all ways
    python scripts/bench/heal.py --shared ../shared --only stories260k --seeds 0,1,2 --ways "none;lora 500k"
    python scripts/tables/heal_table.py                                      # heal.md and heal.svg from the records
    python scripts/tables/tables.py                                          # the README's table from the records

Calibration and training are on the first 85 % of the C4 sample's documents (and books out of copyright), C4's
perplexity on the rest, WikiText-2's on its test text. The toys (small_models.py) have texts of their own, half to
calibrate and train on, half to measure; craftgpt-5m, which has little, is trained on its own samples (`self`).
heal_ways.yaml names the ways. Checkpoints of unfinished ways lie in --work, finished models too.
"""

import argparse
import json
import lzma
import random
import sys
from pathlib import Path

import small_models
import yaml
from common import without

from oneshot import checkpoint, report
from oneshot.pipeline.attempt import attempt
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text
from oneshot.settings import parse

ROOT = Path(__file__).parents[2]
WIKITEXT = "wikitext2_test/ppl"
TASKS, DOCUMENTS = "foundry_arc_easy,foundry_piqa,lambada", 100  # those that the dense model does above chance
BASE = {
    "smollm2": ["--model", "smollm2", "--seqlen", "512", "--eval-seqlen", "512", "--nsamples", "64",
                "--eval-windows", "64"],
    "demo": ["--model", "demo", "--seqlen", "256", "--nsamples", "64", "--eval-windows", "64"],
}
BEGUN = ("method", "preset", "pattern", "shrink", "uneven", "nsamples")
WINDOW = {"demo": "256", "stories260k": "256", "craftgpt-5m": "64"}  # as many positions as calibration has
TOYS = {"stories260k": None, "craftgpt-5m": "self"}  # have texts of their own: trained on, None: as calibrated
WAYS = yaml.safe_load(Path(__file__).with_name("heal_ways.yaml").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/bench/heal.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of data/")
    p.add_argument("--work", type=Path, default=Path("build/heal"), help="texts, checkpoints, healed models")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "heal")
    p.add_argument("--only", default="smollm2", help="models, separated by commas")
    p.add_argument("--ways", default=";".join(WAYS), help="names separated by semicolons")
    p.add_argument("--seeds", default="0")
    p.add_argument("--tasks", type=Path, help=f"folder of the tasks {TASKS}: the first {DOCUMENTS} documents of each")
    args = p.parse_args(argv)
    return exit_code(lambda: run(args), interrupted=lambda: "the same command continues")


def run(args: argparse.Namespace) -> None:
    """Run what is missing."""
    texts = make_texts(args.shared / "data", args.work)
    for name in args.only.split(","):
        for seed in args.seeds.split(","):
            for way in ["dense", *args.ways.split(";")]:
                print(f"{name} seed {seed}: {way}", file=sys.stderr)
                one(args, name, seed, way, texts)


def base(name: str, texts: list[str], shared: Path) -> list[str]:
    """The flags that all ways of a model share. texts: those of the models that have none of their own."""
    if name not in TOYS:
        return [*BASE[name], *texts]
    flags = without(small_models.flags_of(shared)[name], "--pattern")
    return [*without(flags, "--evaluate"), "--evaluate", f"own={flags[flags.index('--evaluate') + 1]}"]


def training(name: str, flags: list[str], work: Path) -> str:
    """What --heal-data is where a way does not say it. flags: those of `base`."""
    if name in TOYS:
        return TOYS[name] or flags[flags.index("--calibration") + 1]
    return f"0.7*{work / 'c4_train.jsonl'},0.3*{work / 'books.txt'}"


def make_texts(data: Path, work: Path) -> list[str]:
    """The flags that name the texts, which are written into `work` where they are not there."""
    work.mkdir(parents=True, exist_ok=True)
    train, held = small_models.split_c4(data, work)
    if not (work / "books.txt").is_file():
        with lzma.open(data / "books_public_domain.txt.xz", "rt", encoding="utf-8") as books:
            write_text(books.read(), work / "books.txt")
    if not (work / "shuffled.txt").is_file():  # what does harm: C4's words in any order
        lines = train.read_text(encoding="utf-8").splitlines()
        words = " ".join(json.loads(line)["text"] for line in lines).split()
        random.Random(0).shuffle(words)
        write_text("\n\n".join(" ".join(words[i:i + 300]) for i in range(0, len(words), 300)) + "\n",
                   work / "shuffled.txt")
    return ["--calibration", str(train), "--evaluate", f"c4={held}"]


def one(args: argparse.Namespace, name: str, seed: str, way: str, texts: list[str]) -> None:
    """One run; raises ValueError if it failed."""
    flags = [*base(name, texts, args.shared), "--seed", seed, "--no-layer-errors", "--device", "cpu"]
    if way == "dense":
        own = ["--method", "dense"]
    else:
        ways = dict(WAYS[way])
        data, held, begins = ways.pop("DATA", None), ways.pop("HELD", None), ways.pop("MODEL", None)
        data = str(args.work / data) if data else training(name, flags, args.work)
        own = ["--no-dense", "--save", str(args.work / folder_of(name, seed, way))]
        if begins:
            dense, begins = flags[flags.index("--model") + 1], args.work / folder_of(name, seed, begins)
            flags = [*without(flags, "--model"), "--model", str(begins), "--heal-teacher", dense]
        own += ["--heal-held-out", str(args.work / held)] if held else []
        for flag, value in ways.items():
            own += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
            if flag == "heal" and any(part in str(value) for part in ("full", "lora")):
                own += ["--heal-data", data, *(["--heal-seqlen", WINDOW[name]] if name in WINDOW else [])]
    record = done([*flags, *own], args.out / name, way)
    if way != "dense" and begins:  # what the table compares it with
        made_by = checkpoint.read_manifest(begins)["record"]["settings"]
        record["begun"] = {key: made_by[key] for key in BEGUN if key in made_by}
    saved = own[own.index("--save") + 1] if "--save" in own else flags[flags.index("--model") + 1]
    plain = [*without(without(flags, "--heal-teacher"), "--model"), "--model", saved, "--method", "dense"]
    asked = []
    if name not in TOYS and WIKITEXT not in record["metrics"]:
        asked += [["--evaluate", str(args.shared / "data" / "wikitext2_test.txt")]]
    if args.tasks and not any(metric.startswith(tuple(TASKS.split(","))) for metric in record["metrics"]):
        asked += [["--evaluate", "none", "--tasks", TASKS, "--task-path", str(args.tasks), "--task-limit",
                   str(DOCUMENTS), "--trust-task-code"]]
    for words in asked:  # of what was saved, each by a run of its own
        found = done([*plain, *words], args.work / "evaluations", way)
        record["metrics"] |= found["metrics"]
        record["metric_info"] |= found["metric_info"]
        report.write(record, args.out / name / f"{record['run_id']}.json")


def folder_of(name: str, seed: str, way: str) -> str:
    """Where in --work a way's model is."""
    return f"{name}-{seed}-{way}".replace(" ", "_").replace(",", "+")


def done(words: list[str], results: Path, way: str) -> dict:
    """The record of one run. Raises ValueError if it failed."""
    [cfg] = parse([*words, "--results", str(results)])
    record = attempt(cfg)
    if record["status"] != "finished":
        raise ValueError(f"{way}: failed, see the record in {results}")
    return record


if __name__ == "__main__":
    sys.exit(main())
