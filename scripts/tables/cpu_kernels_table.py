"""Layers on a CPU against the targets of 2:4: cpu_kernels.md from the rows of scripts/bench/cpu_kernels.py.

    python scripts/tables/cpu_kernels_table.py            # write results/bench/cpu_kernels.md
    python scripts/tables/cpu_kernels_table.py --check    # exit 1 if it is stale

A line is one weight, dtype, number of tokens and of threads. Rows from before the bench read memory ahead of what it
times (they have no `memory`) stand apart as older ones and are not judged; neither are those of a machine that was busy
or whose memory was slow.
"""

import csv
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import one_page

from oneshot.report.table import render

ROOT = Path(__file__).parents[2]
NAME = "cpu_kernels"
LARGE = 2048  # rows and columns of a weight from which on all targets count
EVERY = ("bfloat16", "float16", "float32", "int8", "int4")
TELLS = {"2:4 / dense": "2:4 over its dense twin", "dense / limit": "the dense twin's share of the read limit",
         "2:4 / torch": "2:4 over torch's F.linear, for integers in bfloat16",
         "layer / best": "2:4 through its module over the fastest of torch's products, which for integers are F.linear "
                         "in bfloat16 and torch's own of the same codes"}


@dataclass(frozen=True)
class Target:
    """At least `least` of a value (of TELLS) is wanted of a dtype and these numbers of tokens, () for all. large: of
    weights of LARGE rows and columns at least."""

    value: str
    least: float
    dtype: str
    tokens: tuple[int, ...]
    large: bool = True

    def wants(self, line: dict) -> bool:
        """Whether it says something about a line."""
        return (line["dtype"] == self.dtype and (not self.tokens or line["tokens"] in self.tokens)
                and (not self.large or min(line["rows"], line["k"]) >= LARGE))

    def met(self, line: dict) -> bool:
        """Whether a line reaches it, as it is written."""
        return round(line[self.value], 2) >= self.least


TARGETS = (
    *(Target("dense / limit", 0.85, kind, (1,)) for kind in ("bfloat16", "int8", "int4")),
    Target("2:4 / dense", 1.6, "bfloat16", (1,)), Target("2:4 / dense", 1.5, "int8", (1,)),
    Target("2:4 / dense", 1.25, "int4", (1,)),
    *(Target("2:4 / dense", 1.35, kind, (4, 16)) for kind in ("bfloat16", "int8", "int4")),
    Target("2:4 / torch", 3.2, "bfloat16", (1,)), Target("2:4 / torch", 5.5, "int8", (1,)),
    Target("2:4 / torch", 8.0, "int4", (1,)),
    *(Target("layer / best", 1.0, kind, (), large=False) for kind in EVERY))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds cpu_kernels.md stale."""
    return one_page.main(argv, __doc__, __file__, ROOT / "results" / "bench" / f"{NAME}.md",
                         lambda out: page(lines_of(out / f"{NAME}.csv")))


def lines_of(file: Path) -> list[dict]:
    """The lines of a file, in its order. Raises ValueError where there are none."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found: dict[tuple, dict[str, dict]] = {}
    for row in csv.DictReader(text.splitlines()):
        at = tuple(row[name] for name in ("device", "variant", "commit", "rows", "k", "dtype", "threads", "tokens"))
        found.setdefault(at, {})[row["method"]] = row
    if not found:
        raise ValueError(f"--out {file.parent}: holds no {file.name}; run scripts/bench/cpu_kernels.py")
    return [line_of(methods) for methods in found.values()]


def line_of(methods: dict[str, dict]) -> dict:
    """A line, of {method: its row}: what the rows have in common, and the values of TELLS."""
    us, first = {name: float(row["us"]) for name, row in methods.items()}, next(iter(methods.values()))
    best = min(us[name] for name in ("torch", "torch's") if name in us)
    return {"rows": int(first["rows"]), "k": int(first["k"]), "dtype": first["dtype"], "tokens": int(first["tokens"]),
            "threads": int(first["threads"]), "state": first["machine"], "older": not first["memory"],
            "device": first["device"], "commit": first["commit"], "variant": first["variant"], "torch": first["torch"],
            "2:4 / dense": us["dense"] / us["2:4"], "dense / limit": float(methods["dense"]["limit"]),
            "2:4 / torch": us["torch"] / us["2:4"], "layer / best": best / us["layer"],
            "2:4 / limit": float(methods["2:4"]["limit"])}


