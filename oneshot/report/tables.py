"""Tables of records: a line a run, or methods down and patterns across; for terminals, markdown, HTML and csv."""

import csv
import io
import math
from html import escape

from . import accuracy
from .record import (
    clean,
    columns,
    higher_is_better,
    identity,
    is_dense,
    is_task,
    method_of,
    model_names,
    number,
    ordered,
    pattern_key,
    pattern_of,
    series,
    value,
    variants,
)

WIDTH = 120  # of a table in the terminal; what is wider goes on below


def rows(records):
    """One dict per run, in the order of `ordered`, all with the same keys; None where a run has no value.

    Keys: run_id, model, method, pattern, variant; per column its header and, where a model has a dense run
    beside pruned ones, "HEADER / dense" (perplexity: the ratio) or "HEADER - dense" (others: the difference);
    of a task also "HEADER ±" and "HEADER - dense ±" (standard errors, see accuracy.py);
    sparsity (share of zeros in what was prunable), bytes (of the same, as a share of dense), prune s,
    warnings (how many), status.
    """
    records = ordered(records)
    names, found, own = model_names(records), columns(records), variants(records)
    references = {key: {c: _dense_value(records, key, c) for c in found} for key in names}
    tasks = {c for c in found if is_task(records, c)}
    compared = {c for c in found if any(value(r, c) is not None and references[identity(r)][c] is not None
                                        for r in records if not is_dense(r)) and "stderr" not in c.metric}
    table_rows = []
    for record, variant in zip(records, own, strict=True):
        row = {"run_id": record.get("run_id"), "model": names[identity(record)],
               "method": clean(method_of(record)), "pattern": clean(pattern_of(record)),
               "variant": variant}
        for c in found:
            row[c.header] = x = value(record, c)
            if c in compared:
                row.update([_against(c, x, references[identity(record)][c])])
            if c in tasks:
                row[f"{c.header} ±"] = None if x is None else accuracy.how(record, c.metric).get("stderr")
            if c in tasks & compared:
                found_difference = task_difference(records, record, c)
                row[f"{c.header} - dense ±"] = found_difference and found_difference.stderr
        size = record.get("bytes") or {}
        row |= {"sparsity": record.get("sparsity"),
                "bytes": size["stored"] / size["dense"] if size.get("dense") else None,
                "prune s": (record.get("seconds") or {}).get("prune"),
                "warnings": len(record.get("warnings") or []), "status": _status(record)}
        table_rows.append(row)
    return table_rows


def _status(record):
    """How a run ended, and why where it failed."""
    return ": ".join(clean(x) for x in (record.get("status"), record.get("error")) if x) or None


def _dense_record(records, model, column):
    """The model's dense run that measured the column, or None."""
    return next((r for r in records if identity(r) == model and is_dense(r) and value(r, column) is not None), None)


def _dense_value(records, model, column):
    dense = _dense_record(records, model, column)
    return None if dense is None else value(dense, column)


def _against(column, x, dense):
    """(key, value) of the comparison with dense: a ratio for perplexity, a difference for the rest."""
    ratio = column.metric.endswith("ppl")
    key = f"{column.header} {'/' if ratio else '-'} dense"
    if x is None or dense is None or (ratio and not dense):
        return key, None
    return key, x / dense if ratio else x - dense


def table(records, fmt="terminal"):
    """The rows as text: "terminal", "markdown", "html" (rounded numbers), or "csv" (all, as stored).

    Tasks stand in a table of their own (`task_table`), in csv here as well.
    """
    found = rows(records)
    keys = list(found[0]) if found else ["model", "method", "pattern"]
    if fmt != "csv" and found:
        tasks = {c.header for c in columns(records) if is_task(records, c)}
        keys = [k for k in keys if k.removesuffix(" ±").removesuffix(" - dense") not in tasks]
        keys = [k for k in keys if k != "run_id" and any(r[k] not in (None, "") for r in found)]
        if all(r["status"] in (None, "finished") for r in found):
            keys = [k for k in keys if k != "status"]
        if fmt == "html" and len({r["model"] for r in found}) == 1:  # the title of the page has it
            keys = [k for k in keys if k != "model"]
    head = keys if fmt == "csv" else [k[-7:] if k.endswith((" / dense", " - dense")) else k for k in keys]
    return render(head, [[r[k] if fmt == "csv" else _cell(k, r[k]) for k in keys] for r in found], fmt,
                   text={"run_id", "model", "method", "pattern", "variant", "status"})


def task_difference(records, record, column):
    """accuracy.Difference of a run from the dense run of its model; None of the dense run itself."""
    dense = _dense_record(records, identity(record), column)
    if dense is None or is_dense(record) or value(record, column) is None:
        return None
    return accuracy.difference(record, dense, column.metric)


def _cell(key, x):
    if key == "status" and x is not None:
        return x if len(x) <= 100 else x[:99] + "…"
    if key in ("sparsity", "bytes") and x is not None:
        return percent(x)
    if key.endswith(" - dense") and x is not None:
        return f"{x:+.3g}"
    return number(x, 3 if key == "prune s" else 4)


def percent(x):
    return "-" if x is None else f"{100 * x:.2f} %"


