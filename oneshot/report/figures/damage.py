"""Where the loss increase sits: which parts of the text a pruned model lost more on."""

from typing import TYPE_CHECKING

from ..columns import clean, series
from .drawing import PAPER, drawn, handle, legend, new_figure, nothing, series_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADINGS = {"text": "named text", "content": "content", "frequency": "how frequent", "position": "place in its window"}


@drawn
def fig_damage(records: list[dict], among: list[dict] | None = None) -> "Figure":
    """Mean loss increase of every slice of the text with its 95 % interval, and of the whole text as a dashed line.

    Each series has a colour. A filled dot: the mean of the whole text lies outside the interval. A cross: too few
    windows for an interval. among: all records of the page, if `records` are a part of them, so that a series has the
    same name and colour in all pictures.
    """
    shown = [(r, name) for r, name in zip(records, series(records, among), strict=True)
             if (r.get("damage") or {}).get("slices")]
    if not shown:
        return nothing("no run says where its loss increase sits")
    rows = dict.fromkeys((s["kind"], s["name"]) for r, _ in shown for s in r["damage"]["slices"])
    kinds = list(dict.fromkeys(kind for kind, _ in rows))
    step = 1 + 0.45 * (len(shown) - 1)  # rows of text are one step apart, and so are headings
    fig = new_figure(8.4, 0.9 + 0.215 * step * len(rows) + 0.3 * len(kinds))
    ax, styles = fig.subplots(), series_styles(among or records)
    at, ticks, y = {}, [], 0.0
    for kind in kinds:
        y += 1.3
        ax.annotate(HEADINGS.get(kind, kind), (0, y), xycoords=("axes fraction", "data"), xytext=(-6, 0),
                    textcoords="offset points", ha="right", va="center", fontweight="bold")
        y += 0.35
        for row in (row for row in rows if row[0] == kind):
            at[row] = y + step / 2
            ticks.append((at[row], clean(row[1])))
            y += step
    for i, (record, name) in enumerate(shown):
        _draw_slices(ax, record["damage"], at, (i - (len(shown) - 1) / 2) * 0.45, styles[name][0])
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(y + 0.5, 0.3)
    ax.grid(False, axis="y")
    ax.margins(x=0.04)
    ax.set_xlabel("mean increase of the loss against the dense model (nats a token)")
    legend(fig, [handle(s, styles[s][0], "-", "o") for s in dict.fromkeys(s for _, s in shown)])
    return fig


def _draw_slices(ax, found, at, shift, colour):
    """Draw one run: its slices at the heights `at`, the whole text as a vertical line."""
    ax.axvline(found["overall"]["increase"], color=colour, lw=1, ls=(0, (4, 3)), zorder=1)
    for s in found["slices"]:
        y, x, half = at[s["kind"], s["name"]] + shift, s["increase"], s["half"]
        if half is not None:
            ax.plot([x - half, x + half], [y, y], color=colour, lw=1.4, solid_capstyle="butt", zorder=2)
        marker, face = ("x" if half is None else "o"), (colour if s["verdict"] else PAPER)
        ax.plot([x], [y], ls="none", marker=marker, ms=4.5, color=colour, mfc=face, mew=1.2, zorder=3)
