"""Tokens per second on a CPU: cpu_decode.md, and the README's table, from the rows of scripts/bench/cpu_decode.py and
cpu_prompt.py.

    python scripts/tables/cpu_table.py            # write results/bench/cpu_decode.md
    python scripts/tables/cpu_table.py --check    # exit 1 if it is stale

    / alone    speed of generate over that of the compiled calls without generate around them
    same, gap  how many tokens are those of transformers with the same weights, unpacked, and how near its choice was
               where they part; "-" in rows from before they were compared like that
"""

import json
import sys
from pathlib import Path

import one_page

from oneshot.report.table import render

ROOT = Path(__file__).parents[2]
SHOWN = ("transformers", "dense bf16", "2:4 bf16", "dense int8", "2:4 int8", "2:4 int4", "2:4 int8, rounded",
         "2:4 int4, rounded")
BUSY = 0.3  # load of others above which only ratios count, as in cpu_kernels.py
ALONE = ", alone"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds cpu_decode.md stale."""
    return one_page.main(argv, __doc__, __file__, ROOT / "results" / "bench" / "cpu_decode.md",
                         lambda out: page(rows_of(out / "cpu_decode.json")) + prompts(out / "cpu_prompt.json"))


def stored(file: Path) -> list[dict]:
    """The rows of a file; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def rows_of(file: Path) -> list[dict]:
    """All rows. Raises ValueError where there are none."""
    found = stored(file)
    if not found:
        raise ValueError(f"--out {file.parent}: holds no {file.name}; run scripts/bench/cpu_decode.py")
    return found


# ------------------------------------------------------------------ cpu_decode.md

def page(rows: list[dict]) -> str:
    """One table for each model and number of threads."""
    parts = ["# Tokens per second on a CPU, batch 1\n",
             "/ alone: of the speed of the compiled calls without generate around them. same: tokens, from the first "
             "on, that are those of transformers' plain generate of the row's own weights, unpacked and stored dense; "
             "gap: by how much the logit of the next one lies below that of transformers' choice ('-': all are the "
             "same, or not compared).\n"]
    for name, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        own = [row for row in rows if (row["model"], row["threads"]) == (name, threads)]
        rate, e = {row["way"]: row["tokens_per_second"] for row in own}, own[0]["environment"]
        busy = ": **busy**, only ratios count" if own[0]["load"] > BUSY else ""
        parts += [f"## {name}, {threads} thread{'s' * (threads > 1)}\n",
                  f"`python scripts/bench/cpu_decode.py`; commit {e['commit']}{' (dirty)' if e['dirty'] else ''}, "
                  f"{e['device']}, torch {e['torch']}, {e['date']}.\n",
                  f"{own[0]['tokens']} tokens a round; memory reads {own[0]['read'] / 1e9:.1f} GB/s; kernels: "
                  f"{own[0]['variant']}; load of others {own[0]['load']}{busy}.{reached(rate)}\n"]
        body = [[row["way"], f"{row['tokens_per_second']:.1f}", f"{row['spread'][0]:.1f}-{row['spread'][1]:.1f}",
                 f"{row['tokens_per_second'] / rate['transformers']:.2f}x",
                 over(rate, row["way"], row["way"].replace("2:4", "dense")),
                 f"{share(rate, row['way']):.0%}" if row["way"] + ALONE in rate else "-",
                 f"{row['bytes'] / 1e6:.0f}", f"{row['limit']:.2f}", *agreeing(row)] for row in own]
        head = ["way", "tokens/s", "of the rounds", "/ transformers", "/ dense twin", "/ alone", "MB", "limit", "same",
                "gap"]
        parts.append(render(head, body, "markdown", text={"way"}))
    return "\n".join(parts)


def prompts(file: Path) -> str:
    """One table for all models and numbers of threads; "" where nothing was measured."""
    found = stored(file)
    if not found:
        return ""
    groups = list(dict.fromkeys((row["model"], row["threads"]) for row in found))
    rate = {(row["model"], row["threads"], row["way"]): row["tokens_per_second"] for row in found}
    busy = " **Busy**: only ratios count." if any(row["load"] > BUSY for row in found) else ""
    origins = dict.fromkeys(f"{origin(row)}, {row['tokens']} tokens, kernels: {row['variant']}" for row in found)
    text = (f"\n## Prompts\n\n`python scripts/bench/cpu_prompt.py`; {'; '.join(origins)}.{busy}\n\n"
            "Tokens per second of one forward pass over all tokens of a prompt, batch 1, all weights 2:4; in brackets, "
            "times the faster one of transformers in bfloat16 and float32.\n\n")
    best = {group: max(rate[(*group, way)] for way in ("transformers bf16", "transformers f32")) for group in groups}
    body = [[way, *(f"{rate[(*group, way)]:.0f} ({rate[(*group, way)] / best[group]:.2f}x)" if (*group, way) in rate
                    else "-" for group in groups)] for way in dict.fromkeys(row["way"] for row in found)]
    head = ["way", *(f"{name}, {threads} thread{'s' * (threads > 1)}" for name, threads in groups)]
    return text + render(head, body, "markdown", text={"way"})


def over(rate: dict[str, float], way: str, twin: str) -> str:
    """A way's speed over that of another."""
    return f"{rate[way] / rate[twin]:.2f}x" if twin != way and twin in rate else "-"


def share(rate: dict[str, float], way: str) -> float:
    """The speed of generate over that of the compiled calls by themselves."""
    return rate[way] / rate[way + ALONE]


def reached(rate: dict[str, float]) -> str:
    """What share of the compiled calls' speed generate reaches; "" where they were not timed by themselves."""
    found = [share(rate, way) for way in rate if way + ALONE in rate]
    return f" generate reaches {min(found):.0%} to {max(found):.0%} of the speed without it." if found else ""


def agreeing(row: dict) -> tuple[str, str]:
    """`same` and `gap`."""
    if row["same"] is None or "gap" not in row:
        return "-", "-"
    return f"{row['same']} of {row['tokens']}", "-" if row["gap"] is None else f"{row['gap']:.3f}"


# ------------------------------------------------------------------ the README

def rows(file: Path) -> list[dict]:
    """The rows with the fewest threads of each model; none where nothing was measured."""
    found = stored(file)
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


if __name__ == "__main__":
    sys.exit(main())
