"""The file of a run record: written whole, checked when read, old names translated.

Every run writes one JSON file. In Python a record is a plain dict; of what kind its parts are is in shape.py, what can
be computed from it in columns.py.
"""

import json
import math
from pathlib import Path
from typing import Any

from ..runtime.files import write_text
from ..runtime.inputs import parse_json, read_text
from . import shape

SCHEMA = 1
# The order of the keys in the file: short entries come first. Keys not listed here follow in alphabetical order.
KEYS = ("schema", "run_id", "status", "settings", "model", "data", "environment", "metrics", "metric_info",
        "sparsity", "bytes", "warnings", "damage", "sensitivity", "prompts", "say", "heal", "peak_memory_bytes",
        "seconds", "skipped", "blocks", "layers")


def write(record: dict, path: str | Path) -> dict:
    """Write `record` to `path` as JSON (see `storable`), whole or not at all. Returns what `read` would return."""
    kept = storable(record)
    body = ",\n".join(f"{json.dumps(k)}: {_lines(v)}" for k, v in kept.items())
    write_text("{\n" + body + "\n}\n", path)
    return _with_lost_values(kept)


def storable(record: dict) -> dict:
    """A copy of `record` that JSON can hold, its keys in the order of KEYS.

    JSON knows neither NaN nor infinity: they become null, and a warning in the copy says which values they were.
    """
    kept, warnings = {}, [str(w) for w in record.get("warnings") or []]
    for key in [*(k for k in KEYS if k in record), *sorted(k for k in record if k not in KEYS)]:
        lost = []
        kept[key] = _finite(record[key], key, lost)
        for place, x in lost if key == "metrics" else lost[:1]:
            more = f" and {len(lost) - 1} more" if key != "metrics" and len(lost) > 1 else ""
            text = f"{place}{more} not finite"
            if not any(w.startswith(text) for w in warnings):
                warnings.append(_lost_warning(text, x))
    return kept | {"warnings": warnings}


def read(path: str | Path) -> dict:
    """The record in the file `path`, in today's words; a metric stored as null is again what it was (inf or NaN).

    Raises ValueError, naming the file and what to do, if it holds no record or one of another schema.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the run record (a .json file) in it")
    try:
        record = parse_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a run record: {error}; run once more") from None
    return checked(record, path)


def checked(record: Any, path: str | Path) -> dict:
    """The record that JSON read from `path` gave, made ready for use as `read` does. For records inside other files.

    Raises ValueError, naming the file and what to do, if it is no record or one of another schema.
    """
    if not isinstance(record, dict) or "schema" not in record or "run_id" not in record:
        raise ValueError(f"{path} is not a run record: a JSON object with `schema` and `run_id` is needed; "
                         "give a file that `oneshot prune` wrote")
    for key in ("settings", "model", "metrics", "environment"):
        if not isinstance(record.get(key, {}), dict):
            raise ValueError(f"{path} is not a run record: its `{key}` is no JSON object; run once more")
    if record["schema"] != SCHEMA:
        writer = (record.get("environment") or {}).get("oneshot", "?")
        raise ValueError(f"{path} has schema {record['schema']} (by oneshot {writer}), this version "
                         f"reads {SCHEMA}: run again, or use the version that wrote it")
    record = in_todays_words(record)
    if wrong := shape.fault(record):
        raise ValueError(f"{path} is not a run record: its {wrong}; run once more")
    return _with_lost_values(record)


def in_todays_words(record: dict) -> dict:
    """A copy of `record` in which healing has its present names, so that all other code knows only these.

    Until version 0.1 healing was called recovery, and repair within a block. A record in today's words stays as it is.
    """
    new = _renamed(record, {"recovery": "heal"})
    if "settings" in new:
        new["settings"] = _renamed(new["settings"], {"recover": "heal", "recovery": "healing"})
    if isinstance(new.get("blocks"), list):
        new["blocks"] = [_renamed(block, {"repair": "heal"}) for block in new["blocks"]]
        for old, block in zip(record["blocks"], new["blocks"], strict=True):
            if isinstance(block, dict) and "seconds" in block:
                block["seconds"] = _renamed(block["seconds"], {"repair": "heal"})
            if isinstance(old, dict) and "repair" in old:
                block["heal"] = {"block": old["repair"]}
    return new


def _renamed(entries, names):
    """A copy of a dict with some keys renamed, in the same order; anything but a dict is returned as it is."""
    return {names.get(k, k): v for k, v in entries.items()} if isinstance(entries, dict) else entries


def _with_lost_values(record):
    """`record` with inf or NaN for every metric that is stored as null."""
    metrics, warnings = record.get("metrics") or {}, record.get("warnings") or []
    return record | {"metrics": {k: _lost_value(k, warnings) if v is None else v for k, v in metrics.items()}}


def _lost_warning(text, x):
    return f"{text} ({x}): stored as null"


def _lost_value(metric, warnings):
    """What the metric was before JSON could not hold it: `storable` left a warning that says so."""
    known = (x for x in (math.inf, -math.inf) if _lost_warning(f"metrics {metric} not finite", x) in warnings)
    return next(known, math.nan)


def _finite(value, place, lost):
    """`value` with every NaN or infinity replaced by None; the list `lost` collects (place, value) of each."""
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
