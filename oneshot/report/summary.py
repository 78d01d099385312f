"""What a command prints when it is done: tables, findings, warnings, and where the records and the page are."""

import hashlib
import re
from pathlib import Path

from . import said, tables, task_table
from .columns import identity, is_dense, is_pruned, method_of, pattern_of, percent
from .page import write_html
from .storage import dense_in_blocks, left_dense


def line(record: dict) -> str:
    """One run in one line, for progress: "wanda 2:4: builtin/ppl 64.4 (12 s)"."""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
    return f"{asked(record)}: {metrics or 'done'} ({record['seconds']['total']:.0f} s)"


def asked(record: dict) -> str:
    """What was asked for: method and pattern."""
    return "dense" if is_dense(record) else f"{method_of(record)} {pattern_of(record)}"


def text(records: list[dict], results: Path) -> str:
    """Everything a command prints at its end. Also writes the page of the records, into the folder `results`."""
    ids = [r["run_id"] for r in records]
    name = ids[0] if len(ids) == 1 else f"compare-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:8]}"
    page = results / f"{name}.html"
    write_html(records, page)
    lines = [t for t in (tables.table(records), task_table.table(records), said.table(records)) if t]
    lines += dense_lines(records)
    for record in records:
        lines += [f"{asked(record)}: {text}" for text in findings(record)]
    where = results / f"{ids[0]}.json" if len(ids) == 1 else f"{len(ids)} files in {results}"
    return "\n".join([*lines, *warnings(records), f"records: {where}", f"report: {page}"])


def dense_lines(records: list[dict]) -> list[str]:
    """What stays dense in every pruned run of a model, with its share: one line a model."""
    found = {}
    for record in filter(is_pruned, records):
        parts = [f"{percent(share)} {reason}" for reason, share in left_dense(record)]
        if parts:
            whole = percent(sum(share for _, share in left_dense(record)))
            inside = f", {percent(blocks)} of the blocks'" if (blocks := dense_in_blocks(record)) is not None else ""
            found.setdefault(identity(record),
                             f"left dense: {whole} of the model's weights{inside} ({', '.join(parts)})")
    return list(found.values())


def findings(record: dict) -> list[str]:
    """The main results of measuring damage and sensitivity, one line each."""
    worse = (record.get("damage") or {}).get("found") or []
    most = [f"{row['name']} (+{row['loss_increase']:.3g})" for row in record.get("sensitivity") or []][:5]
    return worse[:3] + [f"... and {len(worse) - 3} more slices of the text, in the report"] * (len(worse) > 3) + [
        f"most sensitive, loss increase in nats: {', '.join(most)}"] * bool(most)


def warnings(records: list[dict]) -> list[str]:
    """One line for each kind of warning: warnings that differ only in numbers (block after block) share a line."""
    kinds = {}
    for record in records:
        for text in record["warnings"]:
            kinds.setdefault(re.sub(r"\d[\d.]*", "#", text), []).append((text, asked(record)))
    lines = []
    for met in kinds.values():
        texts, runs = (list(dict.fromkeys(part)) for part in zip(*met, strict=True))
        like = f"; {len(texts) - 1} more like it, in the report" if len(texts) > 1 else ""
        lines.append(f"warning: {texts[0]} ({'all' if len(runs) == len(records) else ', '.join(runs)}{like})")
    return lines[:12] + [f"... and {len(lines) - 12} more kinds of warnings, in the report"] * (len(lines) > 12)
