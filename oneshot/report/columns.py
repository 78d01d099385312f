"""What a record says: pure functions of records, used by every table, picture and page.

    record   the dict that a run fills
    column   one measured quantity: a metric AND its window, so that two windows never share a column
    header   a column's name for people: "wikitext2 ppl @2048"
    variant  the settings in which the runs of one model and method differ: "nsamples 64, seed 1"
    series   a method with its variant, the seed left out: one line of a picture, one row of a pivot table
"""

import hashlib
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..measure import higher
from ..settings.config import PARTS
from ..settings.known import tells_apart
from . import accuracy

NESTED = tuple(PARTS)  # settings that hold parts' settings: {part: {name: value}}
GRID = re.compile(r"(?:none\+)?(?:int|q)(\d+)(?::\w+|_0)?(?:\+[\w:]+)*")  # quantise/grids.py, several as in `grid_of`
LONG = 60  # letters of a setting's value in the name of a run
OFF = (None, False, 0.0, "none", "uniform")  # values by which a setting is switched off


# ---------------------------------------------------------------- columns: what was measured

@dataclass(frozen=True)
class Column:
    """A metric at a window. `text` tells two evaluation texts of one name apart, where a model was given both."""

    metric: str
    window: int | None = None
    text: str = ""

    @property
    def header(self) -> str:
        """The column's name for people."""
        name, _, kind = self.metric.rpartition("/")
        at = f" @{self.window}" if self.window else " @?" if kind == "ppl" else ""
        return clean(f"{name} {kind}".strip() + at + (f" ({self.text})" if self.text else ""))


def columns(records: list[dict]) -> list[Column]:
    """Every Column measured in `records`, in order of first appearance."""
    texts = {}
    for record in records:
        for metric in record.get("metrics") or {}:
            column = _column(record, metric)
            texts.setdefault((metric, column.window), {}).setdefault(identity(record), []).append(column)
    found = []
    for (metric, window), by_model in texts.items():
        split = any(len(set(met)) > 1 for met in by_model.values())
        met = [c for cs in by_model.values() for c in cs]
        found += dict.fromkeys(met) if split else [Column(metric, window)]
    return found


def value(record: dict, column: Column) -> float | None:
    """What `record` measured for `column` (NaN if stored as null); None if it did not, or only on other windows."""
    own, metrics = _column(record, column.metric), record.get("metrics") or {}
    other = own.window != column.window or (column.text and own.text != column.text)
    if other or column.metric not in metrics:
        return None
    return math.nan if metrics[column.metric] is None else metrics[column.metric]


def is_task(records: list[dict], column: Column) -> bool:
    """Whether a column holds the values of an lm-eval task, which come with standard errors."""
    return any(accuracy.is_task(r, column.metric) for r in records)


def higher_is_better(metric: str) -> bool:
    """Whether higher values of a metric are better, as its measurement says."""
    return metric.rpartition("/")[2].startswith(higher())


def _column(record, metric):
    info = (record.get("metric_info") or {}).get(metric) or {}
    data = ((record.get("data") or {}).get("evaluation") or {}).get(metric.rpartition("/")[0]) or {}
    windows, digest = info.get("windows", data.get("windows")), data.get("sha256")
    if accuracy.is_task(record, metric):  # the same task on other documents is another column
        windows, digest = None, info.get("documents")
    known = [f"{windows} windows"] * (windows is not None) + [str(digest)[:8]] * (digest is not None)
    return Column(metric, info.get("window", data.get("seqlen")), ", ".join(known))


# ---------------------------------------------------------------- one run: model, method, pattern

def identity(record: dict) -> tuple[str, str | None]:
    """(name, fingerprint) of the model: equal for two runs exactly if they started from the same weights."""
    model = record.get("model") or {}
    name = model.get("name") or (record.get("settings") or {}).get("model") or "?"
    return str(name), model.get("fingerprint")


def setting(record: dict, name: str) -> str:
    """A setting as text, "?" where the record has none of this name."""
    return str((record.get("settings") or {}).get(name, "?"))


