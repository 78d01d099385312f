"""Results of lm-eval tasks with their standard errors."""

import itertools
from typing import TYPE_CHECKING

from .. import accuracy
from ..columns import columns, is_dense, is_task, labels, ordered, value
from .drawing import COLOURS, INK, MUTED, drawn, handle, legend, new_figure, nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawn
def fig_tasks(records: list[dict]) -> "Figure":
    """Tasks down, one dot for each run with two standard errors to each side, a grey tick at the level of chance.

    Left out: tasks that are part of a group, and values that are no share (a perplexity).
    """
    records = ordered(records)
    found = [c for c in columns(records) if is_task(records, c)
             and not accuracy.is_member(records, c.metric) and all((value(r, c) or 0) <= 1 for r in records)]
    runs = [(r, label) for r, label in zip(records, labels(records), strict=True)
            if any(value(r, c) is not None for c in found)]
    if not runs:
        return nothing("no run has measured a task")
    pruned = itertools.cycle(COLOURS)
    colours = {label: INK if is_dense(r) else next(pruned) for r, label in runs}
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
            x, at = value(record, column), y + (j - (len(runs) - 1) / 2) * 0.5
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
