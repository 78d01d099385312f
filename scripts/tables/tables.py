"""Tables from the run records: results/tables.md, tables.csv and runs.csv, and those in the README.

    python scripts/tables/tables.py            # write them
    python scripts/tables/tables.py --check    # exit 1 if they are stale

    tables.csv    a line per model, calibration text, metric, method and pattern: mean, standard deviation over seeds
    runs.csv      a line per run, numbers in full

A pure function of results/runs/*.json, results/real/*.json, results/smollm2/*.json, results/best/*.json,
results/heal/*/*.json, results/bench/packed.json and results/bench/cpu_decode.json. Text outside the markers is left
alone.
"""

import argparse
import csv
import io
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import best_rows
import best_table
import cpu_table
import heal_rows
import heal_table
import integers_table

from oneshot import report
from oneshot.report import said, section, table, tables, task_table
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

ROOT = Path(__file__).parents[2]
PROGRAM = "scripts/tables/tables.py"
REAL = ("smollm2",)  # healed models that the README shows; heal.md has all
Groups = dict[tuple[str, str, report.Column], list[dict]]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds something stale."""
    p = Parser(prog=f"python {PROGRAM}", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "results" / "runs")
    p.add_argument("--root", type=Path, default=ROOT, help="where README.md and results/tables.md are")
    p.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file would change")

    def work():
        args = p.parse_args(argv)
        stale = write_all(read(args.runs), args.root, args.check)
        print("\n".join(f"{'stale' if args.check else 'written'}: {f}" for f in stale) or "up to date")
        return 1 if stale and args.check else 0
    return exit_code(work)


def write_all(records: list[dict], root: Path, check: bool) -> list[Path]:
    """Write what is stale, or only find it if `check`. The stale files."""
    stale = []
    texts = {"README.md": lambda old: readme(old, records, root),
             "results/tables.md": lambda old: with_packed(replaced(old, "pruning", all_tables(records)), root),
             "results/tables.csv": lambda old: tables_csv(records),
             "results/runs.csv": lambda old: tables.table(records, "csv")}
    for name, content in texts.items():
        file = root / name
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        if shortened(new := content(old)) != shortened(old):
            stale.append(file)
            if not check:
                write_text(new, file)
    return stale


def readme(text: str, records: list[dict], root: Path) -> str:
    """The README's `text` with all its tables."""
    text = with_runs(text, records)
    for add in (with_real, with_best, with_smollm2, with_heal, with_cpu, with_integers):
        text = add(text, root)
    return text


def shortened(text: str) -> str:
    """The text, its numbers to 12 digits: in the last ones sums differ from one Python to the next."""
    return re.sub(r"\d+\.\d{9,}(e[-+]?\d+)?", lambda number: f"{float(number[0]):.12g}", text)


def replaced(text: str, name: str, content: str) -> str:
    """`text` with its section `name` written anew."""
    return section.replace(text, name, PROGRAM, content)


