"""One self-contained HTML page of any number of run records: warnings, tables, pictures, every layer.

page.html.j2 has the structure and the texts of the page, page.css its looks; this file computes what they show of all
runs together, details.py what they show of each. All that the template prints is made one printable line
(columns.clean) and escaped; only tables and pictures, which are HTML already, are `Markup`.
"""

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ..runtime.files import write_text
from . import said, task_table
from .columns import (
    clean,
    columns,
    identity,
    is_dense,
    is_pruned,
    is_rounded,
    is_task,
    labels,
    method_of,
    model_names,
    ordered,
    pattern_of,
)
from .details import details, fact
from .figures import svg
from .pictures import pictures
from .tables import pivot, rows, table


def html(records: list[dict], title: str | None = None) -> str:
    """One self-contained page about one run or several: no script, nothing loaded from elsewhere.

    Where matplotlib is missing, the page says so in place of the pictures. Raises ValueError if there are no records.
    """
    if not records:
        raise ValueError("no run records to make a page of")
    records = ordered(records)
    names = labels(records)
    return _template().render(
        title=title or _title(records, names), subtitle=_subtitle(records), warnings=_warnings(records, names),
        results=Markup(table(records, "html")), legend=_legend(records),
        tasks=Markup(task_table.table(records, "html")), said=Markup(said.table(records, "html")),
        pivots=_pivots(records), pictures=_pictures(records),
        runs=[details(record) | {"name": name} for record, name in zip(records, names, strict=True)])


def of_one(record: dict) -> str:
    """The page of a single run."""
    return html([record])


def write_html(records: list[dict], path: str | Path, title: str | None = None) -> None:
    """Write the page of `html` to `path`: whole or not at all."""
    write_text(html(records, title), path)


@functools.cache
def _template() -> Template:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, finalize=lambda x: x if isinstance(x, Markup) else clean(x),
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["fact"] = lambda x: Markup.escape(fact(x))  # Markup: `clean` would take its thin spaces
    return environment.get_template("page.html.j2")


def _title(records, names):
    models = list(model_names(records).values())
    what = names[0] if len(records) == 1 else f"{len(records)} pruning runs compared"
    return f"{models[0]}: {what}" if len(models) == 1 else what


def _subtitle(records):
    """How many models, methods and patterns (of one run its id), the dates, the versions."""
    pruned = [r for r in records if not is_dense(r)]
    counts = {"model": {identity(r) for r in records}, "method": {method_of(r) for r in pruned},
              "pattern": {pattern_of(r) for r in pruned}}
    what = ", ".join(f"{len(s)} {name}{'s' * (len(s) > 1)}" for name, s in counts.items() if s)
    environments = [r.get("environment") or {} for r in records]
    dates = sorted({str(e["date"])[:10] for e in environments if e.get("date")})
    versions = sorted({str(e["oneshot"]) for e in environments if e.get("oneshot")})
    return " · ".join([what if len(records) > 1 else str(records[0].get("run_id")),
                       *([" to ".join(dict.fromkeys([dates[0], dates[-1]]))] if dates else []),
                       *([f"oneshot {', '.join(versions)}"] if versions else [])])


def _warnings(records, names):
    """[(warning, the runs it came from)]: each warning once; a run that did not finish has one more."""
    found = {}
    for record, name in zip(records, names, strict=True):
        status = record.get("status")
        own = [f"not finished: status is {status}"] if status != "finished" else []
        for text in dict.fromkeys([*own, *map(clean, record.get("warnings") or [])]):
            found.setdefault(text, []).append(name)
    return [(text, ", ".join(runs[:8]) + (f" and {len(runs) - 8} more" if len(runs) > 8 else ""))
            for text, runs in found.items()]


def _legend(records):
    """Which explanations the table of results needs: {name: whether}."""
    heads = [c.header for c in columns(records) if not is_task(records, c)]
    found = rows(records)
    compared = [k for k in found[0] if k.removesuffix(" / dense").removesuffix(" - dense") in heads]
    return {"bytes": any(row["bytes"] is not None for row in found), "rounded": any(map(is_rounded, records)),
            "windows": any(" @" in h for h in heads), "ratio": any(k.endswith(" / dense") for k in compared),
            "difference": any(k.endswith(" - dense") for k in compared)}


def _pivots(records):
    """Methods down and patterns across, one table for each metric, if there are several of both."""
    pruned = [r for r in records if is_pruned(r)]
    if len({method_of(r) for r in pruned}) < 2 or len({pattern_of(r) for r in pruned}) < 2:
        return []
    shown = [r for r in records if not is_rounded(r)]
    return [Markup(pivot(shown, c.header, "html")) for c in columns(shown)
            if "stderr" not in c.metric and not is_task(records, c)]


def _pictures(records):
    """The pictures ready for the page; where matplotlib is missing, one entry that says so ("missing")."""
    try:
        return [{"heading": p.heading, "caption": p.caption, "svg": Markup(svg(p.figure, f"f{i}-"))}
                for i, p in enumerate(pictures(records))]
    except ImportError as error:
        return [{"heading": "Pictures left out", "missing": str(error)}]
