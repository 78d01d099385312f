"""Run records: keep the one JSON of a run, and make tables of any number of them (page.py makes the HTML page).

    record   the dict that a run fills (README, Record); all but `write` and `read` are pure functions of it
    column   one measured quantity: the metric AND its window, so that two windows never share a column
    header   a column as people read it: "wikitext2 ppl @2048"
    variant  the settings in which runs of one model and method differ: "nsamples 64, seed 1"

Needs neither torch nor matplotlib.
"""

import csv
import io
import json
import math
import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import accuracy

SCHEMA = 1
WIDTH = 120  # of a table in the terminal; what is wider goes on below
# the order in the file: what is short comes first
KEYS = ("schema", "run_id", "status", "settings", "model", "data", "environment", "metrics", "metric_info",
        "sparsity", "bytes", "warnings", "damage", "sensitivity", "prompts", "recovery", "peak_memory_bytes", "seconds",
        "skipped", "blocks", "layers")
# Settings that say where a run goes or what is measured after it, not what was done to the model.
ELSEWHERE = {"model", "method", "preset", "pattern", "save", "overwrite", "results", "cache_dir", "device", "format",
             "tasks", "task_path", "task_limit", "evaluate", "eval_seqlen", "eval_windows", "eval_batch_size",
             "prompts", "robustness", "divergence", "damage",
             "sensitivity"}
HIGHER_IS_BETTER = ("acc", "exact_match", "em", "f1", "agreement", "mcc", "bleu", "rouge",
                    "top1_agreement", "starts_with", "contains", "chosen")


# ---------------------------------------------------------------- the file

def write(record, path):
    """Write `record` to `path` as JSON (see `storable`), whole or not at all. Returns what `read` gives."""
    kept = storable(record)
    body = ",\n".join(f"{json.dumps(k)}: {_lines(v)}" for k, v in kept.items())
    write_text("{\n" + body + "\n}\n", path)
    return _with_nan(kept)


def storable(record):
    """A copy of `record` that JSON can hold, its keys in the order of KEYS.

    JSON knows no NaN or infinity: they become null, and a warning of the copy says which.
    """
    kept, warnings = {}, [str(w) for w in record.get("warnings") or []]
    for key in [*(k for k in KEYS if k in record), *sorted(k for k in record if k not in KEYS)]:
        lost = []
        kept[key] = _finite(record[key], key, lost)
        for place, x in lost if key == "metrics" else lost[:1]:
            more = f" and {len(lost) - 1} more" if key != "metrics" and len(lost) > 1 else ""
            text = f"{place}{more} not finite"
            if not any(w.startswith(text) for w in warnings):
                warnings.append(f"{text} ({x}): stored as null")
    return kept | {"warnings": warnings}


def _with_nan(record):
    """`record` with NaN for every metric that is stored as null."""
    metrics = record.get("metrics") or {}
    return record | {"metrics": {k: math.nan if v is None else v for k, v in metrics.items()}}


def read(path):
    """The record in the file `path`; metrics stored as null come back as NaN.

    Raises ValueError, naming the file and what to do, if it holds no record or one of another schema.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the run record (a .json file) in it")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a run record: no valid JSON ({error}); run once more") from None
    return checked(record, path)


def checked(record, path):
    """What was read from `path`, if it is a record of this schema; its metrics stored as null are NaN.

    Raises ValueError, naming the file and what to do.
    """
    if not isinstance(record, dict) or "schema" not in record or "run_id" not in record:
        raise ValueError(f"{path} is not a run record: a JSON object with `schema` and `run_id` is needed; "
                         "give a file that oneshot.run wrote")
    for key in ("settings", "model", "metrics", "environment"):
        if not isinstance(record.get(key, {}), dict):
            raise ValueError(f"{path} is not a run record: its `{key}` is no JSON object; run once more")
    if record["schema"] != SCHEMA:
        writer = (record.get("environment") or {}).get("oneshot", "?")
        raise ValueError(f"{path} has schema {record['schema']} (by oneshot {writer}), this version "
                         f"reads {SCHEMA}: run again, or use the version that wrote it")
    return _with_nan(record)


def write_text(text, path):
    """Put `text` into the file `path` atomically: a reader sees the old content or the new, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _finite(value, place, lost):
    """`value` with every NaN or infinity replaced by None; `lost` collects (place, value)."""
    if isinstance(value, dict):
        return {str(k): _finite(v, f"{place} {k}", lost) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v, f"{place} {v['name'] if isinstance(v, dict) and 'name' in v else i}", lost)
                for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append((place, value))
        return None
    return value


