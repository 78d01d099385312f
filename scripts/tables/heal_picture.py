"""What healing leaves of the excess against the tokens seen, and the held-out loss on the way (heal.svg).

One model: SmolLM2 where it was measured. Tokens seen are those of calibration and those trained on; a dotted line leads
from the model without healing to the healed one.
"""

import statistics
from typing import TYPE_CHECKING

from heal_rows import METRICS, dense_of, excess, is_start, settings_of, texts_of, trained_on_text, way_of, windows_of

from oneshot.report.figures import drawing, healing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL = "smollm2"
PANELS = {"2:4": lambda settings: not settings.get("shrink"), "smaller dense models": lambda s: bool(s.get("shrink"))}
LOSSES = {"KL to the dense model": lambda settings: settings.get("heal_loss", "kl") == "kl",
          "cross-entropy of the next token": lambda settings: settings.get("heal_loss") == "next"}


@drawing.drawn
def picture(found: list[tuple[str, dict]]) -> "Figure":
    """Above: excess against tokens, pruned and smaller models. Below: held-out losses. found: (model, record) each."""
    models = [model for model, record in found if texts_of(record) == METRICS]
    model = MODEL if MODEL in models else next(iter(models), None)
    dense = dense_of(found, model)
    records = [r for m, r in found if m == model and r is not dense and "shuffled" not in way_of(r)]
    if not dense or not records:
        return drawing.nothing("no run has healed on text")
    ways = list(dict.fromkeys(map(way_of, records)))
    colours, markers = drawing.COLOURS, drawing.MARKERS
    styles = {way: (colours[i % len(colours)], markers[(i + i // len(colours)) % len(markers)])
              for i, way in enumerate(ways)}
    fig = drawing.new_figure(drawing.WIDTH, 7.2)
    axes = fig.subplots(2, 2)
    for ax, (title, chosen) in zip(axes[0], PANELS.items(), strict=True):
        excesses(ax, [r for r in records if chosen(settings_of(r))], dense, styles)
        ax.set_title(f"{model}, {title}: excess log-perplexity", loc="left", fontweight="bold")
    for ax, (title, chosen) in zip(axes[1], LOSSES.items(), strict=True):
        losses(ax, [r for r in records if chosen(r["settings"])], styles)
        ax.set_title(f"{model}, held out: {title}", loc="left", fontweight="bold")
    for ax in axes.flat:
        ax.set_xlabel("tokens " + ("seen, of calibration and trained on" if ax in axes[0] else "trained on"))
        ax.set_ylabel("nats" + ", mean of both texts" * (ax in axes[0]))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:g}k" if x else "0")
    drawing.legend(fig, [drawing.handle(way, colour, "-", marker) for way, (colour, marker) in styles.items()])
    return fig


def excesses(ax: "Axes", records: list[dict], dense: dict, styles: dict[str, tuple[str, str]]) -> None:
    """A point a run, and a line from the run that it began with, or the unhealed one of as many windows."""
    for record in records:
        colour, marker = styles[way_of(record)]
        end, starts = tokens_and_excess(record, dense), [r for r in records if is_start(r, record)]
        if starts:
            ax.plot(*zip(tokens_and_excess(starts[0], dense), end, strict=True), color=colour, ls=":", lw=1.2)
        ax.plot(*end, color=colour, ls="none", marker=marker, zorder=3)
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)


def tokens_and_excess(record: dict, dense: dict) -> tuple[int, float]:
    """(tokens seen, excess in nats, mean of both texts) of a run."""
    seen = windows_of(record) * record["settings"]["seqlen"] + trained_on_text(record).get("tokens", 0)
    return seen, statistics.fmean(excess(record, dense, metric) for metric in METRICS)


def losses(ax: "Axes", records: list[dict], styles: dict[str, tuple[str, str]]) -> None:
    """The held-out loss after each look."""
    for record in records:
        colour, marker = styles[way_of(record)]
        for stretch in (stretch for curve in healing.curves(record).values() for stretch in curve):
            tokens, values = zip(*stretch, strict=True)
            ax.plot(tokens, values, color=colour, marker=marker, ms=3)
