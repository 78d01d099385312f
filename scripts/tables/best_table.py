"""What `--method best` and its ingredients gain: best.md and best.svg from the rows of scripts/bench/best.py.

    python scripts/tables/best_table.py            # write them into results/best
    python scripts/tables/best_table.py --check    # exit 1 if best.md is stale

A pure function of results/best/*.json. The README's table is made here as well; tables.py writes it.
"""

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import one_page
from best_rows import (
    LAYERWISE,
    ROOT,
    Shares,
    described,
    excess,
    layer_errors,
    models_of,
    recipes,
    said_old,
    shares,
    shown,
    spread,
)

from oneshot.report import table
from oneshot.report.figures import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED = "`scripts/bench/best.py`"
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
TOYS, REAL = ("0.6", "0.7", "2:4"), ("0.6", "2:4")
ASKED = {"stories260k": TOYS, "craftgpt-5m": TOYS, "smollm2": REAL, "smollm2-131k": REAL}  # where targets are set
TARGETS = (("best-3", 0.4, 5.0), ("best-5", 0.6, math.inf))  # way, least share, most cost: the same for all of them
SHOWN = ("2:4", "0.7")  # where the ingredients are measured one by one
ALPS_PAPER = {"2:4": 1 - 9.95 / 10.94, "0.6": 1 - 9.36 / 10.19, "0.7": 1 - 19.31 / 27.20}
"""How much less perplexity ALPS has than SparseGPT on Llama-2-7B (reproduce/alps.py has the whole table)."""
REFINED = (  # before, after, what was said of it
    ("sparsegpt", "sparsegpt+refit", "SparseGPT's values are said to be about 20 % above the best on their support, so "
                                     "17 % less"),
    ("wanda", "wanda+swaps", "its paper (2512.10922, which keeps the values): up to 60 % less"),
)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds best.md stale."""
    return one_page.main(argv, __doc__, __file__, ROOT / "results" / "best" / "best.md",
                         lambda out: page(measured(out)),
                         lambda out: drawing.save(picture(shares(measured(out))), out / "best.svg"))


def measured(folder: Path) -> list[dict]:
    """The rows that are shown. Raises ValueError where there are none."""
    if not (rows := shown(folder)):
        raise ValueError(f"--out {folder}: nothing measured yet; {MEASURED[1:-1]} does")
    return rows


# ------------------------------------------------------------------ the tables

def page(rows: Sequence[dict]) -> str:
    """best.md. Raises ValueError where there is no SparseGPT to compare with."""
    found = shares(rows)
    if not found:
        raise ValueError(f"--out: no sparsegpt to compare with; measure it, too ({MEASURED[1:-1]} --ways)")
    lines = ["# What each ingredient gains", "", f"{MEASURED} on {described(rows)}. Share of SparseGPT's "
             "excess log-perplexity removed, mean ± standard deviation over calibration seeds; in brackets perplexity, "
             "cost in multiples of SparseGPT done the published way, and n where it is fewer seeds than the model's.",
             "", *said_old(rows), "![share of SparseGPT's excess removed against cost](best.svg)", ""]
    for model in models_of(found):
        lines += share_table([r for r in rows if r["model"] == model], found, model)
    lines += ["## Targets", "", *targets(found), "", "## Beside the papers", "", *against_sparsegpt(found),
              *refined(rows), ""]
    for text in SHOWN:
        lines += error_table(rows, text)
    return "\n".join(lines)


def headline(rows: Iterable[dict]) -> str:
    """The README's table: what `best` gains and costs at the two efforts with a target, the built-in model left out."""
    ways = [way for way, _, _ in TARGETS]
    rows = [r for r in rows if r["way"] in ("sparsegpt", *ways) and r["model"] != "demo-wikitext2"]
    found, body = shares(rows), []
    for model, way in itertools.product(models_of(found), ways):
        cells = []
        for p in PATTERNS:
            got = found.get((model, p, way), [])
            n = f"; n={len(got)}" if len(got) < 3 else ""
            cells.append(f"{spread([s for s, _, _ in got], 2)} at {statistics.fmean(c for _, c, _ in got):.1f}x{n}"
                         if got else "-")
        if any(cell != "-" for cell in cells):
            body.append([model, way[-1], *cells])
    return "\n".join([
        "Share of SparseGPT's excess over the dense model in log-perplexity that `best` removes, mean ± standard "
        "deviation over calibration seeds (n: how many, where fewer than three), and its cost in multiples of "
        f"SparseGPT done the published way. {MEASURED} on {described(rows)}.", "", *said_old(rows),
        table.render(["model", "effort", *PATTERNS], body, "markdown", text={"model", "effort"}).rstrip()])


