"""Quality against bytes, with the Pareto front: the runs that no other run beats in both."""

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from ..columns import (
    Column,
    clean,
    columns,
    higher_is_better,
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
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME = 1.005  # sizes that differ by less than half a percent count as equal
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))


@drawn
def fig_bytes(records: list[dict], metric: str, bytes_of: Callable[[dict], float | None]) -> "Figure":
    """A metric against the size of the model, one panel for each model and window, with the Pareto front.

    metric: a key of the metrics or the header of a column. bytes_of: record -> bytes of the whole model as it would be
    stored, or None where that is not known. Seeds: the mean, with a bar from lowest to highest. The runs on the front
    are numbered, and listed below the panel.
    """
    names = model_names(records)
    chosen = [c for c in columns(records) if metric in (c.metric, c.header)]
    panels = [(c, key, points) for c in chosen for key in names
              if (points := sized([r for r in records if identity(r) == key], c, bytes_of))]
    if not panels:
        return nothing(f"no run has the metric {metric} and a known size")
    styles = series_styles(records)
    patterns = sorted({p for *_, points in panels for _, p in points if ":" in p}, key=pattern_key)
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


def sized(records: list[dict], column: Column, bytes_of: Callable) -> dict[tuple[str, str], tuple[float, list[float]]]:
    """{(series, pattern): (mean bytes, [values])} of the finite values; the dense model is ("dense", "dense")."""
    found = {}
    records = ordered(records)
    for record, name in zip(records, series(records), strict=True):
        x, size = value(record, column), bytes_of(record)
        if x is not None and math.isfinite(x) and size:
            key = ("dense", "dense") if is_dense(record) else (name, clean(pattern_of(record)))
            found.setdefault(key, ([], []))[0].append(size)
            found[key][1].append(x)
    return {key: (sum(sizes) / len(sizes), values) for key, (sizes, values) in found.items()}


def front(points: dict[Hashable, tuple[float, list[float]]], higher_is_better: bool = False) -> list[Hashable]:
    """The keys of `points` {key: (size, values)} that no other point beats, smallest size first.

    A point beats another if its mean is better and its size at most a factor of SAME larger: a difference that small
    comes from rounding the counts of a pattern. With equal means the smaller size wins.
    """
    sign = -1 if higher_is_better else 1
    costs = {key: (size, sign * sum(values) / len(values)) for key, (size, values) in points.items()}

    def beaten(size, mean):
        return any((m < mean and s <= SAME * size) or (m == mean and s < size) for s, m in costs.values())

    return sorted((key for key in costs if not beaten(*costs[key])), key=costs.get)


def _bytes_panel(ax, points, column, styles, markers):
    scale, unit = next((s, u) for s, u in UNITS if max(size for size, _ in points.values()) >= s)
    for (name, pattern), (size, values) in points.items():
        if name == "dense":
            mark(ax, size / scale, values, INK, "*", ms=10)
            continue
        hollow = {"mfc": "none", "mew": 1.6, "ms": 6.5} if pattern in markers else {}
        mark(ax, size / scale, values, styles[name][0], markers.get(pattern, "o"), **hollow)
    best = front(points, higher_is_better(column.metric))
    corners = [(points[key][0] / scale, sum(points[key][1]) / len(points[key][1])) for key in best]
    ax.plot(*zip(*corners, strict=True), color=MUTED, lw=1, drawstyle="steps-post", zorder=1)
    listed = []
    for i, ((name, pattern), (x, y)) in enumerate(zip(best, corners, strict=True), 1):
        ax.annotate(str(i), (x, y), xytext=(-4, -5), textcoords="offset points", ha="right", va="top", fontsize=7.5)
        run = "dense" if name == "dense" else f"{name} {pattern}"
        listed.append(f"{i}  {run}: {number(y)} at {number(x, 3)} {unit}")
    values = [v for _, vs in points.values() for v in vs]
    ax.margins(x=0.06, y=0.1)
    log = scale_y([ax], values)
    ax.set_ylabel(column.header + (", log scale" if log else ""))
    lines = [f"size of the whole model ({unit})", "", "on the front:", *listed]
    ax.set_xlabel("\n".join(lines), multialignment="left")
