"""Pictures that help to choose what to prune: quality against bytes, and which linears a model can least spare.

    front    the runs that no other beats in both: fewer bytes is worse quality
    series, pattern, kind    as in figures.py
"""

import math

from ... import report
from .drawing import (
    INK,
    MARKERS,
    MUTED,
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
from . import kind

SAME = 1.005  # sizes that differ by less than half a percent count as one
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))


# ---------------------------------------------------------------- quality against bytes

@drawn
def fig_bytes(records, metric, bytes_of):
    """A metric against the size of the model, a panel per model and window, with the Pareto front and what is on it.

    metric: a key of the metrics or a column's header. bytes_of: record -> bytes of the whole model as it would be
    stored, or None where that is not known. Seeds: the mean, and a bar from lowest to highest.
    """
    names = report.model_names(records)
    chosen = [c for c in report.columns(records) if metric in (c.metric, c.header)]
    panels = [(c, key, points) for c in chosen for key in names
              if (points := sized([r for r in records if report.identity(r) == key], c, bytes_of))]
    if not panels:
        return nothing(f"no run has the metric {metric} and a known size")
    styles = series_styles(records)
    patterns = sorted({p for *_, points in panels for _, p in points if ":" in p}, key=report.pattern_key)
    markers = {p: MARKERS[i % len(MARKERS)] for i, p in enumerate(patterns)}
    across = min(2, len(panels))
    fig = new_figure(7.6 if across == 1 else WIDTH, 0.6 + 4.4 * math.ceil(len(panels) / across))
    flat = list(fig.subplots(math.ceil(len(panels) / across), across, squeeze=False).flat)
    for ax, (column, key, points) in zip(flat, panels, strict=False):
        _bytes_panel(ax, points, column, styles, markers)
        ax.set_title(names[key] if len(names) > 1 else "", loc="left", fontweight="bold")
    for ax in flat[len(panels):]:
        ax.remove()
    used = {s for *_, points in panels for s, _ in points}
    legend(fig, [handle(m, c, "none") for m, (c, _) in styles.items() if m in used]
           + [handle(p, INK, "none", m, filled=False) for p, m in markers.items()] + [handle("dense", INK, "none", "*")]
           + [handle("Pareto front", MUTED, marker="")])
    return fig


def sized(records, column, bytes_of):
    """{(series, pattern): (mean bytes, [values])} of what was measured; the dense model is ("dense", "dense")."""
    found = {}
    records = report.ordered(records)
    for record, series in zip(records, report.series(records), strict=True):
        x, size = report.value(record, column), bytes_of(record)
        if x is not None and math.isfinite(x) and size:
            key = ("dense", "dense") if report.is_dense(record) else (series, report.clean(report.pattern_of(record)))
            found.setdefault(key, ([], []))[0].append(size)
            found[key][1].append(x)
    return {key: (sum(sizes) / len(sizes), values) for key, (sizes, values) in found.items()}


def front(points, higher_is_better=False):
    """The keys of `points` {key: (size, values)} that no other beats, smallest first.

    A better mean at a size up to SAME larger beats: so little is the rounding of a pattern's counts, not a saving.
    """
    sign = -1 if higher_is_better else 1
    costs = {key: (size, sign * sum(values) / len(values)) for key, (size, values) in points.items()}

    def beaten(size, mean):
        return any((m < mean and s <= SAME * size) or (m == mean and s < size) for s, m in costs.values())

    return sorted((key for key in costs if not beaten(*costs[key])), key=costs.get)


