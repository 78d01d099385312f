"""Run records: the one JSON of a run, and what it says (tables.py and page.py show it).

    record   the dict that a run fills (README, Record); all but `write` and `read` are pure functions of it
    column   one measured quantity: the metric AND its window, so that two windows never share a column
    header   a column as people read it: "wikitext2 ppl @2048"
    variant  the settings in which runs of one model and method differ: "nsamples 64, seed 1"

Needs neither torch nor matplotlib.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from . import accuracy

SCHEMA = 1
# the order in the file: what is short comes first
KEYS = ("schema", "run_id", "status", "settings", "model", "data", "environment", "metrics", "metric_info",
        "sparsity", "bytes", "warnings", "damage", "sensitivity", "prompts", "heal", "peak_memory_bytes", "seconds",
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


def is_rounded(record):
    """Whether nothing was pruned and all was rounded to integers: such a run has bytes, but no sparsity."""
    return setting(record, "method") == "rtn"


def is_pruned(record):
    return not is_dense(record) and not is_rounded(record)


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


def higher_is_better(metric):
    return metric.rpartition("/")[2].startswith(HIGHER_IS_BETTER)
