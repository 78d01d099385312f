"""Which pictures the page of some records has, with their headings and captions; figures/ draws them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import accuracy, figures
from .columns import clean, columns, identity, is_pruned, is_rounded, model_names, number, pattern_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    heading: str
    caption: str
    figure: "Figure"


def pictures(records: list[dict]) -> Iterator[Picture]:
    """The pictures of a page from top to bottom. Raises ImportError where matplotlib is not installed."""
    for part in (_against_sparsity, _against_speed, _by_depth, _damage, _tasks, _sensitivity, _healing, _time):
        yield from part(records)


def _against_sparsity(records):
    if len({pattern_of(r) for r in records if is_pruned(r)}) < 2:
        return
    shown = [r for r in records if not is_rounded(r)]
    for column in (c for c in columns(shown) if c.metric.endswith("ppl")):
        yield Picture(f"{column.header} against sparsity",
                      "Lower is better. Dashed: the dense model. Hollow: N:M patterns, methods side by side.",
                      figures.fig_perplexity(shown, column.header))


def _against_speed(records):
    if not any("latency/decode1_speedup" in (r.get("metrics") or {}) for r in records):
        return
    for column in (c for c in columns(records) if c.metric.endswith("ppl")):
        yield Picture(f"{column.header} against measured speed",
                      "Lower and further right is better. Decoding one sequence with the KV cache, beside the dense "
                      "model in the same run; zeros and rounded values are computed as dense weights here.",
                      figures.fig_speed(records, column.header))


def _by_depth(records):
    names = model_names(records)
    for key, name in names.items():
        own, of = [r for r in records if identity(r) == key], f", {name}" * (len(names) > 1)
        if any(r.get("layers") for r in own):
            yield Picture(f"Error by depth{of}", _error_caption(own), figures.fig_layer_errors(own, records))
            yield Picture(f"Zeros by depth{of}", "Share of zeros in each pruned linear.",
                          figures.fig_layer_sparsity(own, records))


def _error_caption(records):
    sources = {layer.get("error_from") for r in records for layer in r.get("layers") or []} - {None}
    where = {"gram": "over all calibration tokens", "sample": "on a sample of the calibration tokens"}
    measured = " or ".join(where.get(s, clean(s)) for s in sorted(sources, key=str))
    return ("Relative error: squared change of the linear's output over its squared norm, tr((W−Ŵ)G(W−Ŵ)ᵀ) / "
            f"tr(WGWᵀ){f', {measured}' * bool(measured)}. Line: median; band: range (experts, seeds).")


def _damage(records):
    """A picture for each model and pattern."""
    names, groups = model_names(records), {}
    for record in records:
        if (record.get("damage") or {}).get("slices"):
            groups.setdefault((identity(record), pattern_of(record)), []).append(record)
    for (key, pattern), own in groups.items():
        of = f", {names[key]}" * (len(names) > 1)
        yield Picture(f"Where the loss increase sits, {clean(pattern)}{of}", _damage_caption(own),
                      figures.fig_damage(own, records))


def _damage_caption(records):
    sources = dict.fromkeys(r["damage"].get("frequency_from") for r in records)
    empty = {kind: names for r in records for kind, names in (r["damage"].get("empty") or {}).items()}
    slices = max(len(r["damage"]["slices"]) for r in records)
    parts = [f"Dashed: the text as a whole. Bars: 95 % intervals over windows; filled where they leave the whole "
             f"outside, which of {slices} slices about {number(slices / 20, 1)} would do by chance. Crosses: too few "
             f"windows for an interval. Frequency counted in {' or '.join(map(clean, sources))}."]
    parts += [f"No token in: {', '.join(map(clean, names))} ({clean(kind)})." for kind, names in empty.items()]
    return " ".join(parts)


def _tasks(records):
    if tested := list(filter(accuracy.has_tasks, records)):
        yield Picture("Tasks", "Dense and pruned models answer the same documents: the table above has their "
                      "differences.", figures.fig_tasks(tested))


def _sensitivity(records):
    if measured := [r for r in records if r.get("sensitivity")]:
        yield Picture("What must not be touched", "Loss increase when this linear alone is pruned and the rest stays "
                      "dense. White: no increase.", figures.fig_sensitivity(measured))


def _healing(records):
    if healed := [r for r in records if figures.healing.curves(r)]:
        yield Picture("Healing on text", "Loss on text that was not trained on. A new line begins where the learning "
                      "rate was halved.", figures.fig_healing(healed, records))


def _time(records):
    yield Picture("Where the time went",
                  "collect: forward with statistics; solve: masks, weights; replay: forward with the pruned block; "
                  "heal: training, of blocks and of the whole model.",
                  figures.fig_time(records))
