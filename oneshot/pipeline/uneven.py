"""Uneven: widths by layer for `--uneven`, chosen among few cuts by the KL after the whole cut on held-out windows:

    the best cut with the same widths in every layer; that one with its units spread by need (structured/spread.py),
    neurons alone or KV groups as well; and the same that leave all blocks, where the flags do not say which blocks go

KV groups by layer are taken where every other cut's KL is more than a fifth higher: an attention copies words from far
before, and a few windows of one text say little of how another needs that. SmolLM2, calibrated on C4 and cut to half of
its blocks' parameters, has a KL 10 % lower there and loses 2.95 nats on WikiText-2 instead of 1.62 (results/LOG.md).

`--shrink-method flap`, or a chain that begins with it, has widths of its own, which are taken as they are.
"""

import torch
from torch import nn

from ..models import groups
from ..prune.job import Job
from ..settings import RunConfig
from ..structured import Cut, cut, search, slices, spread
from ..structured.budget import Budget

CLEARLY = 1.2  # what the KL of a cut with KV groups by layer is multiplied by before it is compared


def choose(cfg: RunConfig, model: nn.Module, given: tuple[torch.Tensor, torch.Tensor | None, search.Known], job: Job,
           budget: Budget, found: tuple[Cut, list[dict]]) -> tuple[Cut, list[dict], list[str]]:
    """(the cut with the lowest KL, as above, a row of the record for each that was tried, warnings).

    given: ids and mask of the windows (n, T) on which it is measured, and what is known already. found: the best cut
    with the same widths in every layer, and what was tried for it.

    Raises ValueError naming `--uneven` for a model without neurons.
    """
    (ids, mask, noted), (even, tried) = given, found
    if groups.NEURONS in budget.without or groups.NEURONS not in cut.kinds(model):
        raise ValueError("--uneven: this model has no neurons that could differ from layer to layer")
    free, warnings = spread.kinds(model, budget), []
    if cfg.kv_groups or cfg.query_heads:
        free -= {groups.HEADS}
    elif groups.HEADS in free and not slices.can_differ(model, groups.HEADS):
        free -= {groups.HEADS}
        warnings.append("--uneven: every layer has as many KV groups: this family's own code does not let them differ")
    if cfg.shrink_method.partition("+")[0] == "flap":
        costs = noted("FLAP's scores", lambda: spread.standardised(model, ids, mask, cfg, budget))
        if own := spread.spread(model, budget, even, costs, free):
            return own, tried, warnings
        return even, tried, [*warnings, "--uneven: FLAP's own widths cannot be so small; every layer has the same"]
    starts = [even] if cfg.says_what_goes else list(dict.fromkeys([even, Cut((), (), budget.own)]))
    increases, prices = noted("curves", lambda: spread.curves(model, ids, mask, cfg, starts[-1], budget))
    costs = spread.by_price(model, budget, increases, prices)
    kinds = [{groups.NEURONS}, free] if groups.HEADS in free else [free]
    spreads = {spread.spread(model, budget, start, costs, own): own for start in starts for own in kinds}
    cuts = [even, *filter(None, spreads)]
    known = {Cut.of(row): row["kl"] for row in tried if "kl" in row}
    rows = [c.plain() | {"kl": search.known_kl(model, given, job, c)} for c in dict.fromkeys(cuts) if c not in known]
    if rows:
        rows[-1]["prices"] = prices
    known |= {Cut.of(row): row["kl"] for row in rows}

    def worth(c: Cut) -> float:
        return known[c] * (CLEARLY if groups.HEADS in spreads.get(c, ()) else 1)
    return min(cuts, key=worth), [*tried, *rows], warnings
