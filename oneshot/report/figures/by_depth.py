"""Pictures of run records: each `fig_*` is a function of the records and gives a matplotlib Figure.

    series    a method (with the settings in which its runs differ): a colour, the same in all pictures
    pattern   N:M patterns have a marker of their own, unstructured ones are dots on a line
    kind      which linear of a block: "self_attn.q_proj"; the numbers of experts are left out
"""

import itertools
import math
import re

from ... import report
from .. import accuracy
from .drawing import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    WIDTH,
    drawn,
    handle,
    legend,
    mark,
    new_figure,
    nothing,
    scale_y,
    series_styles,
    short_names,
)

# ---------------------------------------------------------------- layers by depth

@drawn
def fig_layer_errors(records, methods=None):
    """Relative output error of every pruned linear against the depth of its block, a small picture per kind.

    A row for every model and pattern, a line for every series (the median where several experts or seeds meet
    in a point, a band for their range). methods: the records whose series fix the colours, default `records`.
    """
    return _by_depth(records, lambda layer: layer.get("relative_error"), "relative error", methods)


@drawn
def fig_layer_sparsity(records, methods=None):
    """Share of zeros in every pruned linear against the depth of its block, arranged as `fig_layer_errors`.

    Where every linear of a pattern holds the same share (to 0.1 %) one picture shows all patterns.
    """
    points = _points(records, layer_sparsity)
    shares = {}
    for (_, pattern), panels in points.items():
        values = _values(panels)
        if max(values) - min(values) > 1e-3:
            return _by_depth(records, layer_sparsity, "zeros", methods, percent=True)
        shares.setdefault(round(sum(values) / len(values), 3), {})[pattern] = None
    if not shares:
        return nothing("no layer has a count of zeros in its record")
    fig = new_figure(7.6, 1.4 + 0.2 * len(shares))
    ax, last = fig.subplots(), _last_block(points)
    handles = []
    for (share, patterns), colour in zip(sorted(shares.items()), itertools.cycle(COLOURS), strict=False):
        ax.plot([-0.3, last + 0.3], [share, share], color=colour)
        text = f"{100 * share:.3g} % in every linear: {', '.join(patterns)}"
        handles.append(handle(text, colour, marker=""))
    scale_y([ax], [], percent=True)
    ax.set_ylim(max(0, min(shares) - 0.1), min(1, max(shares) + 0.1))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("block (0 is next to the input)")
    ax.set_ylabel("zeros (%)")
    legend(fig, handles)
    return fig


def layer_sparsity(layer):
    """Share of zeros in one layer row; None if it is not known."""
    size = math.prod(layer.get("shape") or [0])
    return layer["zeros"] / size if size and layer.get("zeros") is not None else None


def kind(linear):
    """The kind of a linear: its name in the block without the numbers of experts."""
    return report.clean(re.sub(r"[.\[]\d+\]?", "", str(linear)))


