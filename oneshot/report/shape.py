"""Shape: the kind of every part of a record, so that a record with other parts is refused, and the part named.

In a shape, TEXT, NUMBER and PLAIN (text, number, true or false) stand for values that may also be null, [x] for a list
of x, {ANY: x} for a dict whose values are x, and {"key": x, ...} for a dict with some known keys. Parts and keys that
are not here may be anything: measurements bring their own.
"""

from collections.abc import Mapping
from typing import Any

TEXT, NUMBER, PLAIN, ANY = "text", "a number", "a plain value", "any"
TOKENS = {"source": TEXT, "sha256": TEXT, "windows": NUMBER, "seqlen": NUMBER, "tokens": NUMBER}
PARTS = {ANY: {ANY: PLAIN}}
SHAPE: dict[str, Any] = {
    "schema": NUMBER, "run_id": TEXT, "status": TEXT, "error": TEXT, "sparsity": NUMBER, "peak_memory_bytes": NUMBER,
    "warnings": [TEXT], "metrics": {ANY: NUMBER}, "seconds": {ANY: NUMBER}, "environment": {ANY: PLAIN},
    "bytes": {ANY: NUMBER}, "heal": {ANY: {}},
    "shrunk": {"method": TEXT, "units": [{}], "tried": [{}], "order": [{}], **dict.fromkeys(
        ("share", "parameters", "parameters_before", "blocks", "blocks_before"), NUMBER)},
    "latency": {ANY: {}},
    "head": {"name": TEXT, "grid": TEXT, **dict.fromkeys(("stored", "dense", "rounded_to_zero"), NUMBER)},
    "blocks": [{"seconds": {ANY: NUMBER}, "heal": {}, **dict.fromkeys(
        ("block", "relative_error", "norm_ratio", "dimensions", "dimensions_dense", "dimensions_ratio"), NUMBER)}],
    "model": {"name": TEXT, "family": TEXT, "dtype": TEXT, "fingerprint": TEXT, "parameters": NUMBER,
              "prunable": NUMBER, "in_blocks": NUMBER, "blocks": NUMBER},
    "paths": {ANY: TEXT},
    "data": {"calibration": TOKENS, "evaluation": {ANY: TOKENS}},
    "metric_info": {ANY: {"stderr": NUMBER, "samples": NUMBER, "correct": TEXT, "documents": TEXT, "chance": NUMBER,
                          "group": TEXT, "window": NUMBER, "windows": NUMBER, "tokens": NUMBER, "new_tokens": NUMBER,
                          "mean_of": [TEXT], "right_to_wrong": NUMBER, "wrong_to_right": NUMBER}},
    "layers": [{"name": TEXT, "linear": TEXT, "pattern": TEXT, "block": NUMBER, "shape": [NUMBER], "info": {},
                "grid": TEXT, **dict.fromkeys(("relative_error", "rounding_error", "rounded_to_zero", "seconds",
                                               "surplus", "target_zeros", "zeros"), NUMBER)}],
    "skipped": [{"name": TEXT, "reason": TEXT, "weights": NUMBER}],
    "sensitivity": [{"name": TEXT, "linear": TEXT, "block": NUMBER, "loss_increase": NUMBER, "weights": NUMBER,
                     "relative_error": NUMBER}],
    "say": [{"prompt": TEXT, "answer": TEXT}],
    "prompts": [{"line": NUMBER, "answer": TEXT, "right": PLAIN}],
    "damage": {"frequency_from": TEXT, "found": [TEXT], "empty": {ANY: [TEXT]},
               "overall": {"half": NUMBER, "increase": NUMBER, "tokens": NUMBER, "windows": NUMBER},
               "tokens": [{"token": TEXT, "count": NUMBER, "increase": NUMBER, "excess": NUMBER}],
               "passages": [{"passage": TEXT, "text": TEXT, **dict.fromkeys(("window", "position", "increase"),
                                                                            NUMBER)}],
               "slices": [{"kind": TEXT, "name": TEXT, "verdict": TEXT, **dict.fromkeys(
                   ("tokens", "windows", "increase", "half"), NUMBER)}]},
    "settings": {"solver": PARTS, "healing": PARTS, "allocation": PARTS, "rounding": PARTS,
                 **dict.fromkeys(("model", "method", "pattern", "preset", "heal", "allocate", "calibration", "evaluate",
                                  "quantise", "dtype", "device", "tasks", "sensitivity", "documents"), TEXT)},
}


def fault(record: Mapping[str, Any]) -> str | None:
    """What is not of the kind it must be, as "`layers` 3 `zeros` is text, not a number"; None if all is."""
    for key, shape in SHAPE.items():
        if record.get(key) is not None and (found := differs(record[key], shape, f"`{key}`")):
            return found
    return None


def differs(value: Any, shape: Any, place: str) -> str | None:
    """What of a value is not as its shape says; None if nothing is. place: where it is, for the message."""
    if shape in (TEXT, NUMBER, PLAIN):
        kinds = {TEXT: str, NUMBER: int | float, PLAIN: str | int | float}[shape]
        good = value is None or (isinstance(value, kinds) and (shape == PLAIN or not isinstance(value, bool)))
        return None if good else f"{place} is {named(value)}, not {shape}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{place} is {named(value)}, not a list"
        for i, entry in enumerate(value):
            if found := "null" if entry is None else differs(entry, shape[0], f"{place} {i}"):
                return f"{place} {i} is null" if entry is None else found
        return None
    if not isinstance(value, dict):
        return f"{place} is {named(value)}, not an object"
    for key, entry in value.items():
        inner = shape[ANY] if ANY in shape else shape.get(key)
        absent = entry is None and (ANY not in shape or isinstance(inner, str))  # a key that is not there, or no value
        if inner is not None and not absent and (found := differs(entry, inner, f"{place} `{key}`")):
            return found
    return None


def named(value: Any) -> str:
    """What a JSON value is, in words."""
    return {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
            type(None): "null"}[type(value)]
