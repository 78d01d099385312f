"""best.md, best.svg, the README's table and the numbers in them, from the rows of best.py's JSON."""

import itertools
import json
import math
import statistics

import reproduce_alps

from oneshot import report
from oneshot.report.figures import drawing

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
PUBLISHED = reproduce_alps.PAPER.perplexity["meta-llama/Llama-2-7b-hf"]
ALPS_PAPER = {p: 1 - PUBLISHED["alps"][p][0] / PUBLISHED["sparsegpt"][p][0] for p in ("2:4", "0.6", "0.7")}
ASKED = ("0.6", "0.7", "2:4")  # where the targets are set
TARGETS = (("best-3", 0.4, 5.0), ("best-5", 0.6, math.inf))  # way, least share, most cost
VERSION = 2  # of the recovery: rows of an older one are measured anew. 2: a run's held-out windows are drawn once
SHOWN = ("2:4", "0.7")  # where the ingredients are measured one by one


def read(path):
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def shown(folder, recipes):
    """The rows of all models, without those measured with other flags, before a preset was changed."""
    return [r for path in sorted(folder.glob("*.json")) for r in read(path) if r["recipe"] == recipes.get(r["way"])]


def is_old(row):
    """Whether a row was measured with an older recovery; VERSION counts nothing else."""
    return "recover" in row["recipe"] and row.get("version", 1) < VERSION


def said_old(rows):
    """[a paragraph on the rows that are old, an empty line]; [] where none is."""
    found = {}
    for r in filter(is_old, rows):
        found.setdefault((r["model"], r["way"]), {}).setdefault(r["pattern"], []).append(r["seed"])
    told = [f"{model} {way} " + ", ".join(f"{p} (seed {', '.join(map(str, sorted(seeds)))})" for p, seeds in of.items())
            for (model, way), of in found.items()]
    return [f"Measured with an older recovery, whose ways each drew their own held-out windows: {'; '.join(told)}.",
            ""] if told else []


def excess(row):
    return math.log(row["ppl"] / row["dense_ppl"])


def shares(rows):
    """{(model, pattern, way): [(share, cost, ppl)]} over seeds, for the rows whose SparseGPT is there."""
    base = {(r["model"], r["seed"], r["pattern"]): r for r in rows if r["way"] == "sparsegpt"}
    found = {}
    for r in rows:
        if sparse := base.get((r["model"], r["seed"], r["pattern"])):
            found.setdefault((r["model"], r["pattern"], r["way"]), []).append(
                (1 - excess(r) / excess(sparse), r["cpu_seconds"] / r["published_cpu_seconds"], r["ppl"]))
    return found


def spread(values, digits):
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def write(folder, recipes):
    """best.md and best.svg beside the models' JSON; recipes: {way: its flags}, as the tables list them."""
    rows = shown(folder, recipes)
    if not rows:
        raise SystemExit(f"error: --out {folder}: nothing measured yet")
    found = shares(rows)
    if not found:
        raise SystemExit(f"error: --out {folder}: no sparsegpt to compare with; measure it, too (--ways)")
    lines = ["# What each ingredient gains", "", f"`scripts/best.py` on {described(rows)}. Share of SparseGPT's "
             "excess log-perplexity removed, mean ± standard deviation over calibration seeds; in brackets perplexity, "
             "cost in multiples of SparseGPT done the published way, and n where it is fewer seeds than the model's.",
             "", *said_old(rows), "![share of SparseGPT's excess removed against cost](best.svg)", ""]
    for model in dict.fromkeys(m for m, _, _ in found):
        lines += share_table(rows, found, model, list(recipes))
    lines += ["## Targets", "", *targets(found), "", "## Beside the papers", "", *against_sparsegpt(found),
              *refined(rows), ""]
    for text in SHOWN:
        lines += error_table(rows, text)
    report.write_text("\n".join(lines), folder / "best.md")
    drawing.save(picture(found), folder / "best.svg")


