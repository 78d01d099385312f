"""Sensitivity: the linears that a `--sensitivity linear` run found most harmful to prune are pruned least.

    g_l    loss increase per weight when linear l alone is pruned; r_l its rank, scaled from -1 (least) to 1 (most)
    s_l    s - spread · r_l, all shifted by the same amount until the mean, weighted by parameters, is s

Ranks are used instead of values because the increases of single linears span orders of magnitude and are noisy where
they are small. An order measured at one sparsity is assumed to hold at nearby ones.
"""

import json
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from ...runtime.flag import flag
from ..patterns import Pattern
from . import Blocks, Measured, Plan, meet, sizes

needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Config:
    record: str = flag("", "record (JSON) of a run with --sensitivity linear")
    spread: float = flag(0.08, "half the difference between the most and the least pruned linear layer")

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 0.5:
            raise ValueError(f"--sensitivity.spread {self.spread}: must be from 0 to 0.5")


def plan(measured: Measured, blocks: Blocks, pattern: Pattern, cfg: Config) -> Plan:
    """One sparsity per linear. Raises ValueError naming `--sensitivity.record` if that lacks the measurement."""
    (found, _), size = read(cfg.record), sizes(blocks)
    order = sorted(found, key=lambda name: found[name])
    rank = {name: 2 * i / max(len(order) - 1, 1) - 1 for i, name in enumerate(order)}
    missing = [name for name in size if unit(name, rank) is None]
    if missing:
        raise ValueError(f"--sensitivity.record {cfg.record}: says nothing of {missing[0]}; measure this model with "
                         "--sensitivity linear")
    return meet({name: pattern.sparsity - cfg.spread * rank[unit(name, rank)] for name in size}, blocks, pattern,
                0.0, 1.0)


def unit(name: str, rank: Container[str]) -> str | None:
    """The measured unit that a linear belongs to: itself, or for an expert all experts of its layer; None: neither."""
    return next((n for n in (name, name.rpartition(".")[0]) if n in rank), None)


def read(path: str) -> tuple[dict[str, float], str]:
    """({name: loss increase in nats per token and weight}, fingerprint of the model that was measured).

    Raises ValueError naming `--sensitivity.record` when the file holds no such measurement.
    """
    if not path:
        raise ValueError("--allocate sensitivity: give --sensitivity.record, the record of a run with "
                         "--sensitivity linear")
    if not Path(path).is_file():
        raise ValueError(f"--sensitivity.record {path}: no such file; give the record of a run with --sensitivity "
                         "linear")
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {row["name"]: row["loss_increase"] / row["weights"] for row in record["sensitivity"]}
        mark = record["model"]["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"--sensitivity.record {path}: holds no sensitivities ({type(error).__name__}); give the "
                         "record of a run with --sensitivity linear") from None
    return found, mark