def _by_depth(records, measure, name, methods, percent=False):
    points = _points(records, measure)  # {(model, pattern): {kind: {method: {block: [values]}}}}
    kinds = list(dict.fromkeys(k for panels in points.values() for k in panels))
    if not kinds:
        return nothing(f"no layer has a {name} in its record")
    panels = [(row, k) for row in points for k in kinds]
    across = len(kinds) if len(points) > 1 else min(4, len(kinds))
    down = math.ceil(len(panels) / across)
    height = 1.75 if len(points) == 1 else 1.45
    fig = new_figure(max(min(WIDTH, 2.75 * across), 1.3 * across), 0.75 + height * down)
    grid = fig.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    flat, titles, styles = list(grid.flat), short_names(kinds), series_styles(methods or records)
    for ax, (row, k) in zip(flat, panels, strict=False):
        for method, blocks in points[row].get(k, {}).items():
            _line(ax, blocks, *styles[method])
        if len(points) == 1 or row == next(iter(points)):
            ax.set_title(titles[k], loc="left")
    for ax in flat[len(panels):]:
        ax.remove()
    for i, ax in enumerate(flat[: len(panels)]):  # numbers below each column; the last row may be short
        ax.tick_params(labelbottom=i + across >= len(panels), bottom=i + across >= len(panels))
    if len(points) > 1:
        several = len({model for model, _ in points}) > 1
        for line, (model, pattern) in zip(grid, points, strict=True):
            line[0].set_ylabel(f"{model}\n{pattern}" if several else pattern, fontweight="bold")
    values = [v for panels in points.values() for v in _values(panels)]
    log = scale_y(flat[: len(panels)], values, percent)
    if percent:
        flat[0].set_ylim(max(0, min(values) - 0.05), min(1, max(values) + 0.05))
    last = _last_block(points)
    flat[0].set_xlim(-0.04 * last - 0.2, 1.04 * last + 0.2)
    flat[0].xaxis.get_major_locator().set_params(integer=True, nbins=6)
    fig.supxlabel("block (0 is next to the input)", fontsize=9)
    fig.supylabel(f"{name} (%)" if percent else name + (", log scale" if log else ""), fontsize=9)
    drawn = dict.fromkeys(m for p in points.values() for k in p.values() for m in k)
    legend(fig, [handle(m, *styles[m]) for m in styles if m in drawn])
    return fig


def _points(records, measure):
    names, points = report.model_names(records), {}
    records = report.ordered(records)
    for record, series in zip(records, report.series(records), strict=True):
        row = names[report.identity(record)], report.clean(report.pattern_of(record))
        for layer in record.get("layers") or []:
            x = measure(layer)
            if x is not None and math.isfinite(x):
                which = kind(layer.get("linear", layer.get("name")))
                line = points.setdefault(row, {}).setdefault(which, {}).setdefault(series, {})
                line.setdefault(int(layer.get("block") or 0), []).append(x)
    return points


def _values(panels):
    return [v for lines in panels.values() for blocks in lines.values() for vs in blocks.values() for v in vs]


def _last_block(points):
    kinds = [lines for panels in points.values() for lines in panels.values()]
    return max(max(blocks) for lines in kinds for blocks in lines.values())


def _line(ax, blocks, colour, style):
    depth = sorted(blocks)
    ax.plot(depth, [_median(blocks[b]) for b in depth], color=colour, ls=style, lw=1.4,
            marker="o" if len(depth) < 13 else None, ms=2.8)
    if any(len(v) > 1 for v in blocks.values()):
        low, high = [min(blocks[b]) for b in depth], [max(blocks[b]) for b in depth]
        ax.fill_between(depth, low, high, color=colour, alpha=0.2, lw=0)