def _bytes_panel(ax, points, column, styles, markers):
    scale, unit = next((s, u) for s, u in UNITS if max(size for size, _ in points.values()) >= s)
    for (series, pattern), (size, values) in points.items():
        if series == "dense":
            mark(ax, size / scale, values, INK, "*", ms=10)
            continue
        hollow = {"mfc": "none", "mew": 1.6, "ms": 6.5} if pattern in markers else {}
        mark(ax, size / scale, values, styles[series][0], markers.get(pattern, "o"), **hollow)
    best = front(points, report.higher_is_better(column.metric))
    corners = [(points[key][0] / scale, sum(points[key][1]) / len(points[key][1])) for key in best]
    ax.plot(*zip(*corners, strict=True), color=MUTED, lw=1, drawstyle="steps-post", zorder=1)
    key = []
    for i, ((series, pattern), (x, y)) in enumerate(zip(best, corners, strict=True), 1):
        ax.annotate(str(i), (x, y), xytext=(-4, -5), textcoords="offset points", ha="right", va="top", fontsize=7.5)
        name = "dense" if series == "dense" else f"{series} {pattern}"
        key.append(f"{i}  {name}: {report.number(y)} at {report.number(x, 3)} {unit}")
    values = [v for _, vs in points.values() for v in vs]
    ax.margins(x=0.06, y=0.1)
    log = scale_y([ax], values)
    ax.set_ylabel(column.header + (", log scale" if log else ""))
    lines = [f"size of the whole model ({unit})", "", "on the front:", *key]
    ax.set_xlabel("\n".join(lines), multialignment="left")


# ---------------------------------------------------------------- sensitivity

@drawn
def fig_sensitivity(records):
    """A heat map of record["sensitivity"] for each record that has one: blocks across, kinds of linear down.

    The colour is `loss_increase`, how much the loss (nats per token) grows when this linear alone is pruned; linears of
    one kind and block (experts) are averaged. White: no increase, or not measured.
    """
    maps = [(label, cells(r)) for r, label in zip(records, report.labels(records), strict=True)]
    maps = [(label, grid) for label, grid in maps if grid]
    if not maps:
        return nothing("no run has measured its linears' sensitivity")
    kinds = list(dict.fromkeys(k for _, grid in maps for k, _ in grid))
    blocks = 1 + max(b for _, grid in maps for _, b in grid)
    positive = [v for _, grid in maps for v in grid.values() if v > 0 and math.isfinite(v)]
    if not positive:
        return nothing("pruning no single linear raised the loss")
    fig = new_figure(min(WIDTH, max(5.5, 2.6 + 0.3 * blocks)), 0.8 + len(maps) * (0.5 + 0.26 * len(kinds)))
    axes = fig.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    norm = _norm(positive)
    for ax, (label, grid) in zip(axes, maps, strict=True):
        image = _heat(ax, grid, kinds, blocks, norm)
        ax.set_title(label, loc="left")
    axes[-1].set_xlabel("block (0 is next to the input)")
    bar = fig.colorbar(image, ax=list(axes), shrink=0.9, pad=0.02, format=lambda x, _: f"{x:g}")
    bar.ax.minorticks_off()
    bar.set_label("loss increase (nats per token)")
    bar.outline.set_visible(False)
    return fig


def cells(record):
    """{(kind, block): mean loss increase} of one record."""
    found = {}
    for entry in record.get("sensitivity") or []:
        x = entry.get("loss_increase")
        if x is not None and math.isfinite(x):
            where = kind(entry.get("linear", entry.get("name"))), int(entry.get("block") or 0)
            found.setdefault(where, []).append(x)
    return {where: sum(xs) / len(xs) for where, xs in found.items()}


def _norm(positive):
    from matplotlib import colors

    low, high = min(positive), max(positive)
    return colors.LogNorm(max(low, high / 1000), high) if high > 10 * low else colors.Normalize(0, high)


def _heat(ax, grid, kinds, blocks, norm):
    """One heat map; cividis: even in brightness, and alike to the colour-blind."""
    from matplotlib import colormaps

    rows = [[grid.get((k, b), math.nan) for b in range(blocks)] for k in kinds]
    rows = [[x if x > 0 else math.nan for x in row] for row in rows]
    ax.set_facecolor("none")
    image = ax.imshow(rows, aspect="auto", norm=norm, cmap=colormaps["cividis"], interpolation="nearest")
    names = short_names(kinds)
    ax.set_yticks(range(len(kinds)), [names[k] for k in kinds])
    ax.xaxis.get_major_locator().set_params(integer=True, nbins=12)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image
