"""Task results of two runs compared: the difference and its standard error, document by document where possible.

The pruned and the dense model answer the same documents, and most of them alike. With d_i = right(pruned, i) -
right(dense, i) in {-1, 0, 1} over n documents, the difference of the accuracies is the mean of d, and its standard
error is s(d) / sqrt(n), where s is the sample standard deviation. That is far below sqrt(se1^2 + se2^2), the standard
error for independent documents. All that is needed is in the records (`metric_info`, see measure/tasks.py).
"""

import math
from dataclasses import dataclass

SURE = 2  # standard errors: about 95 %


@dataclass(frozen=True)
class Difference:
    """A metric minus the dense model's. `paired`: compared document by document, over the same documents."""

    value: float
    stderr: float
    paired: bool

    @property
    def within_noise(self) -> bool:
        """Whether the difference is at most SURE standard errors."""
        return abs(self.value) <= SURE * self.stderr


def how(record: dict, metric: str) -> dict:
    """How a metric was measured: its entry in `metric_info`."""
    return (record.get("metric_info") or {}).get(metric) or {}


def is_task(record: dict, metric: str) -> bool:
    """Whether a metric is one of an lm-eval task, with a standard error of its own."""
    return "stderr" in how(record, metric) and "samples" in how(record, metric)


def has_tasks(record: dict) -> bool:
    """Whether any task was measured."""
    return any(is_task(record, metric) for metric in record.get("metrics") or {})


def is_member(records: list[dict], metric: str) -> bool:
    """Whether a task is only a part of a group, which is shown in its place."""
    return any(how(r, metric).get("group") for r in records)


def right(info: dict) -> list[int] | None:
    """For each document 1 if the answer was right, else 0, in their order; None where that was not kept."""
    if not info.get("correct") or not info.get("samples"):
        return None
    return [int(bit) for bit in f"{int(info['correct'], 16):0{info['samples']}b}"]


def difference(record: dict, dense: dict, metric: str) -> Difference | None:
    """The Difference of a metric between two records; None where one has no value, or no standard error."""
    x, y = ((r.get("metrics") or {}).get(metric) for r in (record, dense))
    mine, theirs = how(record, metric), how(dense, metric)
    if x is None or y is None:
        return None
    if parts := mine.get("mean_of"):
        found = [difference(record, dense, part) for part in parts]
        known = None not in found and parts == theirs.get("mean_of")
        return Difference(x - y, math.hypot(*(d.stderr for d in found)) / len(found),
                          all(d.paired for d in found)) if known else None
    a, b = right(mine), right(theirs)
    if a and b and len(a) > 1 and len(a) == len(b) and mine.get("documents") == theirs.get("documents"):
        each = [i - j for i, j in zip(a, b, strict=True)]
        mean = sum(each) / len(each)
        return Difference(mean, math.sqrt(sum((d - mean) ** 2 for d in each) / (len(each) - 1) / len(each)), True)
    if mine.get("stderr") is None or theirs.get("stderr") is None:
        return None
    return Difference(x - y, math.hypot(mine["stderr"], theirs["stderr"]), False)


def no_better_than_chance(record: dict, metric: str) -> bool:
    """Whether a task's value is not above a guesser's by more than two of its standard errors."""
    info, x = how(record, metric), (record.get("metrics") or {}).get(metric)
    if x is None or info.get("chance") is None or info.get("stderr") is None:
        return False
    return x - SURE * info["stderr"] <= info["chance"]
