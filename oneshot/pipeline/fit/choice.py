"""Choice: one option for each unit, of least total loss, so that no total cost exceeds its limit.

    minimise Σ_u loss(u, o_u)   subject to   Σ_u cost_k(u, o_u) <= limit_k   for every k

The multiple-choice knapsack that ZipLM (arXiv 2302.04089) and SPDY solve for one cost. Units are taken one after the
other; of the partial choices those are kept that no other beats in its loss and in every cost, so that the result is
exact. Blocks of a kind cost the same, so there are few: one for each number of them in each form. Beyond MOST partial
choices one, of least loss, is kept for each cell of a grid of costs: no limit is exceeded, but the loss may be above
the least.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST = 20_000  # partial choices that are kept
CELLS = 200  # of the grid along each cost
SLACK = 1e-9  # of a limit, for sums in another order


class Option(NamedTuple):
    """One option of a unit: its loss, and what it costs, a number for each limit."""

    loss: float
    costs: tuple[float, ...]


def choose(units: Sequence[Sequence[Option]], limits: Sequence[float]) -> tuple[int, ...] | None:
    """The place of each unit's option in the best choice; None where every choice exceeds a limit. Ties: the first."""
    limit = np.asarray(limits, dtype=float) * (1 + SLACK)
    least = [np.array([min(o.costs[k] for o in unit) for k in range(len(limits))]) for unit in units]
    rest = sum(least, np.zeros(len(limits)))  # what the units that are not taken yet cost at least
    costs, losses, steps = np.zeros((1, len(limits))), np.zeros(1), []
    for unit, low in zip(units, least, strict=True):
        rest = rest - low
        wide = (costs[:, None] + np.array([o.costs for o in unit])[None]).reshape(-1, len(limits))
        total = (losses[:, None] + np.array([o.loss for o in unit])[None]).ravel()
        fits = ((wide + rest) <= limit).all(1).nonzero()[0]
        kept = fits[front(wide[fits], total[fits], limit)]
        if not len(kept):
            return None
        costs, losses = wide[kept], total[kept]
        steps.append((kept // len(unit), kept % len(unit)))
    place, found = int(losses.argmin()), []
    for before, option in reversed(steps):
        found.append(int(option[place]))
        place = int(before[place])
    return tuple(reversed(found))


def front(costs: np.ndarray, losses: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """int (m,): the rows of costs (n, K), losses (n,) that no other row beats in all of them; of equal rows the first.

    limit: (K,), the scale of the grid.
    """
    order = np.lexsort((*costs.T[::-1], losses))  # by loss, then cost
    if costs.shape[1] == 1:
        sorted_costs = costs[order, 0]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_costs[:-1]]))
        order = order[sorted_costs < before]
    else:
        order = unbeaten(costs, order)
    if len(order) > MOST:
        cells = np.ceil(costs[order] / np.where(limit > 0, limit, 1) * CELLS)
        _, first = np.unique(cells, axis=0, return_index=True)  # of each cell the least loss
        order = order[np.sort(first)]
    return order


def unbeaten(costs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Those of `order`, rows of costs (n, K) by rising loss, that cost less in something than every one before."""
    kept: list[int] = []
    known = np.empty((0, costs.shape[1]))
    for i in order:
        if not len(kept) or not (known <= costs[i]).all(1).any():
            kept.append(int(i))
            known = np.vstack([known, costs[i]])
    return np.array(kept, dtype=int)
