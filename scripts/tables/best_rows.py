"""The rows that scripts/bench/best.py measured, and what they say: share of SparseGPT's excess removed, and cost.

Rows in results/best/*.json are one way at one model, pattern and seed; scripts/bench/ways.yaml says what a way is.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from oneshot.settings import presets

ROOT = Path(__file__).parents[2]
WAYS = yaml.safe_load((ROOT / "scripts" / "bench" / "ways.yaml").read_text(encoding="utf-8"))
LAYERWISE = ("wanda", "wanda+refit", "wanda+swaps", "wanda+swaps+refit", "sparsegpt", "sparsegpt+refit",
             "sparsegpt+swaps", "sparsegpt+swaps+refit", "admm", "alps", "alps+swaps")
Shares = dict[tuple[str, str, str], list[tuple[float, float, float]]]


def recipes() -> dict[str, dict]:
    """{way: its flags} in the order of the tables: best by effort behind the others with all patterns."""
    main = sorted(WAYS["main"], key=lambda way: way if way.startswith("best-") else "")
    every = WAYS["main"] | WAYS["ingredients"]
    return {way: presets.recipe(every[way]) for way in [*main, *WAYS["ingredients"]]}


def shown(folder: Path) -> list[dict]:
    """The rows of all models, without those measured with other flags, before a preset or a way was changed.

    Recipes are compared in today's words (healing was recovery once).
    """
    today = recipes()
    rows = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text())["rows"]]
    return [row for row in rows if presets.recipe(row["recipe"]) == today.get(row["way"])]


def said_old(rows: Iterable[dict]) -> list[str]:
    """[a paragraph on the rows that an older version has healed, an empty line]; [] where none is."""
    found = {}
    for r in rows:
        if "heal" in presets.recipe(r["recipe"]) and r.get("version", 1) < WAYS["version"]:
            found.setdefault((r["model"], r["way"]), {}).setdefault(r["pattern"], []).append(r["seed"])
    told = [f"{model} {way} " + ", ".join(f"{p} (seed {', '.join(map(str, sorted(seeds)))})" for p, seeds in of.items())
            for (model, way), of in found.items()]
    return [f"Healed by an older version, whose methods each drew their own held-out windows: {'; '.join(told)}.",
            ""] if told else []


def excess(row: dict) -> float:
    """Nats a token above the dense model."""
    return math.log(row["ppl"] / row["dense_ppl"])


def shares(rows: Iterable[dict]) -> Shares:
    """{(model, pattern, way): [(share, cost, ppl)]} over seeds, for the rows whose SparseGPT is there."""
    rows = list(rows)
    base = {(r["model"], r["seed"], r["pattern"]): r for r in rows if r["way"] == "sparsegpt"}
    found = {}
    for r in rows:
        if sparse := base.get((r["model"], r["seed"], r["pattern"])):
            found.setdefault((r["model"], r["pattern"], r["way"]), []).append(
                (1 - excess(r) / excess(sparse), r["cpu_seconds"] / r["published_cpu_seconds"], r["ppl"]))
    return found


def models_of(found: Shares) -> list[str]:
    """The models, in the order of their rows."""
    return list(dict.fromkeys(model for model, _, _ in found))


def layer_errors(rows: Iterable[dict], model: str, text: str) -> dict[str, dict[str, float]]:
    """{kind of linear: {way: relative output error}} at a pattern, mean over blocks and seeds."""
    found = {}
    for r in rows:
        if (r["model"], r["pattern"]) == (model, text) and r["way"] in LAYERWISE:
            for kind, error in r["errors"].items():
                found.setdefault(kind, {}).setdefault(r["way"], []).append(error)
    return {kind: {way: statistics.fmean(errors) for way, errors in of.items()} for kind, of in found.items()}


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and ± standard deviation of several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def described(rows: Iterable[dict]) -> str:
    """Where and with what the rows were measured, in a few words."""
    told = {}
    for e in (row["environment"] for row in rows):
        machine = (f"{e['device']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, transformers "
                   f"{e['transformers']}")
        told.setdefault(machine, {})[f"{e['commit']}{' (dirty)' if e['dirty'] else ''}"] = None
    return "; ".join(f"{machine}, commit {', '.join(commits)}" for machine, commits in told.items())
