"""The README's table of tokens per second on a CPU, from the rows of scripts/bench/cpu_decode.py."""

import json
from pathlib import Path

from oneshot.report.table import render

SHOWN = ("transformers", "dense bf16", "2:4 bf16", "dense int8", "2:4 int8", "2:4 int4", "2:4 int8, rounded",
         "2:4 int4, rounded")
BUSY = 0.3  # load of others above which only ratios count, as in cpu_kernels.py


def rows(file: Path) -> list[dict]:
    """The rows with the fewest threads of each model; none where nothing was measured."""
    found = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    least = {row["model"]: min(r["threads"] for r in found if r["model"] == row["model"]) for row in found}
    return [row for row in found if row["threads"] == least[row["model"]]]


def lines(file: Path) -> str:
    """The table with a line that says how it came about; "" where nothing was measured."""
    found = rows(file)
    if not found:
        return ""
    names = list(dict.fromkeys(row["model"] for row in found))
    rate = {(row["model"], row["way"]): row["tokens_per_second"] for row in found}
    files = dict.fromkeys(row["way"] for row in found if row["way"].startswith("llama.cpp"))
    body = [[way, *(cell(rate, name, way) for name in names)] for way in (*SHOWN, *files)
            if any((name, way) in rate for name in names)]
    busy = any(row["load"] > BUSY for row in found)
    told = ("Tokens per second of `generate`, batch 1, all weights 2:4; in brackets, times transformers' own. "
            f"`scripts/bench/cpu_decode.py`; {'; '.join(dict.fromkeys(origin(row) for row in found))}"
            f"{'; the machine was busy: only ratios count' * busy}. llama-1.1b: random weights. rounded: inputs and "
            "output head in int8 too.")
    return f"{told}\n\n{render(['way', *names], body, 'markdown', text={'way'}).rstrip()}"


def origin(row: dict) -> str:
    """Where a row was measured."""
    e, threads = row["environment"], row["threads"]
    return (f"{row['model']}: {threads} thread{'s' * (threads > 1)}, {e['device']}, torch {e['torch']}, "
            f"commit {e['commit']}")


def cell(rate: dict, name: str, way: str) -> str:
    """A way's speed on a model."""
    if (name, way) not in rate:
        return "-"
    return f"{rate[name, way]:.1f} ({rate[name, way] / rate[name, 'transformers']:.2f}x)"
