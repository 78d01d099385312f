"""Quality against measured speed: smaller, sparse and rounded models in one picture."""

import math
from typing import TYPE_CHECKING

from ..columns import (
    clean,
    columns,
    identity,
    is_dense,
    is_rounded,
    method_of,
    model_names,
    ordered,
    pattern_of,
    value,
)
from .drawing import COLOURS, INK, MARKERS, MUTED, WIDTH, drawn, handle, legend, mark, new_figure, nothing, scale_y

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"smaller": (COLOURS[0], "o"), "sparse": (COLOURS[1], MARKERS[1]), "rounded": (COLOURS[2], MARKERS[2]),
         "dense": (INK, "*")}


@drawn
def fig_speed(records: list[dict], metric: str, kind: str = "decode1") -> "Figure":
    """A metric against the measured speedup over the dense model, one panel for each model.

    metric: a key of the metrics or the header of a column. kind: which time, of measure/latency.py. A run without a
    measured time is not shown.
    """
    names = model_names(records)
    chosen = [c for c in columns(records) if metric in (c.metric, c.header)]
    panels = [(c, key, points) for c in chosen for key in names
              if (points := placed([r for r in records if identity(r) == key], c, kind))]
    if not panels:
        return nothing(f"no run has the metric {metric} and a measured time (--latency)")
    fig = new_figure(7.6 if len(panels) == 1 else WIDTH, 0.6 + 4.2 * math.ceil(len(panels) / 2))
    flat = list(fig.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False).flat)
    for ax, (column, key, points) in zip(flat, panels, strict=False):
        for text, what, x, y in points:
            mark(ax, x, [y], *KINDS[what])
            ax.annotate(text, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
        ax.axvline(1, color=MUTED, lw=1, ls="--", zorder=1)
        log = scale_y([ax], [y for *_, y in points])
        ax.set_ylabel(column.header + (", log scale" if log else ""))
        ax.set_xlabel(f"{kind}: times as fast as the dense model")
        ax.set_title(names[key] if len(names) > 1 else "", loc="left", fontweight="bold")
        ax.margins(x=0.15, y=0.12)
    for ax in flat[len(panels):]:
        ax.remove()
    used = {what for *_, points in panels for _, what, *_ in points}
    legend(fig, [handle(what, colour, "none", m) for what, (colour, m) in KINDS.items() if what in used])
    return fig


def placed(records: list[dict], column: object, kind: str) -> list[tuple[str, str, float, float]]:
    """[(what was asked for, a key of KINDS, speedup, value)] of the runs with a measured time."""
    found = []
    for record in ordered(records):
        y, x = value(record, column), (record.get("metrics") or {}).get(f"latency/{kind}_speedup")
        x = 1.0 if is_dense(record) else x
        if x and y is not None and math.isfinite(y):
            what = "dense" if is_dense(record) else "smaller" if record.get("shrunk") else \
                "rounded" if is_rounded(record) else "sparse"
            found.append(("dense" if what == "dense" else asked(record), what, float(x), float(y)))
    return found


def asked(record: dict) -> str:
    """Method and pattern, with what is left of a smaller model."""
    return clean(f"{method_of(record)} {pattern_of(record)}")