def share_table(rows: Sequence[dict], found: Shares, model: str) -> list[str]:
    """A row a way, a column a pattern, of the rows of one model."""
    columns, order = [p for p in PATTERNS if any(k[:2] == (model, p) for k in found)], list(recipes())
    seeds, first = len({r["seed"] for r in rows}), rows[0]
    on: dict[str, set[str]] = {}  # {what it was measured on: patterns}
    for r in rows:
        on.setdefault(f"{r['tokens']} tokens, dense {r['dense_ppl']:.3f}", set()).add(r["pattern"])
    worst = [spread([excess(r) for r in rows if r["way"] == "sparsegpt" and r["pattern"] == p], 3) for p in columns]
    body = [["excess of SparseGPT (nats)", *worst]]
    for way in sorted({w for m, _, w in found if m == model}, key=order.index):
        cells = []
        for p in columns:
            if got := found.get((model, p, way)):
                fewer = f"; n={len(got)}" if len(got) < seeds else ""
                cells.append(f"{spread([s for s, _, _ in got], 2)} ({spread([x for _, _, x in got], 2)}; "
                             f"{statistics.fmean(c for _, c, _ in got):.1f}x{fewer})")
            else:
                cells.append("-")
        body.append([way, *cells])
    said = [text + f" ({', '.join(p for p in PATTERNS if p in where)})" * (len(on) > 1) for text, where in on.items()]
    return [f"## {model}", "", f"{first['metric']} @{first['window']}, {'; '.join(said)}; "
            f"{seeds} seed{'s' * (seeds > 1)}.", "",
            table.render(["way", *columns], body, "markdown", text={"way"})]


def error_table(rows: Sequence[dict], text: str) -> list[str]:
    """Relative error of every kind of linear by way, beside SparseGPT's."""
    lines = [f"## Layer errors at {text}", "", "Relative output error, mean over blocks and seeds, each way on the "
             "inputs that its own pruned blocks produce; SparseGPT's in full, the others as multiples of it.", ""]
    for model in dict.fromkeys(r["model"] for r in rows):
        found = layer_errors(rows, model, text)
        found = {kind: of for kind, of in found.items() if "sparsegpt" in of}
        ways, body = [w for w in LAYERWISE if any(w in of for of in found.values())], []
        for kind, of in found.items():
            cells = {w: f"{error / of['sparsegpt']:.2f}x" for w, error in of.items()}
            cells["sparsegpt"] = f"{of['sparsegpt']:.4f}"
            body.append([kind, *(cells.get(w, "-") for w in ways)])
        lines += [table.render([model, *ways], body, "markdown", text={model})] if body else []
    return lines


def targets(found: Shares) -> list[str]:
    """Whether `best` keeps what the project asks of it, a line each, and what of it was not measured."""
    lines, unknown = [], []
    for (model, patterns), (way, least, most) in itertools.product(ASKED.items(), TARGETS):
        for p in patterns:
            if got := found.get((model, p, way)):
                share, cost = (statistics.fmean(x[i] for x in got) for i in (0, 1))
                seeds = f"{len(got)} seed{'s' * (len(got) > 1)}"
                limit = f" at {most:g}x or less" if most < math.inf else ""
                lines.append(f"- {model}, {p}, {way}: {share:.2f} at {cost:.1f}x, {seeds} (asked: {least:g}{limit}): "
                             f"{'met' if share >= least and cost <= most else 'MISSED'}")
            else:
                unknown.append(f"{model} {p} {way}")
    return [*lines, *([f"- not measured with today's flags: {', '.join(unknown)}"] if unknown else [])]


