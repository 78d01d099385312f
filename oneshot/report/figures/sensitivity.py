"""Which linears a model can least spare: the loss increase when a linear alone is pruned."""

import math
from typing import TYPE_CHECKING

from ..columns import labels
from .drawing import WIDTH, drawn, kind, new_figure, nothing, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawn
def fig_sensitivity(records: list[dict]) -> "Figure":
    """A heat map of record["sensitivity"] for each record that has one: blocks across, kinds of linear down.

    The colour is `loss_increase`, how much the loss (nats per token) grows when this linear alone is pruned; linears of
    one kind in one block (experts) are averaged. White: no increase, or not measured.
    """
    maps = [(label, cells(r)) for r, label in zip(records, labels(records), strict=True)]
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


def cells(record: dict) -> dict[tuple[str, int], float]:
    """{(kind of linear, block): mean loss increase} of one record."""
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
    """Draw one heat map. The colours (cividis) grow evenly in brightness and look the same to the colour-blind."""
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
