"""Tables from the run records: results/tables.md, tables.csv and runs.csv, and those in the README.

    python scripts/tables.py            # write them
    python scripts/tables.py --check    # exit 1 if they are stale

    tables.csv    a line per model, calibration text, metric, method and pattern: mean, standard deviation over seeds
    runs.csv      a line per run, numbers in full

A pure function of results/runs/*.json, results/best/*.json and results/packed.json. Text outside the markers is left
alone.
"""

import argparse
import csv
import io
import json
import re
import statistics
import sys
from pathlib import Path

import _best_table
import best

from oneshot import report
from oneshot.pipeline import run
from oneshot.report import tables, task_table
from oneshot.settings import flags

ROOT = Path(__file__).parent.parent
START, END = "<!-- {}: written by scripts/tables.py -->", "<!-- {}: end -->"


def main(argv=None):
    p = flags.Parser(prog="python scripts/tables.py", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "results" / "runs")
    p.add_argument("--root", type=Path, default=ROOT, help="where README.md and results/tables.md are")
    p.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file would change")
    try:
        args = p.parse_args(argv)
        records = read(args.runs)
        stale = write_all(records, args.root, args.check)
    except (ValueError, OSError) as error:
        return run.fail(run.one_line(error))
    print("\n".join(f"{'stale' if args.check else 'written'}: {f}" for f in stale) or "up to date")
    return 1 if stale and args.check else 0


def write_all(records, root, check):
    """Write what is stale, or only find it if `check`. The stale files."""
    stale = []
    texts = {"README.md": lambda old: with_best(between(old, "pruning", readme_table(records)), root),
             "results/tables.md": lambda old: with_packed(between(old, "pruning", all_tables(records)), root),
             "results/tables.csv": lambda old: tables_csv(records),
             "results/runs.csv": lambda old: tables.table(records, "csv")}
    for name, content in texts.items():
        file = root / name
        old = file.read_text(encoding="utf-8") if file.exists() else ""
        if shortened(new := content(old)) != shortened(old):
            stale.append(file)
            if not check:
                report.write_text(new, file)
    return stale


def shortened(text):
    """The text, its numbers to 12 digits: in the last ones sums differ from one Python to the next."""
    return re.sub(r"\d+\.\d{9,}(e[-+]?\d+)?", lambda number: f"{float(number[0]):.12g}", text)


def read(folder):
    """The records in a folder, in the order of their file names. Raises ValueError when there is no such folder."""
    if not folder.is_dir():
        raise ValueError(f"--runs {folder}: no such folder; scripts/sweep.py writes one")
    return [report.read(f) for f in sorted(folder.glob("*.json"))]


def between(text, name, content):
    """`text` with what stands between the markers of `name` replaced; the markers are added where there are none."""
    start, end = START.format(name), END.format(name)
    section = f"{start}\n{content}\n{end}"
    if start not in text:
        return text + ("\n" if text and not text.endswith("\n\n") else "") + section + "\n"
    return text[: text.index(start)] + section + text[text.index(end) + len(end) :]


def groups(records):
    """{(model, calibration, report.Column): finished records}: what one table compares, the dense (and rounded) runs
    in each."""
    texts, dense = {}, {}
    for record in records:
        if record.get("status") != "finished":
            continue
        calibration, model = (record.get("data") or {}).get("calibration"), record["model"]["name"]
        if not report.is_pruned(record):  # what is dense or rounded was not calibrated
            dense.setdefault(model, []).append(record)
        else:
            text = calibration["source"].split(";")[0] if calibration else "nothing"
            texts.setdefault((model, text), []).append(record)
    found = {}
    for (model, text), pruned in texts.items():
        rows = [*dense.get(model, []), *pruned]
        for column in report.columns(rows):
            measured = [r for r in rows if report.value(r, column) is not None]
            if "stderr" not in column.metric and not all(map(report.is_dense, measured)):
                found[model, text, column] = measured
    return found


def readme_table(records):
    """One table per model and text: methods down, patterns across."""
    parts = ["Perplexity; the window stands behind the @. " + where(r for r in records if kinds(r) != {"task"})]
    for (model, calibration, column), rows in groups(records).items():
        if report.is_task(rows, column):
            continue
        text = f"; measured on {column.text}" * bool(column.text)
        table = tables.pivot(rows, column.metric, "markdown")
        parts.append(f"**{model}**, calibrated on {calibration}{text}\n\n{table}")
    return "\n\n".join(parts) if records else "no runs yet"


def all_tables(records):
    """The same, then the tasks, then every other run as a row."""
    parts = ["# Results", readme_table(records), *tasks_section(records)]
    every = [r for r in records if kinds(r) != {"task"}]
    return "\n\n".join([*parts, "## Every run", tables.table(every, "markdown")])


def kinds(record):
    """What a run measured: of {"task", "text"}."""
    return {"task" if report.is_task([record], column) else "text" for column in report.columns([record])}


def tasks_section(records):
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


def with_best(text, root):
    """`text` with the section of what best.py measured, where that has run."""
    rows = _best_table.shown(root / "results" / "best", best.recipes())
    return between(text, "best", _best_table.headline(rows)) if rows else text


def with_packed(text, root):
    """`text` with the section of what packed_runs.py measured, where that has run."""
    file = root / "results" / "packed.json"
    return between(text, "packed", packed_section(file)) if file.exists() else text


def packed_section(file):
    """What packed_runs.py measured."""
    out = json.loads(file.read_text())
    e, s = out["environment"], out["settings"]
    lines = [
        "## Packed 2:4 checkpoints", "",
        f"`scripts/packed_runs.py`: {s['method']}, seed {s['seed']}; {e['device']}, threads {e['threads']}, torch "
        f"{e['torch']}, transformers {e['transformers']}, commit {e['commit']}{' (dirty)' if e['dirty'] else ''}. "
        "Stored in the dtype, computed in float32; the window stands behind the @. Bytes: those of the pruned linears "
        "in the files, metadata included. Verified: `oneshot.verify --twin` on every tensor.", "",
        "| model | dtype | text | dense ppl | packed ppl | relative difference | dense KiB | packed KiB | ratio "
        "| verified |", "|---|---|---|--:|--:|--:|--:|--:|--:|---|"]
    for row in out["models"]:
        size = " | ".join(f"{row['bytes'][form] / 1024:.0f}" for form in ("dense", "packed"))
        proof = "NO" if any(row["faults"].values()) else f"{row['tensors_compared']} equal"
        for p in row["perplexity"]:
            ppl = f"{p['dense']:.4f} | {p['packed']:.4f} | {p['relative_difference']:.1e}"
            lines.append(f"| {row['model']} | {row['dtype']} | {p['text']} @{p['window']} | {ppl} | {size} | "
                         f"{row['ratio']:.4f} | {proof} |")
    return "\n".join(lines)


def tables_csv(records):
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


def where(records):
    """One line on how the numbers came about."""
    records = [r for r in records if r.get("status") == "finished"]

    def values(key):
        return ", ".join(sorted({str(r["environment"][key]) for r in records}))
    seeds = ", ".join(sorted({str(r["settings"]["seed"]) for r in records if "seed" in r["settings"]}, key=int))
    several = " Where there are several seeds: mean ± standard deviation." * (seeds.count(",") > 0)
    return (f"Seed {seeds}, {values('device')}, torch {values('torch')}, "
            f"transformers {values('transformers')}, commit {values('commit')}; one record a run in `results/runs`."
            + several)


if __name__ == "__main__":
    sys.exit(main())
