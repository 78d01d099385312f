"""What healing on text gives back: records in results/heal/MODEL, and a table and a picture made of them.

    python scripts/bench/heal.py --shared ../shared                          # all ways; continues where it was stopped
    python scripts/bench/heal.py --shared ../shared --only smollm2 --ways "none;full 500k"
    python scripts/bench/heal.py --table                                     # only results/heal/heal.md and heal.svg

    excess   log ppl - log ppl of the dense model, on text that nothing was trained on
    share    of the excess of the pruned model without healing that a way removes

Calibration and training are on the first 85 % of the C4 sample's documents (and books out of copyright), C4's
perplexity on the rest, WikiText-2's on its test text. heal_ways.yaml names the ways. Checkpoints of unfinished ways lie
in --work, finished models too.
"""

import argparse
import lzma
import math
import sys
from pathlib import Path

import yaml

from oneshot import report
from oneshot.pipeline.attempt import attempt
from oneshot.report import figures, table
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text
from oneshot.settings import parse

ROOT = Path(__file__).parents[2]
SHARE = 0.85  # of the C4 sample to train on
BASE = {
    "smollm2": ["--model", "smollm2", "--seqlen", "512", "--eval-seqlen", "512", "--nsamples", "64",
                "--eval-windows", "64"],
    "demo": ["--model", "demo", "--seqlen", "256", "--nsamples", "64", "--eval-windows", "64"],
}
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
    p.add_argument("--table", action="store_true", help="run nothing")
    args = p.parse_args(argv)
    return exit_code(lambda: run(args), interrupted=lambda: "the same command continues")


def run(args: argparse.Namespace) -> None:
    """Run what is missing, then write table and picture."""
    if not args.table:
        texts = make_texts(args.shared / "data", args.work)
        for name in args.only.split(","):
            for seed in args.seeds.split(","):
                for way in ["dense", *args.ways.split(";")]:
                    print(f"{name} seed {seed}: {way}", file=sys.stderr)
                    one(args, name, seed, way, texts)
    write_text(page(args.out), args.out / "heal.md")
    records = [record for _, record in rows(args.out) if figures.curves(record)]
    figures.save(figures.fig_healing(records), args.out / "heal.svg")


def make_texts(data: Path, work: Path) -> list[str]:
    """The flags that name the texts, which are written into `work` where they are not there."""
    work.mkdir(parents=True, exist_ok=True)
    lines = (data / "c4_sample.jsonl").read_text(encoding="utf-8").splitlines()
    first = round(SHARE * len(lines))
    for name, part in {"c4_train.jsonl": lines[:first], "c4_held.jsonl": lines[first:]}.items():
        write_text("\n".join(part) + "\n", work / name)
    if not (work / "books.txt").is_file():
        with lzma.open(data / "books_public_domain.txt.xz", "rt", encoding="utf-8") as books:
            write_text(books.read(), work / "books.txt")
    return ["--calibration", str(work / "c4_train.jsonl"), "--evaluate", str(data / "wikitext2_test.txt"), "--evaluate",
            f"c4={work / 'c4_held.jsonl'}"]


def one(args: argparse.Namespace, name: str, seed: str, way: str, texts: list[str]) -> None:
    """One run; raises ValueError if it failed."""
    flags = [*BASE[name], "--seed", seed, "--no-layer-errors", "--device", "cpu", *texts]
    if way == "dense":
        own = ["--method", "dense"]
    else:
        data = f"0.7*{args.work / 'c4_train.jsonl'},0.3*{args.work / 'books.txt'}"
        own = ["--no-dense", "--save", str(args.work / f"{name}-{seed}-{way}".replace(" ", "_").replace(",", "+"))]
        for flag, value in WAYS[way].items():
            own += [f"--{flag}", str(value)]
            own += ["--heal-data", data] * (flag == "heal" and any(part in str(value) for part in ("full", "lora")))
    [cfg] = parse([*flags, *own, "--results", str(args.out / name)])
    if attempt(cfg)["status"] != "finished":
        raise ValueError(f"{way}: failed, see the record in {args.out / name}")