def against_sparsegpt(found: Shares) -> list[str]:
    """How much less perplexity ALPS has than SparseGPT, a line a model, beside what its paper says."""
    lines = []
    for model in models_of(found):
        less = {}
        for p in ALPS_PAPER:
            ours, theirs = (found.get((model, p, way)) for way in ("alps", "sparsegpt"))
            if ours and theirs:
                less[p] = 1 - statistics.fmean(x for _, _, x in ours) / statistics.fmean(x for _, _, x in theirs)
        if less:
            lines.append(f"- {model}: ALPS has {', '.join(f'{100 * x:.0f} % ({p})' for p, x in less.items())} less "
                         "perplexity than SparseGPT; in its paper (2406.07831, Llama-2-7B, WikiText-2) "
                         + ", ".join(f"{100 * x:.0f} % ({p})" for p, x in ALPS_PAPER.items()))
    return lines


def refined(rows: Sequence[dict]) -> list[str]:
    """How much of a layer's error a refiner takes from the mask before it, a line a refiner."""
    lines = []
    for before, after, said in REFINED:
        told = []
        for model, text in itertools.product(dict.fromkeys(r["model"] for r in rows), SHOWN):
            errors = [of for of in layer_errors(rows, model, text).values() if before in of and after in of]
            if less := [100 * (1 - of[after] / of[before]) for of in errors]:
                told.append(f"{model} {text} {min(less):.0f} to {max(less):.0f} %")
        if told:
            lines.append(f"- {after} has less layer error than {before}, by kind of linear: {', '.join(told)}; {said}")
    return lines


# ------------------------------------------------------------------ the picture

FAMILIES = {  # of ways; the first whose test holds
    "best, effort 1 to 5": lambda way: way.startswith("best-"),
    "healed": lambda way: "block" in way or "distil" in way,
    "with the dense target": lambda way: "target" in way,
    "with allocation": lambda way: "owl" in way,
    "layer by layer": lambda way: True,
}


@drawing.drawn
def picture(found: Shares) -> "Figure":
    """Share of SparseGPT's excess removed against cost, a panel per model and pattern, a point per way."""
    names = models_of(found)
    fig = drawing.new_figure(drawing.WIDTH, 0.5 + 2.9 * len(names))
    axes = fig.subplots(len(names), len(SHOWN), sharex=True, sharey="row", squeeze=False)
    styles = dict(zip(FAMILIES, zip(drawing.COLOURS, drawing.MARKERS, strict=False), strict=False))
    for (i, model), (j, text) in itertools.product(enumerate(names), enumerate(SHOWN)):
        panel(axes[i, j], {way: got for (m, p, way), got in found.items() if (m, p) == (model, text)}, styles)
        axes[i, j].set_title(f"{model}, {text}", loc="left", fontweight="bold")
    for ax in axes[-1]:
        ax.set_xlabel(f"cost, times SparseGPT the published way (log scale; dotted: {TARGETS[0][2]:g}x)")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for ax in axes[:, 0]:
        ax.set_ylabel("share of SparseGPT's excess removed")
    drawing.legend(fig, [drawing.handle(name, colour, "none", marker) for name, (colour, marker) in styles.items()])
    return fig


def panel(ax, ways: dict[str, list[tuple[float, float, float]]], styles: dict[str, tuple[str, str]]) -> None:
    """One model at one pattern; the efforts of `best` are joined by a line."""
    line = []
    for way, got in ways.items():
        cost, values = statistics.fmean(c for _, c, _ in got), [share for share, _, _ in got]
        family = next(name for name, test in FAMILIES.items() if test(way))
        drawing.mark(ax, cost, values, *styles[family])
        if way.startswith("best-"):
            line.append((cost, statistics.fmean(values), way[-1]))
    for cost, share, effort in line:
        ax.annotate(effort, (cost, share), xytext=(4, -10), textcoords="offset points")
    if line:
        ax.plot([c for c, _, _ in sorted(line)], [s for _, s, _ in sorted(line)], color=drawing.COLOURS[0], lw=1)
    ax.set_xscale("log")
    ax.axvline(TARGETS[0][2], color=drawing.MUTED, ls=":", lw=1)


if __name__ == "__main__":
    sys.exit(main())