def _lines(value):
    """JSON with one line per entry of a dict or list: small enough to read, and to compare with diff."""
    if isinstance(value, dict) and value:
        return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}"
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(" " + json.dumps(v) for v in value) + "\n]"
    return json.dumps(value)


# ---------------------------------------------------------------- what a record says

@dataclass(frozen=True)
class Column:
    """A metric at a window. `text` tells two evaluation texts of one name apart, where a model met both."""

    metric: str
    window: int | None = None
    text: str = ""

    @property
    def header(self):
        name, _, kind = self.metric.rpartition("/")
        at = f" @{self.window}" if self.window else " @?" if kind == "ppl" else ""
        return clean(f"{name} {kind}".strip() + at + (f" ({self.text})" if self.text else ""))


def columns(records):
    """Every Column measured in `records`, in order of first appearance."""
    texts = {}
    for record in records:
        for metric in record.get("metrics") or {}:
            column = _column(record, metric)
            texts.setdefault((metric, column.window), {}).setdefault(identity(record), []).append(column)
    found = []
    for (metric, window), by_model in texts.items():
        split = any(len(set(met)) > 1 for met in by_model.values())
        met = [c for cs in by_model.values() for c in cs]
        found += dict.fromkeys(met) if split else [Column(metric, window)]
    return found


def value(record, column):
    """What `record` measured for `column` (NaN if stored as null); None if not, or on other windows."""
    own, metrics = _column(record, column.metric), record.get("metrics") or {}
    other = own.window != column.window or (column.text and own.text != column.text)
    if other or column.metric not in metrics:
        return None
    return math.nan if metrics[column.metric] is None else metrics[column.metric]


def is_task(records, column):
    """Whether a column holds an lm-eval task's values, which come with standard errors."""
    return any(accuracy.is_task(r, column.metric) for r in records)


def _column(record, metric):
    info = (record.get("metric_info") or {}).get(metric) or {}
    data = ((record.get("data") or {}).get("evaluation") or {}).get(metric.rpartition("/")[0]) or {}
    windows, digest = info.get("windows", data.get("windows")), data.get("sha256")
    if accuracy.is_task(record, metric):  # the same task on other documents is another column
        windows, digest = None, info.get("documents")
    known = [f"{windows} windows"] * (windows is not None) + [str(digest)[:8]] * (digest is not None)
    return Column(metric, info.get("window", data.get("seqlen")), ", ".join(known))


def identity(record):
    """(name, fingerprint): equal for two runs exactly if they started from the same weights."""
    model = record.get("model") or {}
    name = model.get("name") or (record.get("settings") or {}).get("model") or "?"
    return str(name), model.get("fingerprint")


def setting(record, name):
    """A setting as text."""
    return str((record.get("settings") or {}).get(name, "?"))


def method_of(record):
    """The method as it was asked for: best-3; or its chain and what was done around it, "alps, owl, distil"."""
    settings = record.get("settings") or {}
    if settings.get("preset") or setting(record, "method") == "dense":
        return settings.get("preset") or "dense"
    target, recover = settings.get("dense_target"), settings.get("recover") or "none"
    around = [f"dense target {target:g}" if target else None, settings.get("allocate"), *recover.split(",")]
    return ", ".join([setting(record, "method"), *(part for part in around if part not in (None, "none", "uniform"))])


def is_dense(record):
    return "dense" in (setting(record, "method"), setting(record, "pattern"))


def pattern_of(record):
    return "dense" if is_dense(record) else setting(record, "pattern")


