"""Pictures by depth: the error and the sparsity of every pruned linear against the place of its block in the model."""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..columns import clean, identity, is_dense, layer_sparsity, model_names, ordered, pattern_of, series
from .drawing import (
    COLOURS,
    WIDTH,
    drawn,
    handle,
    kind,
    legend,
    new_figure,
    nothing,
    scale_y,
    series_styles,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = dict  # {(model, pattern): {kind of linear: {series: {block: [values]}}}}


@drawn
def fig_layer_errors(records: list[dict], among: list[dict] | None = None) -> "Figure":
    """Relative output error of every pruned linear against the depth of its block, one panel for each kind of linear.

    One row of panels for every model and pattern, one line for every series: the median where several experts or seeds
    fall on one point, with a band over their range. among: all records of the page, if `records` are a part of them, so
    that a series has the same name and colour in all pictures.
    """
    return _by_depth(records, lambda layer: layer.get("relative_error"), "relative error", among)


@drawn
def fig_layer_sparsity(records: list[dict], among: list[dict] | None = None) -> "Figure":
    """Share of zeros in every pruned linear against the depth of its block, arranged like `fig_layer_errors`.

    Where all linears of a pattern hold the same share (to 0.1 %), one panel shows all patterns.
    """
    points = _points(records, layer_sparsity, among)
    shares = {}
    for (_, pattern), panels in points.items():
        values = _values(panels)
        if max(values) - min(values) > 1e-3:
            return _by_depth(records, layer_sparsity, "zeros", among, percent=True)
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


def _by_depth(records, measure, name, among, percent=False):
    """The picture of one quantity: `measure` gives it for a row of record["layers"], `name` is its name on the axis."""
    points = _points(records, measure, among)
    kinds = list(dict.fromkeys(k for panels in points.values() for k in panels))
    if not kinds:
        return nothing(f"no layer has a {name} in its record")
    panels = [(row, k) for row in points for k in kinds]
    across = len(kinds) if len(points) > 1 else min(4, len(kinds))
    down = math.ceil(len(panels) / across)
    height = 1.75 if len(points) == 1 else 1.45
    fig = new_figure(max(min(WIDTH, 2.75 * across), 1.3 * across), 0.75 + height * down)
    grid = fig.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    flat, titles, styles = list(grid.flat), short_names(kinds), series_styles(among or records)
    for ax, (row, k) in zip(flat, panels, strict=False):
        for method, blocks in points[row].get(k, {}).items():
            _line(ax, blocks, *styles[method])
        if len(points) == 1 or row == next(iter(points)):
            ax.set_title(titles[k], loc="left")
    for ax in flat[len(panels):]:
        ax.remove()
    for i, ax in enumerate(flat[: len(panels)]):  # numbers below each column; the last row may be short
        ax.tick_params(labelbottom=i + across >= len(panels), bottom=i + across >= len(panels))
    _name_rows(grid, points)
    values = [v for panels in points.values() for v in _values(panels)]
    log = scale_y(flat[: len(panels)], values, percent)
    if percent:
        flat[0].set_ylim(max(0, min(values) - 0.05), min(1, max(values) + 0.05))
    last = _last_block(points)
    flat[0].set_xlim(-0.04 * last - 0.2, 1.04 * last + 0.2)
    flat[0].xaxis.get_major_locator().set_params(integer=True, nbins=6)
    fig.supxlabel("block (0 is next to the input)", fontsize=9)
    fig.supylabel(f"{name} (%)" if percent else name + (", log scale" if log else ""), fontsize=9)
    used = {s for panels in points.values() for lines in panels.values() for s in lines}
    legend(fig, [handle(s, *style) for s, style in styles.items() if s in used])
    return fig


def _name_rows(grid, points):
    """Name the rows of panels, where there are several, by pattern (and model)."""
    if len(points) > 1:
        several = len({model for model, _ in points}) > 1
        for line, (model, pattern) in zip(grid, points, strict=True):
            line[0].set_ylabel(f"{model}\n{pattern}" if several else pattern, fontweight="bold")


def _points(records: list[dict], measure: Callable[[dict], float | None], among: list[dict] | None) -> Points:
    """What `measure` gives for each row of record["layers"], where it is finite; dense runs are left out."""
    names, points = model_names(records), {}
    records = ordered(records)
    for record, name in zip(records, series(records, among), strict=True):
        row = names[identity(record)], clean(pattern_of(record))
        for layer in [] if is_dense(record) else record.get("layers") or []:
            x = None if layer.get("pattern") == "dense" else measure(layer)  # left dense on purpose
            if x is not None and math.isfinite(x):
                which = kind(layer.get("linear", layer.get("name")))
                line = points.setdefault(row, {}).setdefault(which, {}).setdefault(name, {})
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
