"""Perplexity (or any metric) against sparsity."""

import itertools
import math
from typing import TYPE_CHECKING

from ..columns import (
    Column,
    clean,
    columns,
    identity,
    is_dense,
    model_names,
    number,
    ordered,
    pattern_key,
    pattern_of,
    series,
    value,
)
from .drawing import (
    GRID,
    INK,
    MARKERS,
    WIDTH,
    drawn,
    handle,
    legend,
    mark,
    new_figure,
    nothing,
    scale_y,
    series_styles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawn
def fig_perplexity(records: list[dict], metric: str) -> "Figure":
    """A metric against sparsity: one line for each series, N:M patterns as hollow markers, the dense model dashed.

    metric: a key of the metrics or the header of a column. One panel for each model and window. Points of N:M patterns
    with equal sparsity would hide each other, so every N:M pattern has its own column at the right of the panel, the
    series side by side. Seeds: the mean, with a bar from lowest to highest. Values that are not finite are named below
    the panel.
    """
    names = model_names(records)
    chosen = [c for c in columns(records) if metric in (c.metric, c.header)]
    panels = [(c, key) for c in chosen for key in names
              if any(value(r, c) is not None for r in records if identity(r) == key)]
    if not panels:
        return nothing(f"no run has the metric {metric}")
    styles, across = series_styles(records), min(2, len(panels))
    down = math.ceil(len(panels) / across)
    fig = new_figure(7.6 if across == 1 else WIDTH, 0.6 + 3.4 * down)
    flat = list(fig.subplots(down, across, squeeze=False).flat)
    patterns = [p for p in dict.fromkeys(pattern_of(r) for r in ordered(records)) if columned(p)]
    markers = dict(zip(sorted(patterns, key=pattern_key), itertools.cycle(MARKERS), strict=False))
    for ax, (column, key) in zip(flat, panels, strict=False):
        _perplexity_panel(ax, [r for r in records if identity(r) == key], column, styles, markers)
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
        ax.annotate(f"dense {number(dense)}", (1, dense), xycoords=("axes fraction", "data"),
                    xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_ylabel(column.header + (", log scale" if log else ""))
    if lost:
        named = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
        ax.set_xlabel(f"{ax.get_xlabel()}\nnot finite, not drawn: {named}")


def columned(pattern: str) -> bool:
    """Whether a pattern has its own column in the panel: N:M, and int<b> (rounding without pruning)."""
    return ":" in pattern or pattern.startswith("int")


def measured(records: list[dict], column: Column) -> tuple[dict, float | None, list[str]]:
    """({(series, pattern): (sparsity, [values])}, dense value or None, [runs whose value is not finite])."""
    points, dense, lost = {}, None, []
    records = ordered(records)
    for record, method in zip(records, series(records), strict=True):
        x, pattern = value(record, column), pattern_of(record)
        if x is None:
            continue
        if not math.isfinite(x):
            lost.append(f"{method} {clean(pattern)}")
        elif is_dense(record):
            dense = x
        else:
            points.setdefault((method, pattern), (record.get("sparsity") or 0, []))[1].append(x)
    return points, dense, lost


def _places(points, markers):
    """{pattern: (x, width)}: its sparsity and width 0, or a column for N:M and for a single unstructured pattern."""
    found = {}
    for (_, pattern), (x, _) in points.items():
        found.setdefault(pattern, []).append(x)
    free = {p: sum(xs) / len(xs) for p, xs in found.items() if p not in markers}
    span = max(free.values(), default=0) - min(free.values(), default=0)
    if span < 0.005:
        free, step, edge = {}, 1.0, -1.0
    else:
        step, edge = span / 4, max(free.values())
    columns = sorted((p for p in found if p not in free), key=pattern_key)
    placed = {p: (x, 0) for p, x in free.items()}
    return placed | {p: (edge + i * step, step) for i, p in enumerate(columns, 1)}


def _pattern_axis(ax, points, places):
    """Ticks of the x axis: sparsities in percent, then the columns of the N:M patterns, each behind a thin line."""
    sparsity = {pattern: x for (_, pattern), (x, _) in points.items()}
    free = [x for x, width in places.values() if not width]
    span = max(free) - min(free) if free else 0
    whole = max(x + width / 2 for x, width in places.values()) - min(free, default=0) if places else 0
    ticks, texts = [], []
    for pattern, (x, width) in sorted(places.items(), key=lambda item: item[1]):
        if width or not ticks or x - ticks[-1] > whole / 18:
            ticks.append(x)
            percent = f"{100 * sparsity[pattern]:.3g} %"
            texts.append(f"{clean(pattern)}\n{percent}" if width and columned(pattern) else percent)
    ax.set_xticks(ticks, texts)
    columns = [(x - width / 2, x + width / 2) for x, width in places.values() if width]
    for edge in sorted({round(e, 9) for pair in columns for e in pair})[:-1] if columns else ():
        ax.axvline(edge, color=GRID, lw=1.2)
    if columns:
        ax.set_xlim(right=max(columns)[1])
        ax.set_xlim(left=min(free) - span / 12 if free else min(columns)[0])
    ax.set_xlabel("sparsity (% of the prunable weights that are zero)")