def pivot(records, metric, fmt="terminal"):
    """Methods down, patterns across, dense in front: the mean over seeds, ± standard deviation of several.

    metric: a key of the metrics ("wikitext2/ppl") or one column's header ("wikitext2 ppl @2048"). Different
    windows, models and other settings than the seed stay apart, in rows of their own. In markdown and HTML
    the best of each pattern is bold; csv has columns for standard deviation and number of seeds. Raises
    ValueError, naming the columns there are, if nothing is so called.
    """
    chosen = [c for c in columns(records) if metric in (c.metric, c.header)]
    if not chosen:
        known = ", ".join(c.header for c in columns(records)) or "none"
        raise ValueError(f"no run has the metric {metric}; there are: {known}")
    grid = _grid(records, chosen)
    patterns = sorted({p for cells in grid.values() for p in cells}, key=pattern_key)
    several = len(chosen) > 1, len({key[1] for key in grid}) > 1
    head = [h for h, show in zip(("metric", "model"), several, strict=True) if show]
    head += ["method" if several[0] or fmt == "csv" else chosen[0].header]
    for p in patterns:
        head += [p, f"{p} std", f"{p} n"] if fmt == "csv" else [p]
    body = []
    for (column, model, label), cells in grid.items():
        rivals = [other for key, other in grid.items() if key[:2] == (column, model)]
        line = [t for t, show in zip((column.header, model), several, strict=True) if show] + [label]
        for p in patterns:
            line += _pivot_cell(cells.get(p), [_mean(o[p]) for o in rivals if p in o], column, p, fmt)
        body.append(line)
    return render(head, body, fmt, text=set(head) - set(patterns))


def _grid(records, chosen):
    """{(column, model, series): {pattern: [value per seed]}}, the dense values repeated in each row."""
    methods = list(dict.fromkeys(method_of(r) for r in records))
    records = ordered(records)
    names, lines = model_names(records), series(records)
    dense, grid = {}, {}
    by_method = sorted(zip(records, lines, strict=True), key=lambda p: methods.index(method_of(p[0])))
    for column in chosen:
        for record, line in by_method:
            x, model = value(record, column), names[identity(record)]
            if x is None:
                continue
            if is_dense(record):
                dense.setdefault((column, model), []).append(x)
            else:
                grid.setdefault((column, model, line), {}).setdefault(pattern_of(record), []).append(x)
    for key, values in dense.items():
        mine = [cells for k, cells in grid.items() if k[:2] == key]
        for cells in mine or [grid.setdefault((*key, "dense"), {})]:
            cells["dense"] = values
    places = list(names.values())
    return dict(sorted(grid.items(), key=lambda item: (chosen.index(item[0][0]), places.index(item[0][1]))))


def _pivot_cell(values, rivals, column, pattern, fmt):
    """The cells of one method at one pattern: [text], or [mean, std, n] for csv."""
    if fmt == "csv":
        return [_mean(values), _std(values), len(values)] if values else [None, None, 0]
    if not values:
        return ["-"]
    mean, spread = _mean(values), _std(values)
    text = number(mean) + (f" ± {like(number(mean), spread)}" if spread is not None else "")
    known = [x for x in rivals if not math.isnan(x)]
    best = (max if higher_is_better(column.metric) else min)(known, default=None)
    bold = len(rivals) > 1 and mean == best and pattern != "dense" and fmt in ("markdown", "html")
    return [Bold(text) if bold else text]


def like(text, x):
    """`x` with as many decimals as the number in `text`."""
    return number(x, 2) if "e" in text or not math.isfinite(x) else f"{x:.{len(text.partition('.')[2])}f}"


def _mean(values):
    return sum(values) / len(values)


def _std(values):
    """Sample standard deviation; None of a single value."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


class Bold(str):
    """A cell to be set in bold where the format can."""


def render(head, body, fmt, text=()):
    """Cells (strings; for csv anything) as one table. `text` names the columns that hold no numbers."""
    if fmt == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *body])
        return out.getvalue()
    left = [h in text for h in head]
    if fmt == "html":
        return html_table(head, body, left)
    if fmt not in ("terminal", "markdown"):
        raise ValueError(f"table format {fmt}: give terminal, markdown, csv or html")
    mark = _markdown if fmt == "markdown" else str
    cells = [[mark(c) for c in line] for line in [head, *body]]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(head))]
    lines = [[c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(line, widths, left, strict=True)]
             for line in cells]
    if fmt == "terminal":
        lines.insert(1, ["-" * w for w in widths])
        parts = folded(widths, next((i for i, is_left in enumerate(left) if not is_left), len(head)))
        return "\n".join("".join("  ".join(line[i] for i in part).rstrip() + "\n" for line in lines) for part in parts)
    lines.insert(1, ["-" * (w - 1) + "-:"[not is_left] for w, is_left in zip(widths, left, strict=True)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def folded(widths, named):
    """[[column, ...], ...]: the columns of each of the tables that fit WIDTH, the first `named` in every one."""
    parts, names = [], list(range(named))
    for i in range(named, len(widths)):
        if not parts or sum(widths[j] + 2 for j in [*parts[-1], i]) > WIDTH:
            parts.append(names.copy())
        parts[-1].append(i)
    return parts or [names]


def _markdown(cell):
    text = cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return f"**{text}**" if isinstance(cell, Bold) else text


def html_table(head, body, left, name=""):
    def cell(tag, content, is_left):
        bold = isinstance(content, Bold)
        content = escape(content.replace(" ", "\u00a0") if tag == "th" and len(content) < 9 else content)
        content = f"<b>{content}</b>" if bold else content
        return f"<{tag}>{content}</{tag}>" if is_left else f'<{tag} class="n">{content}</{tag}>'

    lines = ["".join(cell(tag, c, is_left) for c, is_left in zip(line, left, strict=True))
             for tag, line in [("th", head), *(("td", line) for line in body)]]
    return (f'<div class="scroll {name}"><table><thead><tr>{lines[0]}</tr></thead><tbody>'
            + "\n".join(f"<tr>{line}</tr>" for line in lines[1:]) + "</tbody></table></div>")