# ------------------------------------------------------------------ the page

def page(lines: Sequence[dict]) -> str:
    """Targets, then all lines, then the older ones."""
    new = [line for line in lines if not line["older"]]
    old = [line for line in lines if line["older"]]
    parts = ["# 2:4 layers on a CPU\n", f"Written by `python scripts/tables/{NAME}_table.py` from `{NAME}.csv` of "
             f"`python scripts/bench/{NAME}.py`, which says how they are measured; medians.\n",
             "\n".join(f"- {name}: {told}" for name, told in TELLS.items()) + "\n"]
    for device, variant in dict.fromkeys((line["device"], line["variant"]) for line in new):
        own = [line for line in new if (line["device"], line["variant"]) == (device, variant)]
        told = "; ".join(dict.fromkeys(f"commit {line['commit']}, torch {line['torch']}" for line in own))
        parts += [f"## Targets: {device}, {variant}\n", f"{told}. Of weights of {LARGE} rows and columns at least; "
                  "layer / best: of all. At most: the best line, if 2:4 were read as fast as memory can be.\n",
                  judged(own)]
    if new:
        parts += ["## Lines\n", table(new)]
    if old:
        parts += ["## Older lines\n", "Measured before the bench read memory ahead of what it times, and with kernels "
                  "of that time: what counts stands above; nothing here is judged.\n", table(old)]
    return "\n".join(parts)


def judged(lines: Sequence[dict]) -> str:
    """A row for each target and number of threads: met where all lines of an idle machine meet it. For one token, which
    is bound by memory, also the best of these lines over torch if 2:4 were read as fast as memory can be."""
    body = []
    for target in TARGETS:
        for threads in sorted({line["threads"] for line in lines}):
            own = [line for line in lines if target.wants(line) and line["threads"] == threads
                   and line["state"] == "idle"]
            values = [line[target.value] for line in own]
            met = sum(map(target.met, own))
            bound = target.value == "2:4 / torch"
            most = [line[target.value] / line["2:4 / limit"] for line in own if line["2:4 / limit"]] if bound else []
            body.append([target.value, target.dtype, ", ".join(map(str, target.tokens)) or "all", str(threads),
                         f"{target.least:.2f}", *([f"{statistics.median(values):.2f}", f"{min(values):.2f}",
                                                  f"{met} of {len(own)}", "met" if met == len(own) else "**missed**"]
                                                 if own else ["-", "-", "0 of 0", "not measured"]),
                         f"{max(most):.2f}" if most else "-"])
    head = ["target", "dtype", "tokens", "threads", "at least", "median", "worst", "lines", "verdict", "at most"]
    return render(head, body, "markdown", text={"target", "dtype", "verdict"})


def table(lines: Iterable[dict]) -> str:
    """All lines, with what each misses."""
    body = [[f"{line['rows']}x{line['k']}", line["dtype"], str(line["threads"]), str(line["tokens"]),
             *(f"{line[name]:.2f}" for name in TELLS), verdict(line), line["state"],
             f"{line['device']}, {line['variant']}", line["commit"]]
            for line in lines]
    head = ["weight", "dtype", "threads", "tokens", *TELLS, "targets", "machine was", "machine", "commit"]
    return render(head, body, "markdown", text={"weight", "dtype", "targets", "machine was", "machine", "commit"})


def verdict(line: dict) -> str:
    """Whether a line meets the targets that say something about it."""
    wanted = [target for target in TARGETS if target.wants(line)]
    if line["older"] or line["state"] != "idle" or not wanted:
        return "-"
    missed = [f"{target.value} {line[target.value]:.2f}, not {target.least:.2f}" for target in wanted
              if not target.met(line)]
    return f"missed: {'; '.join(missed)}" if missed else "met"


if __name__ == "__main__":
    sys.exit(main())
