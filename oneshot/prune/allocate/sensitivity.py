"""Sensitivity: what a `--sensitivity linear` run found most harmful to prune loses least.

    g_l    loss increase of linear l pruned alone, per weight; r_l its rank among all, from -1 (least) to 1 (most)
    s_l    s - spread · r_l, shifted alike until the mean, weighted by parameters, is s

Ranks instead of values: increases of single linears span orders of magnitude and are noisy where they are small. What
is measured at one sparsity is taken to hold at its neighbours.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from ...runtime.flag import flag
from . import meet, sizes

needs = frozenset()


@dataclass(frozen=True)
class Config:
    record: str = flag("", "the record (JSON) of a run with --sensitivity linear")
    spread: float = flag(0.08, "half the difference between most and least pruned linear")

    def __post_init__(self):
        if not 0 <= self.spread <= 0.5:
            raise ValueError(f"--sensitivity.spread {self.spread}: must be from 0 to 0.5")


def plan(measured, blocks, pattern, cfg):
    """One sparsity a linear. Raises ValueError naming `--sensitivity.record` when that has no such measurement."""
    (found, _), size = read(cfg.record), sizes(blocks)
    order = sorted(found, key=lambda name: found[name])
    rank = {name: 2 * i / max(len(order) - 1, 1) - 1 for i, name in enumerate(order)}
    missing = [name for name in size if unit(name, rank) is None]
    if missing:
        raise ValueError(f"--sensitivity.record {cfg.record}: says nothing of {missing[0]}; measure this model with "
                         "--sensitivity linear")
    return meet({name: pattern.sparsity - cfg.spread * rank[unit(name, rank)] for name in size}, blocks, pattern,
                0.0, 1.0)


def unit(name, rank):
    """The measured unit that a linear belongs to: itself, or all experts of its layer."""
    return next((n for n in (name, name.rpartition(".")[0]) if n in rank), None)


def read(path):
    """({name: loss increase per weight}, fingerprint of the model that was measured)."""
    if not path:
        raise ValueError("--allocate sensitivity: give --sensitivity.record, the record of a run with "
                         "--sensitivity linear")
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {row["name"]: row["loss_increase"] / row["weights"] for row in record["sensitivity"]}
        mark = record["model"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--sensitivity.record {path}: holds no sensitivities ({type(error).__name__}); give the "
                         "record of a run with --sensitivity linear") from None
    return found, mark
