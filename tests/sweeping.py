"""Small sweeps in the tests: their files, and what they leave."""

import json
from pathlib import Path

import sweep

from oneshot import report


def write(folder, place, *, models=None, **top):
    """A sweep's file in the folder; one tiny model, two methods, two seeds, unless told otherwise."""
    spec = {"methods": ["magnitude", "wanda"], "patterns": ["2:4"], "seeds": ["0", "1"], "nsamples": "4",
            "seqlen": "16", "calibration": str(place / "calibration.txt"), "evaluate": str(place / "evaluation.txt"),
            "eval_windows": "4"} | top
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key}: {json.dumps(value)}" for key, value in spec.items()]
    lines.append(f"models: {json.dumps(models or [str(place / 'model')])}")
    (folder / "sweep.yaml").write_text("\n".join(lines).replace('"2:4"', "2:4"))
    return folder / "sweep.yaml"


def go(file, results, *more):
    return sweep.main([str(file), "--results", str(results), "--workers", "0", *map(str, more)])


def rows(results):
    """{(model's folder, method, pattern, seed): status} of the records in a folder."""
    found = {}
    for file in results.glob("*.json"):
        record = report.read(file)
        s = record["settings"]
        key = Path(s["model"]).name, s["method"], s["pattern"], s.get("seed")
        assert key not in found, "a run has two records"
        found[key] = record["status"]
    return found