def flat_settings(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of every setting; the entries of nested dicts are called "module.name", like their flags."""
    for key, item in settings.items():
        if isinstance(item, dict):
            yield from flat_settings(item, "" if key in NESTED else f"{prefix}{key}.")
        else:
            yield prefix + str(key), item


def method_of(record: dict) -> str:
    """The method's name: a preset's ("best-3"), or the solver chain, allocation and healing ("alps, owl, distil").

    Behind it the quantiser, where weights were rounded.
    """
    settings = record.get("settings") or {}
    rounding = list(settings.get("rounding") or ())
    if settings.get("preset") or setting(record, "method") == "dense":
        return ", ".join([settings.get("preset") or "dense", *rounding])
    target, heal = settings.get("dense_target"), settings.get("heal") or "none"
    more = [f"dense target {target:g}" if target else None, settings.get("allocate"), *heal.split(","), *rounding]
    names = [setting(record, "method"), *(part for part in more if part not in (None, "none", "uniform"))]
    return ", ".join(names[1:] if names[0] == "keep" and is_rounded(record) else names)


def is_dense(record: dict) -> bool:
    """Whether nothing was done to the model: the run is the baseline of the others."""
    if setting(record, "method") == "keep" and setting(record, "heal") not in ("?", "none"):
        return False  # a dense model that was trained
    return not left_of(record) and not grid_of(record) and "dense" in (setting(record, "method"),
                                                                       setting(record, "pattern"))


def is_rounded(record: dict) -> bool:
    """Whether all was rounded to integers and nothing pruned: such a run has bytes, but no sparsity."""
    plain = bool(grid_of(record)) and not left_of(record) and setting(record, "pattern") == "dense"
    return setting(record, "method") == "rtn" or plain


def is_pruned(record: dict) -> bool:
    """Whether anything was pruned."""
    return not is_dense(record) and not is_rounded(record)


def grid_of(record: dict) -> str:
    """What `--quantise` rounded to: "int4:64", or each grid where linears differ: "int4:64+int8:row"; "" without
    it. The output head comes last: "int4:64+head:int8:row"."""
    entries, head = str((record.get("settings") or {}).get("quantise") or "").split(","), record.get("head") or {}
    named = [entry.rpartition("=")[::2] for entry in entries]
    found = [grid.strip() for name, grid in named if grid and (not head or name.strip() != head.get("name"))]
    return "+".join([*dict.fromkeys(found), *([f"head:{head.get('grid')}"] if head and found else [])])


def left_of(record: dict) -> str:
    """What is left of a model that was made smaller: "0.75 left", "24 layers"; "" for the whole model."""
    named = {"shrink": "{} left", "layers": "{} layers", "drop": "without {}", "kv_groups": "{} KV groups",
             "query_heads": "{} query heads", "experts": "{} experts"}
    return ", ".join(named[k].format(x) for k in named if (x := (record.get("settings") or {}).get(k)) is not None)


def pattern_of(record: dict) -> str:
    """What is left of a smaller model, the pattern, the grid: "2:4", "0.75 left 2:4", "2:4 int4", "int4", "dense"."""
    left, pattern, grid = left_of(record), setting(record, "pattern"), grid_of(record)
    shown = "" if pattern == "dense" and (left or grid) else pattern
    return "dense" if is_dense(record) else " ".join(part for part in (left, shown, grid) if part)


def layer_sparsity(layer: dict) -> float | None:
    """Share of zeros in one row of record["layers"]; None if it is not known."""
    size = math.prod(layer.get("shape") or [0])
    return layer["zeros"] / size if size and layer.get("zeros") is not None else None


def pattern_key(text: str) -> tuple:
    """Sorts patterns: dense, unstructured by sparsity, N:M by sparsity and M, int<b> by bits, anything else.

    One that was rounded as well comes behind the same pattern that was not.
    """
    if text == "dense":
        return 0, 0.0, 0, text
    first, _, grid = text.rpartition(" ")
    if first and GRID.fullmatch(grid):
        return *pattern_key(first)[:3], text
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, match.groups())
        return 2, 1 - n / max(m, 1), m, text
    if match := GRID.fullmatch(text):
        return 3, -int(match[1]), 0, text
    try:
        return 1, float(text), 0, text
    except ValueError:
        return 4, 0.0, 0, text


# ---------------------------------------------------------------- several runs: order and names

def model_names(records: list[dict]) -> dict[tuple, str]:
    """{identity: name to print}: the model's name, with its fingerprint where two models have the same name.

    A run that failed before its weights were read has no fingerprint: its model has the name alone.
    """
    found = dict.fromkeys(identity(r) for r in records)
    names = [name for name, fingerprint in found if fingerprint]
    return {(name, fingerprint): clean(name if names.count(name) < 2 or not fingerprint
                                       else f"{name} #{str(fingerprint)[:6]}")
            for name, fingerprint in found}


def ordered(records: list[dict]) -> list[dict]:
    """Models and methods in the order given; within a model dense first, then by pattern, then by method."""
    models = list(dict.fromkeys(identity(r) for r in records))
    methods = list(dict.fromkeys(method_of(r) for r in records))
    return sorted(records, key=lambda r: (models.index(identity(r)), not is_dense(r),
                                          pattern_key(pattern_of(r)), methods.index(method_of(r))))


def variants(records: list[dict], ignore: Collection[str] = (), among: list[dict] | None = None) -> list[str]:
    """For each record the settings in which the runs of its model and method differ, as text; often "".

    ignore: settings that are not looked at. among: the runs that are compared, default `records`. Where several
    pictures each show a part of some runs, give all runs here: a run then has the same name in all of them.
    """
    groups = {}
    for record in records if among is None else among:
        groups.setdefault((identity(record), method_of(record)), []).append(_flat(record))
    differing = {}
    for key, group in groups.items():
        names = [k for k in dict.fromkeys(k for one in group for k in one) if tells_apart(k) and k not in ignore]
        differing[key] = [k for k in names if len({_switched(one.get(k)) for one in group}) > 1]
    texts = []
    for record in records:
        own, differ = _flat(record), differing[identity(record), method_of(record)]
        texts.append(clean(", ".join(f"{k} {_short(own[k])}" if own[k] is not True else k for k in differ
                                     if _switched(own.get(k)) is not None)))
    return texts


def _flat(record):
    return dict(flat_settings(record.get("settings") or {}))


def _short(setting):
    """A setting as text; of a long list of names the beginning, and a hash that tells it from others."""
    text = str(setting)
    return text if len(text) <= LONG else f"{text[:LONG - 8]}… {hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _switched(setting):
    """A setting as text; None if it is off, or if the version that wrote the record did not have it."""
    return None if setting in OFF else str(setting)


def series(records: list[dict], among: list[dict] | None = None) -> list[str]:
    """The series of each record: its method and the settings, except the seed, in which the method's runs differ.

    For instance "wanda (nsamples 64)". among: as in `variants`.
    """
    own = variants(records, ignore={"seed"}, among=among)
    return [clean(method_of(r)) + f" ({v})" * bool(v) for r, v in zip(records, own, strict=True)]


def labels(records: list[dict]) -> list[str]:
    """A short name for each record that no other has; it says the model only if there are several."""
    names, own = model_names(records), variants(records)
    texts = []
    for record, variant in zip(records, own, strict=True):
        parts = [names[identity(record)]] if len(names) > 1 else []
        parts += ["dense"] if is_dense(record) else [method_of(record), pattern_of(record)]
        texts.append(clean(" ".join(parts) + (f" ({variant})" if variant else "")))
    return [t if texts.count(t) == 1 else f"{t} #{clean(record.get('run_id', i))[-8:]}"
            for i, (t, record) in enumerate(zip(texts, records, strict=True))]


# ---------------------------------------------------------------- texts and numbers

def clean(text: object) -> str:
    """One printable line: names come from users, and end up in terminals, XML and markdown."""
    return "".join(c if c.isprintable() else " " for c in str(text)).strip()


def number(x: object, digits: int = 4) -> str:
    """`x` with `digits` significant digits, the whole part always in full: 5.472, 117.4, 7058; "-" for None."""
    if x is None or isinstance(x, (str, bool)):
        return "-" if x is None else str(x)
    if isinstance(x, int) or not math.isfinite(x) or x == 0:
        return str(x) if isinstance(x, int) else f"{x:g}"
    size = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}"))))
    return f"{x:.{digits - 1}e}" if size >= 6 or size < -4 else f"{x:.{max(0, digits - 1 - size)}f}"


def percent(x: float | None) -> str:
    """A share as percent: 0.5 is "50.00 %"; "-" for None."""
    return "-" if x is None else f"{100 * x:.2f} %"


def like(text: str, x: float) -> str:
    """`x` with as many decimals as the number in `text`: a standard deviation beside its mean."""
    return number(x, 2) if "e" in text or not math.isfinite(x) else f"{x:.{len(text.partition('.')[2])}f}"