def _median(values):
    values = sorted(values)
    return (values[len(values) // 2] + values[(len(values) - 1) // 2]) / 2


# ---------------------------------------------------------------- perplexity

@drawn
def fig_perplexity(records, metric):
    """A metric against sparsity: a line per series, N:M patterns as hollow markers, the dense model dashed.

    metric: a key of the metrics or a column's header. One panel per model and window. Patterns of equal
    sparsity would hide each other, so every N:M pattern has a column of its own on the right, the series side
    by side. Seeds: the mean, and a bar from lowest to highest. Values not finite are named, not drawn.
    """
    names = report.model_names(records)
    chosen = [c for c in report.columns(records) if metric in (c.metric, c.header)]
    panels = [(c, key) for c in chosen for key in names
              if any(report.value(r, c) is not None for r in records if report.identity(r) == key)]
    if not panels:
        return nothing(f"no run has the metric {metric}")
    styles, across = series_styles(records), min(2, len(panels))
    down = math.ceil(len(panels) / across)
    fig = new_figure(7.6 if across == 1 else WIDTH, 0.6 + 3.4 * down)
    flat = list(fig.subplots(down, across, squeeze=False).flat)
    patterns = [p for p in dict.fromkeys(report.pattern_of(r) for r in report.ordered(records)) if columned(p)]
    markers = dict(zip(sorted(patterns, key=report.pattern_key), itertools.cycle(MARKERS), strict=False))
    for ax, (column, key) in zip(flat, panels, strict=False):
        _perplexity_panel(ax, [r for r in records if report.identity(r) == key], column, styles, markers)
        ax.set_title(names[key] if len(names) > 1 else "", loc="left", fontweight="bold")
    for ax in flat[len(panels):]:
        ax.remove()
    legend(fig, [handle(m, *style) for m, style in styles.items()]
            + [handle(p, INK, "none", marker, filled=False) for p, marker in markers.items()])
    return fig


def _perplexity_panel(ax, records, column, styles, markers):
    points, dense, lost = measured(records, column)
    places = _places(points, markers)
    methods = [m for m in styles if any(m == own for own, _ in points)]
    for i, method in enumerate(methods):
        colour, style = styles[method]
        shift = (i - (len(methods) - 1) / 2) / max(len(methods), 3)  # side by side within a column
        line = []
        for (own, pattern), (_, values) in points.items():
            if own == method:
                at, width = places[pattern]
                marked = {"mfc": "none", "mew": 1.6, "ms": 6.5} if pattern in markers else {}
                mark(ax, at + 0.8 * shift * width, values, colour, markers.get(pattern, "o"), **marked)
                line += [(at, sum(values) / len(values))] if not width else []
        ax.plot([x for x, _ in sorted(line)], [y for _, y in sorted(line)], color=colour, ls=style)
    log = scale_y([ax], [v for _, values in points.values() for v in values] + [dense] * (dense is not None))
    _pattern_axis(ax, points, places)
    if dense is not None:
        ax.axhline(dense, color=INK, ls=(0, (4, 3)), lw=1)
        ax.annotate(f"dense {report.number(dense)}", (1, dense), xycoords=("axes fraction", "data"),
                    xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_ylabel(column.header + (", log scale" if log else ""))
    if lost:
        named = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        ax.set_xlabel(f"{ax.get_xlabel()}\nnot finite, not drawn: {named}")


def columned(pattern):
    """Whether a pattern has a column of its own: N:M, and the integers that nothing was pruned for."""
    return ":" in pattern or pattern.startswith("int")


def measured(records, column):
    """({(series, pattern): (sparsity, [values])}, dense value or None, [runs whose value is not finite])."""
    points, dense, lost = {}, None, []
    records = report.ordered(records)
    for record, method in zip(records, report.series(records), strict=True):
        x, pattern = report.value(record, column), report.pattern_of(record)
        if x is None:
            continue
        if not math.isfinite(x):
            lost.append(f"{method} {report.clean(pattern)}")
        elif report.is_dense(record):
            dense = x
        else:
            points.setdefault((method, pattern), (record.get("sparsity") or 0, []))[1].append(x)
    return points, dense, lost


def _places(points, markers):
    """{pattern: (x, width)}: its sparsity and 0; or a column, for N:M and for a lone unstructured one."""
    found = {}
    for (_, pattern), (x, _) in points.items():
        found.setdefault(pattern, []).append(x)
    free = {p: sum(xs) / len(xs) for p, xs in found.items() if p not in markers}
    span = max(free.values(), default=0) - min(free.values(), default=0)
    if span < 0.005:
        free, step, edge = {}, 1.0, -1.0
    else:
        step, edge = span / 4, max(free.values())
    columns = sorted((p for p in found if p not in free), key=report.pattern_key)
    placed = {p: (x, 0) for p, x in free.items()}
    return placed | {p: (edge + i * step, step) for i, p in enumerate(columns, 1)}


def _pattern_axis(ax, points, places):
    """Ticks of the x axis: sparsities in percent, then the columns of the N:M patterns behind a thin line."""
    sparsity = {pattern: x for (_, pattern), (x, _) in points.items()}
    free = [x for x, width in places.values() if not width]
    span = max(free) - min(free) if free else 0
    whole = max(x + width / 2 for x, width in places.values()) - min(free, default=0) if places else 0
    ticks, texts = [], []
    for pattern, (x, width) in sorted(places.items(), key=lambda item: item[1]):
        if width or not ticks or x - ticks[-1] > whole / 18:
            ticks.append(x)
            percent = f"{100 * sparsity[pattern]:.3g} %"
            texts.append(f"{report.clean(pattern)}\n{percent}" if width and columned(pattern) else percent)
    ax.set_xticks(ticks, texts)
    columns = [(x - width / 2, x + width / 2) for x, width in places.values() if width]
    for edge in sorted({round(e, 9) for pair in columns for e in pair})[:-1] if columns else ():
        ax.axvline(edge, color=GRID, lw=1.2)
    if columns:
        ax.set_xlim(right=max(columns)[1])
        ax.set_xlim(left=min(free) - span / 12 if free else min(columns)[0])
    ax.set_xlabel("sparsity (% of the prunable weights that are zero)")


# ---------------------------------------------------------------- where the loss increase sits

@drawn
def fig_damage(records, methods=None):
    """Mean loss increase of every slice of the text with its 95 % interval, a colour a series, the whole a line.

    Filled: the interval leaves the mean of the whole outside. A cross: too few windows for an interval. methods: the
    records whose series fix the colours, default `records`.
    """
    shown = [(r, s) for r, s in zip(records, report.series(records), strict=True)
             if (r.get("damage") or {}).get("overall")]
    if not shown:
        return nothing("no run says where its loss increase sits")
    rows = dict.fromkeys((s["kind"], s["name"]) for r, _ in shown for s in r["damage"]["slices"])
    kinds = list(dict.fromkeys(kind for kind, _ in rows))
    step = 1 + 0.45 * (len(shown) - 1)  # rows of text are a step apart, a heading takes one as well
    fig = new_figure(8.4, 0.9 + 0.215 * step * len(rows) + 0.3 * len(kinds))
    ax, styles = fig.subplots(), series_styles(methods or records)
    at, ticks, y = {}, [], 0.0
    for kind in kinds:
        y += 1.3
        ax.annotate(HEADINGS.get(kind, kind), (0, y), xycoords=("axes fraction", "data"), xytext=(-6, 0),
                    textcoords="offset points", ha="right", va="center", fontweight="bold")
        y += 0.35
        for row in (row for row in rows if row[0] == kind):
            at[row] = y + step / 2
            ticks.append((at[row], report.clean(row[1])))
            y += step
    for i, (record, series) in enumerate(shown):
        _damage_series(ax, record["damage"], at, (i - (len(shown) - 1) / 2) * 0.45, styles[series][0])
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(y + 0.5, 0.3)
    ax.grid(False, axis="y")
    ax.margins(x=0.04)
    ax.set_xlabel("mean increase of the loss against the dense model (nats a token)")
    legend(fig, [handle(s, styles[s][0], "-", "o") for s in dict.fromkeys(s for _, s in shown)])
    return fig


HEADINGS = {"text": "named text", "content": "content", "frequency": "how frequent", "position": "place in its window"}


def _damage_series(ax, found, at, shift, colour):
    """One run's slices at the heights `at`, and its whole as a vertical line."""
    ax.axvline(found["overall"]["increase"], color=colour, lw=1, ls=(0, (4, 3)), zorder=1)
    for s in found["slices"]:
        y, x, half = at[s["kind"], s["name"]] + shift, s["increase"], s["half"]
        if half is not None:
            ax.plot([x - half, x + half], [y, y], color=colour, lw=1.4, solid_capstyle="butt", zorder=2)
        marker, face = ("x" if half is None else "o"), (colour if s["verdict"] else PAPER)
        ax.plot([x], [y], ls="none", marker=marker, ms=4.5, color=colour, mfc=face, mew=1.2, zorder=3)


# ---------------------------------------------------------------- tasks

@drawn
def fig_tasks(records):
    """Tasks down, a dot a run with two standard errors to each side; a tick where a uniform guess would be.

    The members of a group are left out, and what is no share (a perplexity).
    """
    records = report.ordered(records)
    found = [c for c in report.columns(records) if report.is_task(records, c)
             and not accuracy.is_member(records, c.metric) and all((report.value(r, c) or 0) <= 1 for r in records)]
    runs = [(r, label) for r, label in zip(records, report.labels(records), strict=True)
            if any(report.value(r, c) is not None for c in found)]
    if not runs:
        return nothing("no run has measured a task")
    pruned = itertools.cycle(COLOURS)
    colours = {label: INK if report.is_dense(r) else next(pruned) for r, label in runs}
    step = 0.5 + 0.5 * len(runs)
    fig = new_figure(8.4, 0.9 + 0.2 * step * len(found))
    ax = fig.subplots()
    for i, column in enumerate(found):
        y = step * i
        chances = {accuracy.how(r, column.metric).get("chance") for r, _ in runs} - {None}
        for x in chances:
            ax.plot([x, x], [y - step / 2.4, y + step / 2.4], color=MUTED, lw=3, alpha=0.5, solid_capstyle="butt",
                    zorder=1)
        for j, (record, label) in enumerate(runs):
            x, at = report.value(record, column), y + (j - (len(runs) - 1) / 2) * 0.5
            if x is None:
                continue
            half = accuracy.SURE * (accuracy.how(record, column.metric).get("stderr") or 0)
            ax.plot([x - half, x + half], [at, at], color=colours[label], lw=1.4, zorder=2)
            ax.plot([x], [at], color=colours[label], marker="o", ms=4.5, zorder=3)
    ax.set_yticks([step * i for i in range(len(found))], [c.header for c in found])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(step * (len(found) - 0.5), -step / 2)
    ax.grid(False, axis="y")
    ax.set_xlabel("share right, ± 2 standard errors; grey: a uniform guess")
    legend(fig, [handle(label, colour, "-", "o") for label, colour in colours.items()])
    return fig


# ---------------------------------------------------------------- time

@drawn
def fig_time(records):
    """Where the seconds of each run went: one stacked bar a run."""
    records = report.ordered(records)
    parts = [seconds(r) for r in records]
    if not any(parts):
        return nothing("no run has its seconds in the record")
    colour = {name: c for name, c in PARTS.items() if any(p.get(name) for p in parts)}
    fig = new_figure(WIDTH, 0.95 + 0.27 * len(records))
    ax = fig.subplots()
    for i, part in enumerate(parts):
        left = 0.0
        for name in colour:
            ax.barh(i, part.get(name, 0), 0.72, left=left, color=colour[name])
            left += part.get(name, 0)
        ax.annotate(f"{report.number(left, 3)} s", (left, i), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=8)
    names = [t if len(t) <= 48 else f"{t[:23]}…{t[-24:]}" for t in report.labels(records)]
    ax.set_yticks(range(len(records)), names)
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.margins(x=0.08)
    ax.set_xlim(left=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("wall time (seconds)")
    legend(fig, [handle(name, c, "none", "s") for name, c in colour.items()])
    return fig


PARTS = {"load": COLOURS[0], "data": "#F0E442", "collect": COLOURS[1], "solve": COLOURS[2],
         "replay": COLOURS[3], "other pruning": COLOURS[4], "evaluate": COLOURS[5], "other": COLOURS[6]}


def seconds(record):
    """{part: seconds} of one run, without the parts that took none: they add up to its total."""
    told = {k: v for k, v in (record.get("seconds") or {}).items() if isinstance(v, (int, float))}
    parts = {}
    for block in record.get("blocks") or []:
        for name, spent in (block.get("seconds") or {}).items():
            name = name if name in PARTS else "other pruning"
            parts[name] = parts.get(name, 0) + (spent or 0)
    rest = max(0, told.get("prune", 0) - sum(parts.values()))
    parts["other pruning"] = parts.get("other pruning", 0) + rest
    for name in ("load", "data", "evaluate"):
        parts[name] = parts.get(name, 0) + told.get(name, 0)
    parts["other"] = max(0, told.get("total", 0) - sum(parts.values()))
    return {name: spent for name, spent in parts.items() if spent > 0}
