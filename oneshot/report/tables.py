"""Tables of records: one line for each run, or methods down and patterns across.

The formats are those of table.render: terminal, markdown, html and csv. Results of tasks have a table of their own
(task_table.py).
"""

import math

from . import accuracy
from .columns import (
    Column,
    clean,
    columns,
    grid_of,
    higher_is_better,
    identity,
    is_dense,
    is_task,
    like,
    method_of,
    model_names,
    number,
    ordered,
    pattern_key,
    pattern_of,
    percent,
    series,
    value,
    variants,
)
from .storage import whole_bytes, whole_sparsity
from .table import Bold, render


def rows(records: list[dict]) -> list[dict]:
    """One dict for each run, in the order of `ordered`, all with the same keys; None where a run has no value.

    run_id, model, method, pattern, variant
    HEADER                          for every column; where a model has a dense run beside pruned ones also
    HEADER / dense                  perplexity: the ratio to the dense model
    HEADER - dense                  all others: the difference from it
    HEADER ±, HEADER - dense ±      tasks: the standard errors (accuracy.py)
    sparsity                        share of zeros among the prunable weights
    of all                          share of zeros among all weights, what is never pruned included
    bytes                           what the whole model takes, as a share of dense
    MB                              the same in 10^6 bytes, where any of the runs rounds weights
    prune s                         seconds
    warnings                        how many
    status                          how the run ended
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
        size = whole_bytes(record)
        row |= {"sparsity": record.get("sparsity"), "of all": whole_sparsity(record),
                "bytes": size[0] / size[1] if size else None,
                **({"MB": size[0] / 1e6 if size else None} if any(map(grid_of, records)) else {}),
                "prune s": (record.get("seconds") or {}).get("prune"),
                "warnings": len(record.get("warnings") or []), "status": _status(record)}
        table_rows.append(row)
    return table_rows


def _status(record):
    """How a run ended; if it failed, why."""
    return ": ".join(clean(x) for x in (record.get("status"), record.get("error")) if x) or None


def _dense_record(records, model, column):
    """The model's dense run that measured the column, or None."""
    return next((r for r in records if identity(r) == model and is_dense(r) and value(r, column) is not None), None)


def _dense_value(records, model, column):
    dense = _dense_record(records, model, column)
    return None if dense is None else value(dense, column)


def _against(column, x, dense):
    """(key, value) of the comparison with dense: a ratio for perplexity, a difference for all other metrics."""
    ratio = column.metric.endswith("ppl")
    key = f"{column.header} {'/' if ratio else '-'} dense"
    if x is None or dense is None or (ratio and not dense):
        return key, None
    return key, x / dense if ratio else x - dense


def table(records: list[dict], fmt: str = "terminal") -> str:
    """The table of `rows`, one line for each run; fmt as in table.render.

    csv has every key of the rows, with unrounded values. The other formats leave out empty columns, those of tasks
    (they have a table of their own, task_table.py) and the status where all runs finished, and round the numbers.
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


def task_difference(records: list[dict], record: dict, column: Column) -> accuracy.Difference | None:
    """How a run differs from the dense run of its model, found among `records`; None for the dense run itself."""
    dense = _dense_record(records, identity(record), column)
    if dense is None or is_dense(record) or value(record, column) is None:
        return None
    return accuracy.difference(record, dense, column.metric)


def _cell(key, x):
    if key == "status" and x is not None:
        return x if len(x) <= 100 else x[:99] + "…"
    if key in ("sparsity", "of all", "bytes") and x is not None:
        return percent(x)
    if key.endswith(" - dense") and x is not None:
        return f"{x:+.3g}"
    return number(x, 3 if key == "prune s" else 4)


def pivot(records: list[dict], metric: str, fmt: str = "terminal") -> str:
    """Methods down, patterns across, dense in front: the mean over seeds, ± the standard deviation of several.

    metric: a key of the metrics ("wikitext2/ppl") or the header of one column ("wikitext2 ppl @2048"). Runs on other
    windows, of other models, or with other settings than the seed are never averaged: they have rows of their own. In
    markdown and HTML the best method of each pattern is bold; csv has further columns for the standard deviation and
    the number of seeds. Raises ValueError, naming the columns there are, if there is none of that name.
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
    """{(column, model, series): {pattern: [one value for each seed]}}; every row has the dense values too."""
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
    known = [x for x in rivals if math.isfinite(x)]
    best = (max if higher_is_better(column.metric) else min)(known, default=None)
    bold = len(rivals) > 1 and mean == best and pattern != "dense" and fmt in ("markdown", "html")
    return [Bold(text) if bold else text]


def _mean(values):
    return sum(values) / len(values)


def _std(values):
    """Sample standard deviation; None if there is only one value."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))
