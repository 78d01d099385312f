"""Tables from the run records: results/tables.md, and the one in the README.

    python scripts/tables.py            # write them
    python scripts/tables.py --check    # exit 1 if they are stale

A pure function of results/runs/*.json and results/packed.json. Text outside the markers is left alone.
"""

import argparse
import json
import sys
from pathlib import Path

from oneshot import report

ROOT = Path(__file__).parent.parent
START, END = "<!-- {}: written by scripts/tables.py -->", "<!-- {}: end -->"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "results" / "runs")
    p.add_argument("--root", type=Path, default=ROOT, help="where README.md and results/tables.md are")
    p.add_argument("--check", action="store_true", help="write nothing, exit 1 if a file would change")
    args = p.parse_args(argv)
    records = [report.read(f) for f in sorted(args.runs.glob("*.json"))]
    tables, stale = args.root / "results" / "tables.md", []
    sections = [(args.root / "README.md", {"pruning": readme_table(records)}),
                (tables, {"pruning": all_tables(records), **packed_section(tables.with_name("packed.json"))})]
    for file, texts in sections:
        old = new = file.read_text() if file.exists() else ""
        for name, text in texts.items():
            new = between(new, name, text)
        if new != old:
            stale.append(file)
            if not args.check:
                report.write_text(new, file)
    print("\n".join(f"{'stale' if args.check else 'written'}: {f}" for f in stale) or "up to date")
    return 1 if stale and args.check else 0


def between(text, name, content):
    """`text` with what stands between the markers of `name` replaced; the markers are added where there are none."""
    start, end = START.format(name), END.format(name)
    section = f"{start}\n{content}\n{end}"
    if start not in text:
        return text + ("\n" if text and not text.endswith("\n\n") else "") + section + "\n"
    return text[: text.index(start)] + section + text[text.index(end) + len(end) :]


def groups(records):
    """{(model, calibration, metric header): records}: what one table compares."""
    found = {}
    for record in records:
        data = record["data"]["calibration"]
        for column in report.columns([record]):
            key = (record["model"]["name"], data["source"].split(";")[0] if data else None, column.header)
            found.setdefault(key, []).append(record)
    dense = {key: rows for key, rows in found.items() if key[1] is None}
    return {key: [*dense.get((key[0], None, key[2]), []), *rows] for key, rows in found.items() if key[1] is not None}


def readme_table(records):
    """One table per model and text: methods down, patterns across."""
    parts = [where(records)]
    for (model, calibration, header), rows in groups(records).items():
        parts.append(f"**{model}**, calibrated on {calibration}\n\n{report.pivot(rows, header, 'markdown')}")
    return "\n\n".join(parts) if records else "no runs yet"


def all_tables(records):
    """The same, then every run as a row."""
    return "\n\n".join(["# Results", readme_table(records), "## Every run", report.table(records, "markdown")])


def packed_section(file):
    """{"packed": text} of what packed_runs.py measured; nothing where it has not run."""
    if not file.exists():
        return {}
    out = json.loads(file.read_text())
    e, s = out["environment"], out["settings"]
    lines = [
        "## Packed 2:4 checkpoints", "",
        f"`scripts/packed_runs.py`: {s['method']}, seed {s['seed']}; {e['device']}, threads {e['threads']}, torch "
        f"{e['torch']}, transformers {e['transformers']}, commit {e['commit']}{' (dirty)' if e['dirty'] else ''}. "
        "Stored in the dtype, computed in float32; the window stands behind the @. Bytes are those of the pruned linears "
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
    return {"packed": "\n".join(lines)}


def where(records):
    """One line on how the numbers came about."""
    def values(key):
        return ", ".join(sorted({str(r["environment"][key]) for r in records}))
    seeds = ", ".join(sorted({str(r["settings"]["seed"]) for r in records if "seed" in r["settings"]}))
    return (f"Perplexity; the window stands behind the @. Seed {seeds}, {values('device')}, torch {values('torch')}, "
            f"transformers {values('transformers')}, commit {values('commit')}; one record a run in `results/runs`.")


if __name__ == "__main__":
    sys.exit(main())
