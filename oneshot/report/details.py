"""What a page says about one run: facts, tables, and every part of its record that no other place of the page shows.

A new measurement needs nothing here: a part of the record that is not in KNOWN is shown as it is, a list of dicts as a
table, everything else as names with values.
"""

import math
from collections.abc import Iterator

from markupsafe import Markup

from .columns import clean, columns, flat_settings, layer_sparsity, number, percent, value
from .table import render

# The parts of a record that a page shows in a form of their own, or leaves out ("schema", "blocks").
KNOWN = {"schema", "run_id", "status", "error", "settings", "model", "data", "environment", "metrics", "metric_info",
         "sparsity", "bytes", "warnings", "damage", "sensitivity", "say", "peak_memory_bytes", "seconds", "skipped",
         "blocks", "layers"}


def details(record: dict) -> dict:
    """What the template shows of one run. Facts are {name: value}; tables are HTML, "" if they would have no rows."""
    results = [f"{c.header} {number(value(record, c))}" for c in columns([record])][:3]
    others = list(_others(record))
    skipped, layers = record.get("skipped") or [], record.get("layers") or []
    surplus = [x for x in layers if x.get("surplus")]
    return {
        "results": " · ".join([*results, f"{percent(record.get('sparsity'))} zeros"]),
        "facts": _facts(record) + [(title, part) for title, part in others if isinstance(part, dict)],
        "skipped": len(skipped), "skipped_table": _table(skipped, {"tensor": "name", "reason": "reason"}),
        "surplus": len(surplus), "surplus_table": _table(surplus, {
            "layer": "name", "asked for": "target_zeros", "stored": "zeros", "surplus": "surplus"}),
        "damage": _damage(record.get("damage") or {}),
        "sensitivity_table": _table(record.get("sensitivity") or [], {
            "pruned alone": "name", "loss increase (nats a token)": "loss_increase",
            "relative error": "relative_error", "weights": "weights"}),
        "other_tables": [(title, part) for title, part in others if not isinstance(part, dict)],
        "layers": len(layers), "layers_table": _layers(layers)}


def _facts(record):
    """[(heading, {name: value})]: what was asked for, on which model and data, where, and in which time."""
    data = record.get("data") or {}
    spent = {"run id": record.get("run_id"), "peak memory": _bytes(record.get("peak_memory_bytes"))}
    spent |= {k: f"{number(v, 3)} s" for k, v in (record.get("seconds") or {}).items()}
    blocks = [("Settings", dict(flat_settings(record.get("settings") or {}))), ("Model", record.get("model")),
              ("Environment", record.get("environment")), ("Time and memory", spent),
              ("Calibration data", data.get("calibration"))]
    blocks += [(f"Evaluation data: {k}", v) for k, v in (data.get("evaluation") or {}).items()]
    return [(heading, pairs) for heading, pairs in blocks if pairs]


def _damage(found):
    """Which slices lost more than the whole text, in words; the tokens and passages hurt most. None if not measured."""
    if not found:
        return None
    tokens = _table(found.get("tokens") or [], {
        "token": lambda t: repr(t["token"])[1:-1].replace(" ", "␣"), "times": "count",
        "mean increase (nats)": "increase", "beyond the mean (nats)": "excess"})
    passages = [(p["passage"], f"{clean(p['text'])}, window {p['window']}, from token {p['position']}: "
                               f"{number(p['increase'], 3)} nats a token") for p in found.get("passages") or []]
    return {"found": found.get("found") or [], "tokens_table": tokens, "passages": passages}


def _layers(layers):
    return _table(layers, {
        "layer": "name", "shape": lambda x: " × ".join(map(str, x.get("shape") or [])), "pattern": "pattern",
        "zeros": lambda x: percent(layer_sparsity(x)), "zeros (count)": "zeros", "relative error": "relative_error",
        "seconds": lambda x: number(x.get("seconds"), 2), "info": lambda x: _info(x.get("info") or {})},
        text={"layer", "shape", "pattern", "info"})


def _info(info):
    return ", ".join(f"{k} {number(v, 3) if isinstance(v, float) else v}" for k, v in info.items())


def _others(record) -> Iterator[tuple[str, dict | Markup]]:
    """(title, facts or table) of every part of the record that is not KNOWN. Lists of dicts are tables."""
    single = {}
    for key, part in record.items():
        if key in KNOWN:
            continue
        facts = {}
        for name, entry in (flat_settings(part) if isinstance(part, dict) else [("", part)]):
            if isinstance(entry, list) and entry and all(isinstance(row, dict) for row in entry):
                flat = [dict(flat_settings(row)) for row in entry]
                yield f"{key} {name}".strip(), _table(flat, {k: k for row in flat for k in row}, digits=4)
            elif entry not in (None, "", []):
                facts[name] = number(entry) if isinstance(entry, float) else entry
        if isinstance(part, dict) and facts:
            yield key, facts
        elif facts:
            single[key] = facts[""]
    if single:
        yield "Other values", single


# ---------------------------------------------------------------- cells

def _table(rows, columns, text=None, digits=3):
    """An HTML table of dicts. columns: {header: key, or function of the row}; floats are rounded to `digits`.

    text: the headers of the columns of words, aligned to the left; by default those that hold a string.
    """
    if not rows:
        return Markup("")
    cells = [[c(row) if callable(c) else row.get(c) for c in columns.values()] for row in rows]
    if text is None:
        text = {head for head, column in zip(columns, zip(*cells, strict=True), strict=True)
                if any(isinstance(x, str) for x in column)}
    body = [[number(x, digits) if isinstance(x, float) else fact(x) for x in line] for line in cells]
    return Markup(f'<div class="tall">{render([*map(clean, columns)], body, "html", text={*map(clean, text)})}</div>')


def fact(x: object) -> str:
    """A value as text: thin spaces between the thousands of whole numbers, other numbers unrounded."""
    if isinstance(x, int) and not isinstance(x, bool):
        return f"{x:,}".replace(",", "\u2009") if abs(x) >= 10000 else str(x)
    if isinstance(x, (list, tuple)):
        return ", ".join(map(fact, x))
    return "-" if x is None else clean(x)


def _bytes(n):
    """812000000 is "812 MB"."""
    if n is None:
        return "-"
    power = min(4, max(0, int(math.log10(max(n, 1)) // 3)))
    return f"{number(n / 1000.0**power, 3)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
