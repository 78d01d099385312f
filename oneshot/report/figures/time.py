"""Where the time of each run went."""

from typing import TYPE_CHECKING

from ..columns import labels, number, ordered
from .drawing import COLOURS, WIDTH, drawn, handle, legend, new_figure, nothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The parts shown, in this order; what else a block's seconds hold ("dense") is "other pruning".
PARTS = {"load": COLOURS[0], "data": "#F0E442", "collect": COLOURS[1], "solve": COLOURS[2],
         "replay": COLOURS[3], "heal": "#7B3294", "other pruning": COLOURS[4], "evaluate": COLOURS[5],
         "other": COLOURS[6]}


@drawn
def fig_time(records: list[dict]) -> "Figure":
    """Where the seconds of each run went: one stacked bar for each run."""
    records = ordered(records)
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
        ax.annotate(f"{number(left, 3)} s", (left, i), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=8)
    names = [t if len(t) <= 48 else f"{t[:23]}…{t[-24:]}" for t in labels(records)]
    ax.set_yticks(range(len(records)), names)
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.margins(x=0.08)
    ax.set_xlim(left=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("wall time (seconds)")
    legend(fig, [handle(name, c, "none", "s") for name, c in colour.items()])
    return fig


def seconds(record: dict) -> dict[str, float]:
    """{part: seconds} of one run, without parts that took no time; they add up to the run's total."""
    total = {k: v for k, v in (record.get("seconds") or {}).items() if isinstance(v, (int, float))}
    parts = {}
    for block in record.get("blocks") or []:
        for name, spent in (block.get("seconds") or {}).items():
            name = name if name in PARTS else "other pruning"
            parts[name] = parts.get(name, 0) + (spent or 0)
    for info in (record.get("heal") or {}).values():  # of the whole model; of single blocks it is above
        spent = info.get("seconds") if isinstance(info, dict) else None
        parts["heal"] = parts.get("heal", 0) + (spent if isinstance(spent, int | float) else 0)
    rest = max(0, total.get("prune", 0) - sum(parts.values()))
    parts["other pruning"] = parts.get("other pruning", 0) + rest
    for name in ("load", "data", "evaluate"):
        parts[name] = parts.get(name, 0) + total.get(name, 0)
    parts["other"] = max(0, total.get("total", 0) - sum(parts.values()))
    return {name: spent for name, spent in parts.items() if spent > 0}