def read(folder: Path) -> list[dict]:
    """The records in a folder, in the order of their file names. Raises ValueError when there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"--runs {folder}: no such folder; scripts/sweep/sweep.py writes one")
    return [report.read(f) for f in sorted(folder.glob("*.json"))]


def groups(records: Iterable[dict]) -> Groups:
    """{(model, calibration, report.Column): finished records}: what one table compares; what looked at no calibration
    text (dense, rounded, magnitude) in each."""
    texts, free = {}, {}
    for record in records:
        if record.get("status") != "finished":
            continue
        calibration, model = (record.get("data") or {}).get("calibration"), record["model"]["name"]
        if report.is_pruned(record) and calibration:
            texts.setdefault((model, calibration["source"].split(";")[0]), []).append(record)
        else:
            free.setdefault(model, []).append(record)
    for model in [model for model in free if not any(model == own for own, _ in texts)]:
        texts[model, "nothing"] = []
    found = {}
    for (model, text), pruned in texts.items():
        rows = [*free.get(model, []), *pruned]
        for column in report.columns(rows):
            measured = [r for r in rows if report.value(r, column) is not None]
            if "stderr" not in column.metric and not all(map(report.is_dense, measured)):
                found[model, text, column] = measured
    return found


def readme_table(records: list[dict], folder: str = "runs") -> str:
    """One table per model and text: methods down, patterns across. folder: of the records, in results/."""
    told = where([r for r in records if kinds(r) != {"task"}], folder)
    parts = [f"Perplexity; the window stands behind the @. {told}"]
    for (model, calibration, column), rows in groups(records).items():
        if report.is_task(rows, column):
            continue
        text = f"; measured on {column.text or windows(rows, column)}"
        pivot = tables.pivot(rows, column.metric, "markdown")
        parts.append(f"**{model}**, calibrated on {calibration}{text}\n\n{pivot}")
    return "\n\n".join(parts) if records else "no runs yet"


def all_tables(records: list[dict]) -> str:
    """The same, then the tasks, then every other run as a row."""
    parts = ["# Results", readme_table(records), *tasks_section(records)]
    every = [r for r in records if kinds(r) != {"task"}]
    return "\n\n".join([*parts, "## Every run", tables.table(every, "markdown")])


def kinds(record: dict) -> set[str]:
    """What a run measured: of {"task", "text"}."""
    return {"task" if report.is_task([record], column) else "text" for column in report.columns([record])}


def tasks_section(records: list[dict]) -> list[str]:
    """[heading, how they were measured, table] of the runs that measured lm-eval tasks; [] where none did."""
    measured = [r for r in records if "task" in kinds(r)]
    if not measured:
        return []
    texts = {r["data"]["calibration"]["source"].split(";")[0] for r in measured if r["data"]["calibration"]}
    versions = {str(r["environment"].get("lm_eval")) for r in measured}
    limits = {r["settings"].get("task_limit") for r in measured} - {None}
    told = [f"lm-eval {', '.join(sorted(versions))}, model in memory", f"calibrated on {', '.join(sorted(texts))}"]
    told += [f"at most the first {', '.join(map(str, sorted(limits)))} documents of a task"] * bool(limits)
    return ["## Tasks", f"{'; '.join(told)}. {where(measured)}", task_table.table(measured, "markdown")]


def with_runs(text: str, records: list[dict]) -> str:
    """The README's `text` with its table of the runs on models that are known elsewhere; all are in tables.md."""
    return replaced(text, "pruning", readme_table([r for r in records if (r.get("model") or {}).get("name") != "demo"]))


def with_real(text: str, root: Path) -> str:
    """`text` with the section of the sweep on a real model, where its records are: methods down, patterns across."""
    folder = root / "results" / "real"
    if not folder.is_dir():
        return text
    records = read(folder)
    stored = all(r["settings"].get("compute") == "stored" for r in records)
    note = "\n\nComputed in the dtype of the weights (`--compute stored`)." if stored else ""
    return replaced(text, "real", readme_table(records, "real").rstrip() + note)


def with_best(text: str, root: Path) -> str:
    """`text` with the section of what best.py measured, where that has run."""
    rows = best_rows.shown(root / "results" / "best")
    return replaced(text, "best", best_table.headline(rows)) if rows else text


def with_smollm2(text: str, root: Path) -> str:
    """`text` with the section of what `make smollm2` found, where its records are: the table, and what each says."""
    folder = root / "results" / "smollm2"
    if not folder.is_dir():
        return text
    records = read(folder)
    how = f"{where(records, 'smollm2')} {texts(records)}"
    return replaced(text, "smollm2", "\n\n".join([how, tables.table(records, "markdown"),
                                                   said.table(records, "markdown").rstrip()]))


def with_heal(text: str, root: Path) -> str:
    """`text` with the section of what healing on text gives back, where heal.py has run."""
    found = [row for row in heal_rows.in_order(root / "results" / "heal") if row[0] in REAL]
    if not found:
        return text
    return replaced(text, "heal", f"{heal_table.told(found)}\n\n{heal_table.lines_of(found).rstrip()}")


def with_cpu(text: str, root: Path) -> str:
    """`text` with the section of tokens per second on a CPU, where cpu_decode.py has run."""
    lines = cpu_table.lines(root / "results" / "bench" / "cpu_decode.json")
    return replaced(text, "cpu", lines) if lines else text


