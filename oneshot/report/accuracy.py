"""Task results of two runs compared: the difference and its standard error, document by document where possible.

Pruned and dense answer the same documents, and mostly alike. With d_i = right(pruned, i) - right(dense, i) in
{-1, 0, 1} over n documents, the difference of the accuracies is the mean of d and its standard error is
s(d) / sqrt(n), s the sample standard deviation: far below sqrt(se1^2 + se2^2), which holds for independent documents.
Needs no torch: all stands in the records (`metric_info`, see evaluate/tasks.py).
"""

import math
from dataclasses import dataclass

SURE = 2  # standard errors: about 95 %


@dataclass(frozen=True)
class Difference:
    """A metric minus the dense model's; `paired` if over the same documents, one by one."""

    value: float
    stderr: float
    paired: bool

    @property
    def within_noise(self):
        return abs(self.value) <= SURE * self.stderr


def how(record, metric):
    return (record.get("metric_info") or {}).get(metric) or {}


def is_task(record, metric):
    """Whether a metric is an lm-eval task's, with a standard error of its own."""
    return "stderr" in how(record, metric) and "samples" in how(record, metric)


def has_tasks(record):
    return any(is_task(record, metric) for metric in record.get("metrics") or {})


def is_member(records, metric):
    """Whether a task only stands for its part of a group, which is shown instead."""
    return any(how(r, metric).get("group") for r in records)


def right(info):
    """Each document's 0 or 1, in their order; None where that was not kept."""
    if not info.get("correct") or not info.get("samples"):
        return None
    return [int(bit) for bit in f"{int(info['correct'], 16):0{info['samples']}b}"]


def difference(record, dense, metric):
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


def no_better_than_chance(record, metric):
    """Whether a task's value is not above a guesser's by more than two of its standard errors."""
    info, x = how(record, metric), (record.get("metrics") or {}).get(metric)
    if x is None or info.get("chance") is None or info.get("stderr") is None:
        return False
    return x - SURE * info["stderr"] <= info["chance"]
