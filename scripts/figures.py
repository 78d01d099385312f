"""Figures from the run records, as SVG (for pages) and PNG (for a look): a pure function of results/runs/*.json.

    python scripts/figures.py                                # all, into results/figures
    python scripts/figures.py --runs build/sweep --out build/figures

For each model, calibration text and metric, as in tables.py:
    MODEL-TEXT-sparsity        perplexity (or a task) against sparsity, mean and range over seeds
    MODEL-TEXT-bytes           quality against the bytes of the whole model, with the Pareto front
and for each model and calibration text:
    MODEL-TEXT-error           every linear's relative error by depth
    MODEL-TEXT-sensitivity     loss increase by block and kind of linear, where a run measured it
"""

import argparse
import re
import sys
from pathlib import Path

from tables import ROOT, groups, read

from oneshot import cli, drawing, environment, figures, frontier, run

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def main(argv=None):
    p = cli.Parser(prog="python scripts/figures.py", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=Path, default=ROOT / "results" / "runs")
    p.add_argument("--out", type=Path, default=ROOT / "results" / "figures")
    try:
        args = p.parse_args(argv)
        environment.check_writable(args.out, "--out")
        pictures = draw(read(args.runs))
    except (ValueError, OSError) as error:
        return run.fail(run.one_line(error))
    for name, figure in pictures.items():
        for ending in ("svg", "png"):
            drawing.save(figure, args.out / f"{name}.{ending}")
    print(f"{len(pictures)} figures, as svg and png: {args.out}")
    return 0


def draw(records):
    """{file name without ending: figure} of the finished records."""
    found = {}
    for (model, calibration, column), rows in groups(records).items():
        calibration = calibration.split(" ")[0]
        text, place = f"{model}-{column.header}-on-{calibration}", f"{model}-on-{calibration}"
        found[slug(f"{text}-sparsity")] = figures.fig_perplexity(rows, column.metric)
        found[slug(f"{text}-bytes")] = frontier.fig_bytes(rows, column.metric, stored_bytes)
        found[slug(f"{place}-error")] = figures.fig_layer_errors(rows)
        if any(r.get("sensitivity") for r in rows):
            found[slug(f"{place}-sensitivity")] = frontier.fig_sensitivity(rows)
    return found


def slug(text):
    """Text as a file name."""
    return re.sub(r"[^\w.+-]+", "-", text.replace("@", "").replace(" ", "-")).strip("-")


# ---------------------------------------------------------------- bytes

def stored_bytes(record):
    """Bytes of the whole model when every pruned linear is stored as its pattern allows; None if it is not known."""
    model, linears = record.get("model") or {}, record.get("bytes") or {}
    size = ITEM_SIZE.get(model.get("dtype"))
    if size is None or not model.get("parameters") or not linears:
        return None
    return model["parameters"] * size - linears["dense"] + linears["stored"]


if __name__ == "__main__":
    sys.exit(main())