def with_integers(text: str, root: Path) -> str:
    """`text` with the section of quality at equal bytes, where integers.py has run."""
    found = integers_table.lines(root / "results" / "bench")
    return replaced(text, "integers", found) if found else text


def with_packed(text: str, root: Path) -> str:
    """`text` with the section of what packed.py measured, where that has run."""
    file = root / "results" / "bench" / "packed.json"
    return replaced(text, "packed", packed_section(json.loads(file.read_text()))) if file.exists() else text


def packed_section(out: dict) -> str:
    """What packed.py measured, as its JSON holds it."""
    e, s = out["environment"], out["settings"]
    head = ["model", "dtype", "text", "dense ppl", "packed ppl", "relative difference", "dense KiB", "packed KiB",
            "ratio", "verified"]
    body = []
    for row in out["models"]:
        size = [f"{row['bytes'][form] / 1024:.0f}" for form in ("dense", "packed")]
        proof = "NO" if any(row["faults"].values()) else f"{row['tensors_compared']} equal"
        body += [[row["model"], row["dtype"], f"{p['text']} @{p['window']}", f"{p['dense']:.4f}", f"{p['packed']:.4f}",
                  f"{p['relative_difference']:.1e}", *size, f"{row['ratio']:.4f}", proof] for p in row["perplexity"]]
    return "\n".join([
        "## Packed 2:4 checkpoints", "",
        f"`scripts/bench/packed.py`: {s['method']}, seed {s['seed']}; {e['device']}, threads {e['threads']}, torch "
        f"{e['torch']}, transformers {e['transformers']}, commit {e['commit']}{' (dirty)' if e['dirty'] else ''}. "
        "Stored in the dtype, computed in float32; the window stands behind the @. Bytes: those of the pruned linears "
        "in the files, metadata included. Verified: `oneshot verify --twin` on every tensor.", "",
        table.render(head, body, "markdown", text={"model", "dtype", "text", "verified"}).rstrip()])


def tables_csv(records: list[dict]) -> str:
    """Every number of the tables in a line of its own: mean, sample standard deviation and number of runs."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["model", "calibration", "metric", "method", "pattern", "mean", "std", "runs"])
    for (model, calibration, column), rows in groups(records).items():
        cells = {}
        for record, series in zip(rows, report.series(rows), strict=True):
            cells.setdefault((series, report.pattern_of(record)), []).append(report.value(record, column))
        for (series, pattern), xs in cells.items():
            std = statistics.stdev(xs) if len(xs) > 1 else None
            lines.writerow([model, calibration, column.header, series, pattern, statistics.fmean(xs), std, len(xs)])
    return out.getvalue()


def windows(records: Iterable[dict], column: report.Column) -> str:
    """How many windows (or documents) of its text a column was measured on: "64 windows"; "" where no record says."""
    found = {(record.get("metric_info") or {}).get(column.metric, {}).get("windows") for record in records
             if report.value(record, column) is not None} - {None}
    return f"{' or '.join(map(str, sorted(found)))} windows" if found else ""


def texts(records: list[dict]) -> str:
    """On how many windows each text was measured, a sentence; "" where no record says."""
    told = [f"{column.header}: {found}" for column in report.columns(records)
            if column.metric.endswith("/ppl") and (found := windows(records, column))]
    return f"{'; '.join(told)}." if told else ""


def where(records: Iterable[dict], folder: str = "runs") -> str:
    """One line on how the numbers came about. folder: of the records, in results/."""
    records = [r for r in records if r.get("status") == "finished"]

    def values(key):
        return ", ".join(sorted({str(r["environment"][key]) for r in records}))
    seeds = ", ".join(sorted({str(r["settings"]["seed"]) for r in records if "seed" in r["settings"]}, key=int))
    several = " Where there are several seeds: mean ± standard deviation." * (seeds.count(",") > 0)
    return (f"Seed {seeds}, {values('device')}, torch {values('torch')}, "
            f"transformers {values('transformers')}, commit {values('commit')}; one record a run in `results/{folder}`."
            + several)


if __name__ == "__main__":
    sys.exit(main())