def pattern_key(text):
    """Sorts patterns: dense, unstructured by sparsity, N:M by sparsity and M, int<b> by bits, anything else."""
    if text == "dense":
        return 0, 0.0, 0, text
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, match.groups())
        return 2, 1 - n / max(m, 1), m, text
    if match := re.fullmatch(r"int(\d+)", text):
        return 3, -int(match[1]), 0, text
    try:
        return 1, float(text), 0, text
    except ValueError:
        return 4, 0.0, 0, text


def model_names(records):
    """{identity: name to print}: the model's name, with its fingerprint where two models bear the same.

    A run that failed before its weights were read has no fingerprint, and the name alone.
    """
    found = dict.fromkeys(identity(r) for r in records)
    names = [name for name, mark in found if mark]
    return {(name, mark): clean(name if names.count(name) < 2 or not mark else f"{name} #{str(mark)[:6]}")
            for name, mark in found}


def ordered(records):
    """Models and methods as given; within a model dense first, then by pattern, then by method."""
    models = list(dict.fromkeys(identity(r) for r in records))
    methods = list(dict.fromkeys(method_of(r) for r in records))
    return sorted(records, key=lambda r: (models.index(identity(r)), not is_dense(r),
                                          pattern_key(pattern_of(r)), methods.index(method_of(r))))


def variants(records, ignore=()):
    """For each record the settings in which the runs of its model and method differ, as text; often ""."""
    flat = [dict(flat_settings(r.get("settings") or {})) for r in records]
    groups = {}
    for record, own in zip(records, flat, strict=True):
        groups.setdefault((identity(record), method_of(record)), []).append(own)
    texts = []
    for record, own in zip(records, flat, strict=True):
        group = groups[identity(record), method_of(record)]
        keys = [k for k in dict.fromkeys(k for one in group for k in one) if k not in {*ELSEWHERE, *ignore}]
        differ = [k for k in keys if len({_switched(one.get(k)) for one in group}) > 1]
        texts.append(clean(", ".join(f"{k} {own[k]}" if own[k] is not True else k for k in differ
                                     if _switched(own.get(k)) is not None)))
    return texts


def _switched(value):
    """A setting as text; None for one that is off or that an older version did not have."""
    return None if value in (None, False, 0.0, "none", "uniform") else str(value)


def series(records):
    """For each record its method, and how its runs differ but for the seed: "wanda (nsamples 64)"."""
    own = variants(records, ignore={"seed"})
    return [clean(method_of(r)) + f" ({v})" * bool(v) for r, v in zip(records, own, strict=True)]


def flat_settings(settings, prefix=""):
    for key, item in settings.items():
        if isinstance(item, dict):
            yield from flat_settings(item, "" if key in ("solver", "recovery", "allocation") else f"{prefix}{key}.")
        else:
            yield prefix + str(key), item


def labels(records):
    """A short name for each record that no other bears; names the model only if there are several."""
    names, own = model_names(records), variants(records)
    texts = []
    for record, variant in zip(records, own, strict=True):
        parts = [names[identity(record)]] if len(names) > 1 else []
        parts += ["dense"] if is_dense(record) else [method_of(record), pattern_of(record)]
        texts.append(clean(" ".join(parts) + (f" ({variant})" if variant else "")))
    return [t if texts.count(t) == 1 else f"{t} #{clean(record.get('run_id', i))[-8:]}"
            for i, (t, record) in enumerate(zip(texts, records, strict=True))]


def clean(text):
    """One printable line: names come from users, and end up in terminals, XML and markdown."""
    return "".join(c if c.isprintable() else " " for c in str(text)).strip()


def number(x, digits=4):
    """`x` with `digits` significant digits, whole part in full: 5.472, 117.4, 7058; "-" for None."""
    if x is None or isinstance(x, (str, bool)):
        return "-" if x is None else str(x)
    if isinstance(x, int) or not math.isfinite(x) or x == 0:
        return str(x) if isinstance(x, int) else f"{x:g}"
    size = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}"))))
    return f"{x:.{digits - 1}e}" if size >= 6 or size < -4 else f"{x:.{max(0, digits - 1 - size)}f}"


# ---------------------------------------------------------------- tables

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


def higher_is_better(metric):
    return metric.rpartition("/")[2].startswith(HIGHER_IS_BETTER)


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