def rows(out: Path) -> list[tuple[str, dict]]:
    """(model, record) of all finished runs."""
    files = sorted(out.glob("*/*.json"))
    found = [(file.parent.name, report.read(file)) for file in files if not file.name.endswith("-failed.json")]
    return [(model, record) for model, record in found if record.get("status") == "finished"]


def page(out: Path) -> str:
    """The table of all records in the folder `out`."""
    found, lines = rows(out), []
    metrics = ("wikitext2_test/ppl", "c4/ppl")
    heads = ["model", "seed", "way", "tokens", *(f"{m.split('/')[0]} ppl" for m in metrics),
             *(f"share, {m.split('/')[0]}" for m in metrics), "held-out loss", "tokens/s", "minutes", "peak GiB"]
    for model, record in sorted(found, key=lambda row: (row[0], seed_of(row[1]), order(row[1]))):
        same = [r for m, r in found if m == model]
        dense = next((r for r in same if r["settings"]["method"] == "dense"), None)
        plain = next((r for r in same if r["settings"]["method"] != "dense" and not r["heal"]
                      and not r["settings"].get("shrink") and seed_of(r) == seed_of(record)
                      and not any(b.get("heal") for b in r["blocks"])), None)
        info = next((i for i in record["heal"].values() if "attempts" in i), {})
        loss = f"{info['held_out_before']:.3f} to {info['held_out_after']:.3f}" if info else ""
        shares = [share(record, plain, dense, m) for m in metrics]
        lines.append([model, str(seed_of(record)), way_of(record), f"{info['tokens']:,}" if info else "",
                      *(f"{record['metrics'][m]:.2f}" for m in metrics), *shares, loss,
                      f"{info['tokens_per_second']:.0f}" if info.get("tokens_per_second") else "",
                      f"{record['seconds']['prune'] / 60:.1f}", f"{record['peak_memory_bytes'] / 2**30:.1f}"])
    about = sorted({f"commit {e['commit']}{' (dirty)' * bool(e['dirty'])}, {e['device']}, {e['threads']} threads, "
                    f"torch {e['torch']}, transformers {e['transformers']}"
                    for e in (r["environment"] for _, r in found)})
    shown = table.render(heads, lines, "markdown")
    told = f"Written by `python scripts/bench/heal.py`; {'; '.join(about)}. 64 windows of each text."
    return (f"# Healing on text\n\n{told} share: of the excess log-perplexity of the pruned model without healing that "
            "is gone. The held-out loss is KL to the dense model, nats, on text of the training mixture that was not "
            f"trained on.\n\n{shown}\n![held-out loss against tokens](heal.svg)\n")


def seed_of(record: dict) -> int:
    """The calibration seed."""
    return record["settings"]["seed"]


def order(record: dict) -> tuple:
    """Dense first, then without healing, then by the tokens trained on."""
    info = next((i for i in record["heal"].values() if "attempts" in i), {})
    return record["settings"]["method"] != "dense", info.get("tokens", 0), way_of(record)


def way_of(record: dict) -> str:
    """A way as the table names it."""
    settings = record["settings"]
    if settings["method"] == "dense":
        return "dense"
    made = [f"shrink {settings['shrink']:g}"] if settings.get("shrink") else []
    made += [f"{settings['method']} {settings['pattern']}"] if settings["pattern"] != "dense" else []
    own = settings.get("heal") if settings.get("heal") not in (None, "none") else None
    loss = settings.get("heal_loss")
    return " ".join(made) + (f", {own}" if own else "") + (f" ({loss})" if loss else "")


def share(record: dict, plain: dict | None, dense: dict | None, metric: str) -> str:
    """The share of the excess of `plain` that a record's way removes, as text."""
    if not plain or not dense or record in (plain, dense):
        return ""
    excess = [math.log(r["metrics"][metric] / dense["metrics"][metric]) for r in (plain, record)]
    return f"{1 - excess[1] / excess[0]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