def headline(rows):
    """The README's table: what `best` gains and costs at the two efforts with a target."""
    ways = [way for way, _, _ in TARGETS]
    rows = [r for r in rows if r["way"] in ("sparsegpt", *ways)]
    found = shares(rows)
    lines = ["Share of SparseGPT's excess over the dense model in log-perplexity that `best` removes, mean ± standard "
             "deviation over calibration seeds (n: how many, where fewer than three), and its cost in multiples of "
             f"SparseGPT done the published way. `scripts/best.py` on {described(rows)}.", "", *said_old(rows),
             f"| model | effort | {' | '.join(PATTERNS)} |", "|---|---|" + "--:|" * len(PATTERNS)]
    for model, way in itertools.product(dict.fromkeys(m for m, _, _ in found), ways):
        cells = []
        for p in PATTERNS:
            got = found.get((model, p, way), [])
            n = f"; n={len(got)}" if len(got) < 3 else ""
            cells.append(f"{spread([s for s, _, _ in got], 2)} at {statistics.fmean(c for _, c, _ in got):.1f}x{n}"
                         if got else "-")
        if any(cell != "-" for cell in cells):
            lines.append(f"| {model} | {way[-1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share_table(rows, found, model, order):
    """A row a way, a column a pattern."""
    mine = [r for r in rows if r["model"] == model]
    columns = [p for p in PATTERNS if any(k[:2] == (model, p) for k in found)]
    seeds = len({r["seed"] for r in mine})
    worst = [spread([excess(r) for r in mine if r["way"] == "sparsegpt" and r["pattern"] == p], 3) for p in columns]
    lines = [f"## {model}", "", f"{mine[0]['metric']} @{mine[0]['window']}, {mine[0]['tokens']} tokens, dense "
             f"{mine[0]['dense_ppl']:.3f}; {seeds} seed{'s' * (seeds > 1)}.", "", f"| way | {' | '.join(columns)} |",
             "|---|" + "--:|" * len(columns), f"| excess of SparseGPT (nats) | {' | '.join(worst)} |"]
    for way in sorted({w for m, _, w in found if m == model}, key=order.index):
        cells = []
        for p in columns:
            if got := found.get((model, p, way)):
                fewer = f"; n={len(got)}" if len(got) < seeds else ""
                cells.append(f"{spread([s for s, _, _ in got], 2)} ({spread([x for _, _, x in got], 2)}; "
                             f"{statistics.fmean(c for _, c, _ in got):.1f}x{fewer})")
            else:
                cells.append("-")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return [*lines, ""]


LAYERWISE = ("wanda", "wanda+refit", "wanda+swaps", "wanda+swaps+refit", "sparsegpt", "sparsegpt+refit",
             "sparsegpt+swaps", "sparsegpt+swaps+refit", "admm", "alps", "alps+swaps")


def layer_errors(rows, model, text):
    """{kind of linear: {way: relative output error}} at a pattern, mean over blocks and seeds."""
    found = {}
    for r in rows:
        if (r["model"], r["pattern"]) == (model, text) and r["way"] in LAYERWISE:
            for kind, error in r["errors"].items():
                found.setdefault(kind, {}).setdefault(r["way"], []).append(error)
    return {kind: {way: statistics.fmean(errors) for way, errors in of.items()} for kind, of in found.items()}


def error_table(rows, text):
    """Relative error of every kind of linear by way, beside SparseGPT's."""
    lines = [f"## Layer errors at {text}", "", "Relative output error, mean over blocks and seeds, each way on the "
             "inputs that its own pruned blocks produce; SparseGPT's in full, the others as multiples of it.", ""]
    for model in dict.fromkeys(r["model"] for r in rows):
        found = layer_errors(rows, model, text)
        found = {kind: of for kind, of in found.items() if "sparsegpt" in of}
        if not found:
            continue
        ways = [w for w in LAYERWISE if any(w in of for of in found.values())]
        lines += [f"| {model} | " + " | ".join(ways) + " |", "|---|" + "--:|" * len(ways)]
        for kind, of in found.items():
            cells = {w: f"{error / of['sparsegpt']:.2f}x" for w, error in of.items()}
            cells["sparsegpt"] = f"{of['sparsegpt']:.4f}"
            lines.append(f"| {kind} | " + " | ".join(cells.get(w, "-") for w in ways) + " |")
        lines.append("")
    return lines


REFINED = (  # before, after, what was said of it
    ("sparsegpt", "sparsegpt+refit", "SparseGPT's values are said to be about 20 % above the best on their support, so "
                                     "17 % less"),
    ("wanda", "wanda+swaps", "its paper (2512.10922, which keeps the values): up to 60 % less"),
)


def refined(rows):
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


def against_sparsegpt(found):
    """How much less perplexity ALPS has than SparseGPT, a line a model, beside what its paper says."""
    lines = []
    for model in dict.fromkeys(m for m, _, _ in found):
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


def described(rows):
    """Where and with what the rows were measured, in a few words."""
    told = {}
    for e in (row["environment"] for row in rows):
        machine = (f"{e['device']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, transformers "
                   f"{e['transformers']}")
        told.setdefault(machine, {})[f"{e['commit']}{' (dirty)' if e['dirty'] else ''}"] = None
    return "; ".join(f"{machine}, commit {', '.join(commits)}" for machine, commits in told.items())


def targets(found):
    """Whether `best` keeps what the project asks of it, a line each."""
    lines = []
    for model in ("stories260k", "craftgpt-5m"):
        for way, least, most in TARGETS:
            for p in ASKED:
                if got := found.get((model, p, way)):
                    share, cost = (statistics.fmean(x[i] for x in got) for i in (0, 1))
                    seeds = f"{len(got)} seed{'s' * (len(got) > 1)}"
                    kept = "kept" if share >= least and cost <= most else "MISSED"
                    limit = f" at {most:g}x or less" if most < math.inf else ""
                    lines.append(f"- {model}, {p}, {way}: {share:.2f} at {cost:.1f}x, {seeds} "
                                 f"(asked: {least:g}{limit}): {kept}")
    return lines or ["Not measured yet."]


# ------------------------------------------------------------------ the picture

FAMILIES = {  # of ways; the first whose test holds
    "best, effort 1 to 5": lambda way: way.startswith("best-"),
    "with recovery": lambda way: "block" in way or "distil" in way,
    "with the dense target": lambda way: "target" in way,
    "with allocation": lambda way: "owl" in way,
    "layer by layer": lambda way: True,
}


@drawing.drawn
def picture(found):
    """Share of SparseGPT's excess removed against cost, a panel per model and pattern, a point per way."""
    names = list(dict.fromkeys(m for m, _, _ in found))
    fig = drawing.new_figure(drawing.WIDTH, 0.5 + 2.9 * len(names))
    axes = fig.subplots(len(names), len(SHOWN), sharex=True, sharey="row", squeeze=False)
    styles = dict(zip(FAMILIES, zip(drawing.COLOURS, drawing.MARKERS, strict=False), strict=False))
    for (i, model), (j, text) in itertools.product(enumerate(names), enumerate(SHOWN)):
        ax, line = axes[i, j], []
        for (m, p, way), got in found.items():
            if (m, p) != (model, text):
                continue
            cost, values = statistics.fmean(c for _, c, _ in got), [share for share, _, _ in got]
            family = next(name for name, test in FAMILIES.items() if test(way))
            drawing.mark(ax, cost, values, *styles[family])
            if family.startswith("best"):
                line.append((cost, statistics.fmean(values), way[-1]))
        for cost, share, effort in line:
            ax.annotate(effort, (cost, share), xytext=(4, -10), textcoords="offset points")
        if line:
            ax.plot([c for c, _, _ in sorted(line)], [s for _, s, _ in sorted(line)], color=drawing.COLOURS[0], lw=1)
        ax.set_xscale("log")
        ax.axvline(TARGETS[0][2], color=drawing.MUTED, ls=":", lw=1)
        ax.set_title(f"{model}, {text}", loc="left", fontweight="bold")
    for ax in axes[-1]:
        ax.set_xlabel(f"cost, times SparseGPT the published way (log scale; dotted: {TARGETS[0][2]:g}x)")
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for ax in axes[:, 0]:
        ax.set_ylabel("share of SparseGPT's excess removed")
    drawing.legend(fig, [drawing.handle(name, colour, "none", marker) for name, (colour, marker) in styles.items()])
    return fig
