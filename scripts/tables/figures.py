"""Figures from the run records: a pure function of results/runs/*.json.

    python scripts/tables/figures.py                                # all, into results/figures
    python scripts/tables/figures.py --runs build/sweep --out build/figures --formats svg,png

For each model, calibration text and metric, as in tables.py:
    MODEL-TEXT-sparsity        perplexity against sparsity, mean and range over seeds
    MODEL-TEXT-bytes           quality against the bytes of the whole model, with the Pareto front
and for each model and calibration text:
    MODEL-TEXT-error           every linear's relative error by depth
    MODEL-TEXT-sensitivity     loss increase by block and kind of linear, where a run measured it
    MODEL-TEXT-damage-PATTERN  where the loss increase sits, where a run measured it
    MODEL-TEXT-tasks           lm-eval tasks with standard errors and chance, where a run measured some
"""

import argparse
import re
import sys
from itertools import filterfalse
from pathlib import Path
from typing import TYPE_CHECKING

from tables import ROOT, groups, read

from oneshot import report
from oneshot.data import perturb
from oneshot.report import accuracy, figures
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/tables/figures.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "results" / "runs")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "figures")
    p.add_argument("--formats", type=formats, default=["svg"], help="svg, png, pdf, separated by commas (svg)")
    return exit_code(lambda: work(p.parse_args(argv)))


def work(args: argparse.Namespace) -> None:
    """Draw and write all of them."""
    environment.check_writable(args.out, "--out")
    pictures = draw(read(args.runs))
    for name, figure in pictures.items():
        for ending in args.formats:
            figures.save(figure, args.out / f"{name}.{ending}")
    print(f"{len(pictures)} figures, as {' and '.join(args.formats)}: {args.out}")


def formats(text: str) -> list[str]:
    """["svg", "png"] of "svg,png"."""
    found = [part.strip() for part in text.split(",")]
    if unknown := sorted(set(found) - {"svg", "png", "pdf"}):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are svg, png, pdf")
    return found


def draw(records: list[dict]) -> "dict[str, Figure]":
    """{file name without ending: figure} of the finished records."""
    found, places = {}, {}
    for (model, calibration, column), rows in groups(records).items():
        place = f"on-{calibration.split(' ')[0]}"
        places.setdefault((model, place), {}).update((r["run_id"], r) for r in rows)
        if column.metric.endswith("/ppl") and not perturbed(column.metric):
            text, shown = slug(f"{model}-{column.header}-{place}"), list(filterfalse(report.is_rounded, rows))
            if len({report.pattern_of(r) for r in rows if report.is_pruned(r)}) > 1:
                found[f"{text}-sparsity"] = figures.fig_perplexity(shown, column.metric)
            found[f"{text}-bytes"] = figures.fig_bytes(rows, column.metric, stored_bytes)
    for (model, place), known in places.items():
        rows, text = list(known.values()), slug(f"{model}-{place}")
        found[f"{text}-error"] = figures.fig_layer_errors(rows)
        if mapped := [r for r in rows if r.get("sensitivity")]:
            found[f"{text}-sensitivity"] = figures.fig_sensitivity(mapped)
        for pattern in dict.fromkeys(report.pattern_of(r) for r in rows if r.get("damage") and report.is_pruned(r)):
            found[f"{text}-damage-{slug(pattern.replace(':', 'of'))}"] = figures.fig_damage(
                [r for r in rows if r.get("damage") and report.pattern_of(r) == pattern])
        if tested := list(filter(accuracy.has_tasks, rows)):
            found[f"{text}-tasks"] = figures.fig_tasks(tested)
    return found


def perturbed(metric: str) -> bool:
    """Whether a metric is of a text with typos and the like: the table has it."""
    return metric.rpartition("/")[0].rpartition("+")[2] in perturb.KINDS


def slug(text: str) -> str:
    """Text as a file name."""
    return re.sub(r"[^\w.+-]+", "-", text.replace("@", "").replace(" ", "-")).strip("-")


def stored_bytes(record: dict) -> float | None:
    """Bytes of the whole model when every pruned linear is stored as its pattern allows; None if it is not known."""
    size = report.whole_bytes(record)
    return size[0] if size else None


if __name__ == "__main__":
    sys.exit(main())
