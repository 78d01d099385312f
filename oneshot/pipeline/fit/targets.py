"""Targets and floors: what `--target`, `--floor`, `--step`, `--budget` and `--allow` say, and whether a floor holds.

    target   a share of the dense model's: latency (time of decoding a token), bytes (stored, of all linears),
             parameters (of the transformer blocks)
    floor    a bound on a metric: TEXT/ppl<=1.5x times the dense model's; arc_easy/acc>=-2% less than the dense model's
             by at most 0.02; TEXT/ppl<=40 the value itself

A floor holds if the metric, made worse by SURE of its standard errors (one side of 19 in 20), keeps the bound. The
standard error is that of the difference to the dense model where the bound is relative to it: over the windows of a
text, in pairs, as mean losses (nats); over the documents of a task, in pairs. Where none is known (one window, a
metric without) the value alone is judged, and the table of the command says so.
"""

import math
import re
import statistics
from dataclasses import asdict, dataclass

from ...measure import higher
from ...report import accuracy

KINDS = ("latency", "bytes", "parameters")
FORMS = ("shrink", "2:4", "int8", "int4", "heal")
SURE = 1.645  # standard errors
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Judged:
    """One floor at one state. worst: the value made worse by its standard error; None where that is not known."""

    metric: str
    sign: str
    value: float
    bound: float
    worst: float | None
    holds: bool

    def plain(self) -> dict:
        """As JSON holds it; null for what is no number."""
        return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(self).items()}

    def __str__(self) -> str:
        sure = "" if self.worst is None or not math.isfinite(self.worst) else f", {self.worst:.4g} with its error"
        return f"{self.metric} {self.value:.4g}{sure}, asked {self.sign} {self.bound:.4g}"


@dataclass(frozen=True)
class Floor:
    """A bound on a metric. relative: "x": times the dense model's; "+": added to it; "": the value itself."""

    metric: str
    at_least: bool
    value: float
    relative: str

    def bound(self, dense: float) -> float:
        """The bound itself."""
        return {"x": self.value * dense, "+": self.value + dense, "": self.value}[self.relative]

    def judge(self, record: dict, dense: dict) -> Judged:
        """Whether a record keeps it, beside the dense model's record."""
        value, base = number(record, self.metric), number(dense, self.metric)
        bound, worst = self.bound(base), self.worst(record, dense, value)
        judged = value if worst is None else worst
        holds = judged >= bound if self.at_least else judged <= bound  # NaN: never
        return Judged(self.metric, ">=" if self.at_least else "<=", value, bound, worst, holds)

    def worst(self, record: dict, dense: dict, value: float) -> float | None:
        """The value, made worse by SURE standard errors; None where they are not known."""
        mine, theirs = accuracy.how(record, self.metric), accuracy.how(dense, self.metric)
        away = -SURE if self.at_least else SURE
        own, other = mine.get("by_window"), theirs.get("by_window")
        if None in [*(own or ()), *(other or ())]:  # a window that is no number, as null in the record
            return math.nan
        if own and len(own) > 1 and (not self.relative or (other and len(own) == len(other))):
            if self.relative != "+":  # exp of a mean loss
                nats = [a - b for a, b in zip(own, other, strict=True)] if self.relative else own
                return value * math.exp(away * of_mean(nats))
            base = number(dense, self.metric)
            return value + away * of_mean([value * a - base * b for a, b in zip(own, other, strict=True)])
        stderr = mine.get("stderr")
        if self.relative and (found := accuracy.difference(record, dense, self.metric)):
            stderr = found.stderr
        return None if stderr is None else value + away * stderr


def of_mean(values: list[float]) -> float:
    """The standard error of the mean of two values or more."""
    return statistics.stdev(values) / math.sqrt(len(values))


def number(record: dict, metric: str) -> float:
    """A metric of a record, in which null stands for what is no number."""
    value = record["metrics"].get(metric)
    return math.nan if value is None else value


def check(floors: list[Floor], dense: dict) -> None:
    """Raise ValueError naming `--floor` for a metric that is not measured, or that is no number for the dense model."""
    for own in floors:
        if own.metric not in dense["metrics"]:
            there = ", ".join(sorted(dense["metrics"])) or "none"
            raise ValueError(f"--floor {own.metric}: not measured; there are {there} (--evaluate and --tasks say what "
                             "is)")
        if not math.isfinite(own.bound(number(dense, own.metric))):
            raise ValueError(f"--floor {own.metric}: is {number(dense, own.metric):g} for --model, which no round can "
                             "keep")


def targets(text: str) -> dict[str, float]:
    """{kind: share} of `--target`. Raises ValueError naming the flag."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)=(\d*\.?\d+)x?\s*", part)
        if not match or match[1] not in KINDS or match[1] in found or not 0 < float(match[2]) < 1:
            raise ValueError(f"--target {text}: give shares such as {' or '.join(f'{kind}=0.75' for kind in KINDS)}, "
                             "several by commas")
        found[match[1]] = float(match[2])
    return found


def floor(text: str) -> Floor:
    """The Floor written as `text`. Raises ValueError naming the flag."""
    match = re.fullmatch(r"([^<>=\s]+)\s*(<=|>=)\s*([-+]?\d*\.?\d+)(x|%?)", text)
    if not match:
        raise ValueError(f"--floor {text}: give METRIC<=NUMBERx, METRIC>=-NUMBER (or -NUMBER%) or METRIC<=NUMBER")
    last = match[1].rpartition("/")[2]
    relative = "x" if match[4] == "x" else "+" if match[3][0] in "+-" else ""
    at_least, better = match[2] == ">=", last.startswith(higher())
    if at_least != better and last.startswith(("ppl", *higher())):
        raise ValueError(f"--floor {text}: of {match[1]}, {'higher' if better else 'lower'} values are better, so it "
                         f"needs {'>=' if better else '<='}")
    return Floor(match[1], at_least, float(match[3]) / (100 if match[4] == "%" else 1), relative)


def step(text: str) -> float:
    """The share written as "10%" or "0.1". Raises ValueError naming `--step`."""
    match = re.fullmatch(r"(\d*\.?\d+)(%?)", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"--step {text}: give a share above 0, such as 10%; 100% is one shot")
    return share


def budget(text: str | None) -> float:
    """The seconds written as "2h", "90m" or "45s". Raises ValueError naming `--budget`."""
    if text is None:
        return math.inf
    match = re.fullmatch(r"(\d*\.?\d+)([smh])", text)
    if not match or not float(match[1]):
        raise ValueError(f"--budget {text}: give a time such as 2h, 90m or 45s")
    return float(match[1]) * UNITS[match[2]]


def allow(text: str) -> frozenset[str]:
    """The forms of `--allow`. Raises ValueError naming the flag."""
    found = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := sorted(found - set(FORMS)):
        raise ValueError(f"--allow {unknown[0]}: there are {', '.join(FORMS)}")
    if not found - {"heal"}:
        raise ValueError(f"--allow {text}: names nothing that makes a model smaller; give some of {', '.join(FORMS)}")
    return found
