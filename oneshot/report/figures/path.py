"""The path of `oneshot fit`: quality against what each round costs, with the floors; and what each block can spare."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..columns import clean
from .drawing import COLOURS, INK, MARKERS, MUTED, WIDTH, drawn, handle, legend, new_figure, nothing, scale_y

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"dense": (INK, "*"), "kept": (COLOURS[0], "o"), "taken back": (COLOURS[1], "X"),
         "plain rounding": (COLOURS[2], "s")}
ALONE = {"2:4": "KL of the block alone in 2:4 (nats)", "influence": "influence: 1 - cosine of what the block changes"}
LABELS = {"latency": "time of decoding a token", "bytes": "bytes of the linears",
          "parameters": "parameters of the blocks"}


class Point(NamedTuple):
    """One state of the model. kind: a key of KINDS. shares: {kind of target: share of the dense model's}."""

    name: str
    kind: str
    shares: dict[str, float]
    metrics: dict[str, float | None]


@drawn
def fig_path(points: Sequence[Point], targets: dict[str, float], bounds: dict[str, float]) -> "Figure":
    """A metric against a share, a panel for each of `bounds` and `targets`; kept rounds are joined in their order.

    targets: {kind of target: share that is asked for}. bounds: {metric: its floor, NaN where there is none}.
    """
    panels = [(metric, kind) for metric in bounds for kind in targets]
    found = {panel: placed(points, *panel) for panel in panels}
    panels = [panel for panel in panels if found[panel]]
    if not panels:
        return nothing("no round has a metric and a share")
    across = min(2, len(panels))
    fig = new_figure(7.6 if across == 1 else WIDTH, 0.6 + 3.9 * math.ceil(len(panels) / across))
    flat = list(fig.subplots(math.ceil(len(panels) / across), across, squeeze=False).flat)
    for ax, (metric, kind) in zip(flat, panels, strict=False):
        own = found[metric, kind]
        path = [(x, y) for _, what, x, y in own if what in ("dense", "kept")]
        ax.plot(*zip(*path, strict=True), color=KINDS["kept"][0], lw=1, zorder=1)
        for name, what, x, y in own:
            colour, marker = KINDS[what]
            ax.plot([x], [y], color=colour, marker=marker, ls="none", ms=9 if what == "dense" else 6, zorder=3)
            ax.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=MUTED)
        bound = bounds[metric]
        if math.isfinite(bound):
            ax.axhline(bound, color=COLOURS[3], ls="--", lw=1.2)
        ax.axvline(targets[kind], color=COLOURS[4], ls=":", lw=1.2)
        log = scale_y([ax], [y for *_, y in own] + ([bound] if math.isfinite(bound) else []))
        ax.set_ylabel(clean(metric) + (", log scale" if log else ""))
        ax.set_xlabel(f"{LABELS.get(kind, kind)}, share of the dense model's")
        ax.margins(x=0.12, y=0.12)
    for ax in flat[len(panels):]:
        ax.remove()
    used = {what for panel in panels for _, what, _, _ in found[panel]}
    legend(fig, [handle(what, colour, "none", m) for what, (colour, m) in KINDS.items() if what in used]
           + [handle("floor", COLOURS[3], "--", "")] * any(map(math.isfinite, bounds.values()))
           + [handle("target", COLOURS[4], ":", "")])
    return fig


def placed(points: Sequence[Point], metric: str, kind: str) -> list[tuple[str, str, float, float]]:
    """[(name, key of KINDS, share, value)] of the points that have both."""
    return [(p.name, p.kind, p.shares[kind], float(p.metrics[metric])) for p in points
            if kind in p.shares and p.metrics.get(metric) is not None and math.isfinite(p.metrics[metric])]


@drawn
def fig_candidates(rounds: Sequence[tuple[str, dict[str, dict[int | str, float]]]]) -> "Figure":
    """What each block loses in 2:4 and in integers, and how much it changes the hidden state, a panel for each round.

    rounds: [(name, {form: {block: KL in nats}} with {"influence": {block: influence}})]. Of integers it is the block's
    share of what all blocks lose together. A key that is a text, the output head, stands right of all blocks.
    """
    rounds = [r for r in rounds if any(r[1].values())]
    kinds = list(dict.fromkeys(kind for _, found in rounds for kind, own in found.items() if own))
    if not rounds:
        return nothing("no block was measured alone")
    fig = new_figure(WIDTH, 0.6 + 1.9 * len(rounds))
    end = 2 + max((b for _, found in rounds for own in found.values() for b in own if isinstance(b, int)), default=0)
    for ax, (name, found) in zip(fig.subplots(len(rounds), 1, squeeze=False).flat, rounds, strict=True):
        for i, kind in enumerate(kinds):
            if own := found.get(kind):
                at = [end if isinstance(b, str) else b for b in own]
                ax.plot(at, list(own.values()), color=COLOURS[i], marker=MARKERS[i], ls="none")
        for text in {b for own in found.values() for b in own if isinstance(b, str)}:
            ax.text(end, 1.02, clean(text), transform=ax.get_xaxis_transform(), ha="center", va="bottom")
        scale_y([ax], [x for own in found.values() for x in own.values() if x > 0] or [0, 1])
        ax.set_title(clean(name), loc="left", fontweight="bold")
        ax.set_xlabel("block")
    legend(fig, [handle(ALONE.get(kind, f"the block's share of the KL of all in {clean(kind)} (nats)"), COLOURS[i],
                        "none", MARKERS[i]) for i, kind in enumerate(kinds)])
    return fig
