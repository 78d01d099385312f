"""What all pictures share: colours, scales, legends, names, and how a figure becomes a file or a part of a page.

The colours are Okabe and Ito's, which the colour-blind can tell apart. In `svg`, INK, MUTED, GRID and PAPER become
variables of the page, so that pictures follow its light or dark scheme. Matplotlib is imported when a picture is drawn.
"""

import functools
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..columns import clean, is_dense, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = "sD^vPX*"
INK, MUTED, GRID, PAPER = "#1b1f25", "#69707b", "#d5d9df", "#fefefe"
WIDTH = 10.5  # inches; 72 points each, so 1008 pixels of the page
RC = {"svg.fonttype": "none", "svg.hashsalt": "oneshot", "font.family": "DejaVu Sans", "font.size": 9,
      "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK, "axes.titlesize": 9,
      "axes.labelsize": 9, "axes.edgecolor": MUTED, "axes.linewidth": 0.8, "xtick.color": MUTED,
      "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 8,
      "ytick.labelsize": 8, "axes.grid": True, "grid.color": GRID,
      "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
      "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.6, "lines.markersize": 5.5}


def _matplotlib():
    try:
        import matplotlib
        import matplotlib.figure  # Figure itself, no pyplot: no window, no global state
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    return matplotlib


def drawn(function: Callable) -> Callable:
    """Decorator: the function draws with the settings RC, whatever the user's matplotlibrc says."""
    @functools.wraps(function)
    def draw(*args, **kwargs):
        with _matplotlib().rc_context(RC):
            return function(*args, **kwargs)
    return draw


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches."""
    return _matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def series_styles(records: list[dict]) -> dict[str, tuple[str, str]]:
    """{series: (colour, line style)} for the series (columns.series) of `records`, in their order."""
    names = zip(records, series(records), strict=True)
    lines = [style for style in ("-", "--", ":", "-.") for _ in COLOURS]
    return dict(zip(dict.fromkeys(name for r, name in names if not is_dense(r)),
                    itertools.cycle(zip(itertools.cycle(COLOURS), lines, strict=False)), strict=False))


def scale_y(axes: "Iterable[Axes]", values: Iterable[float], percent: bool = False) -> bool:
    """Scale y axes for `values`: logarithmic if they span more than a factor of 5. Returns whether they do.

    The ticks are plain numbers; percent: the values are shares and the ticks show percent.
    """
    from matplotlib import ticker

    values = [v for v in values if math.isfinite(v)]
    low, high = min(values, default=0), max(values, default=1)
    log = low > 0 and high > 5 * low
    for ax in axes:
        if log:
            ax.set_yscale("log")
            pad = (high / low) ** 0.06
            ax.set_ylim(low / pad, high * pad)
            steps = (1, 2, 5) if high / low < 60 else (1, 3) if high / low < 400 else (1,)
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            thin = math.ceil(len(powers) / 7)
            ticks = [s * 10.0**p for p in powers if p % thin == 0 for s in steps]
            ticks = [t for t in ticks if low / pad <= t <= high * pad]
            ax.yaxis.set_major_locator(ticker.FixedLocator(ticks))
            ax.yaxis.set_minor_locator(ticker.NullLocator())
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(
            lambda y, _: f"{100 * y:.4g}" if percent else f"{y:.6g}" if abs(y) < 1e6 else f"{y:.0e}"))
    return log


def kind(linear: str) -> str:
    """The kind of a linear: its name within the block without the numbers of experts."""
    return clean(re.sub(r"[.\[]\d+\]?", "", str(linear)))


def short_names(names: list[str]) -> dict[str, str]:
    """{name: its shortest ending, cut at a dot, that no other name has}."""
    endings = {n: [".".join(n.split(".")[-i:]) for i in range(1, n.count(".") + 2)] for n in names}
    return {n: next((e for e in own if sum(e in other for other in endings.values()) == 1), n)
            for n, own in endings.items()}


def handle(label: str, colour: str, style: str = "-", marker: str = "o", filled: bool = True) -> "Line2D":
    """An entry for `legend`."""
    from matplotlib.lines import Line2D

    face = colour if filled else "none"
    return Line2D([], [], color=colour, ls=style, marker=marker, mfc=face, label=clean(label))


def legend(fig: "Figure", handles: "list[Line2D]") -> None:
    """A legend above the picture, to be read row by row, with as many entries in a row as fit its width."""
    def inches(across):
        columns = [handles[i::across] for i in range(across)]
        return sum(0.55 + 0.078 * max(len(h.get_label()) for h in column) for column in columns)

    across = next((n for n in range(len(handles), 1, -1) if inches(n) <= fig.get_figwidth()), 1)
    if handles:
        fig.legend(handles=[h for i in range(across) for h in handles[i::across]], loc="outside upper left",
                   ncols=across, handlelength=1.8)


def nothing(text: str) -> "Figure":
    """A small figure that only says why there is nothing to draw."""
    fig = new_figure(6, 0.8)
    fig.text(0.02, 0.5, text, va="center", color=MUTED)
    return fig


def mark(ax: "Axes", x: float, values: list[float], colour: str, marker: str, **kwargs: Any) -> None:
    """Draw the mean of `values` at x, with a bar over their range."""
    ax.plot([x], [sum(values) / len(values)], color=colour, ls="none", marker=marker, zorder=3, **kwargs)
    if len(values) > 1:
        ax.plot([x, x], [min(values), max(values)], color=colour, lw=1.2, marker="_", ms=6)


def svg(fig: "Figure", prefix: str = "") -> str:
    """The figure as an <svg> element for a page, the same text every time.

    prefix: put before every id, so that several pictures can stand on one page.
    """
    out = io.StringIO()
    with _matplotlib().rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser will have the font
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.S)
    text = text[text.index("<svg"):]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text, count=3).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", text)
    for colour, name in ((INK, "currentColor"), (MUTED, "var(--muted)"), (GRID, "var(--grid)"),
                         (PAPER, "var(--paper)")):
        text = text.replace(colour, name)
    return text.strip()


def save(fig: "Figure", path: str | Path) -> None:
    """Write the figure to a file whose ending names the format (svg, pdf, png), the same bytes every time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix[1:].lower())
    with _matplotlib().rc_context(RC):
        fig.savefig(path, metadata=dates, dpi=200)
