"""Healing on text: the held-out loss against the tokens that were trained on."""

import math
from typing import TYPE_CHECKING

from ..columns import ordered, series
from .drawing import drawn, handle, legend, new_figure, nothing, scale_y, series_styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawn
def fig_healing(records: list[dict], among: list[dict] | None = None) -> "Figure":
    """The held-out loss after each look, from before healing on, one line for every series; a break is a lowered rate.

    among: all records of the page, so that a series has the same colour in all pictures.
    """
    styles, lines = series_styles(among or records), []
    records = ordered(records)
    for record, name in zip(records, series(records, among), strict=True):
        lines += [(name, label, curve) for label, curve in curves(record).items()]
    if not lines:
        return nothing("no run has healed on text")
    fig = new_figure(7.6, 2.9)
    ax = fig.subplots()
    for name, _, curve in lines:
        for stretch in curve:
            tokens, losses = zip(*stretch, strict=True)
            ax.plot(tokens, losses, color=styles[name][0], ls=styles[name][1], marker="o", ms=2.8)
    log = scale_y([ax], [loss for _, _, curve in lines for stretch in curve for _, loss in stretch])
    ax.set_xlabel("tokens trained on")
    ax.set_ylabel("held-out loss (nats)" + (", log scale" if log else ""))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")
    legend(fig, [handle(name, *styles[name]) for name in dict.fromkeys(name for name, _, _ in lines)])
    return fig


def curves(record: dict) -> dict[str, list[list[tuple[float, float]]]]:
    """{healing method: [stretches of (tokens, held-out loss)]} of a record, one stretch for each learning rate."""
    found = {}
    for name, info in (record.get("heal") or {}).items():
        if not isinstance(info, dict) or not info.get("attempts") or not info.get("steps"):
            continue
        step, done, curve = info["tokens"] / info["steps"], 0, []
        for attempt in info["attempts"]:
            stretch = [(step * (done + at), loss) for at, loss in attempt["looks"] if math.isfinite(loss)]
            curve.append([(0.0, info["held_out_before"]), *stretch] if not done else stretch)
            done += attempt["steps"]
        found[name] = [stretch for stretch in curve if stretch]
    return found
