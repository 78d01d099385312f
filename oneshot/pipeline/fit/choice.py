"""Choice: one option for each unit, of least total loss, so that no total cost exceeds its limit.

    minimise Σ_u loss(u, o_u)   subject to   Σ_u cost_k(u, o_u) <= limit_k   for every k

The multiple-choice knapsack that ZipLM (arXiv 2302.04089) and SPDY solve for one cost. Units are taken one after the
other; of the partial choices those are kept that no other beats in its loss and in every cost, so that the result is
exact. Blocks of a kind cost the same, so there are few: one for each number of them in each form. Beyond MOST partial
choices one, of least loss, is kept for each cell of a grid of costs: no limit is exceeded, but the loss may be above
the least. Costs that all options of a unit share need no choice.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST = 4000  # partial choices that are kept
SLACK = 1e-9  # of a limit, for sums in another order
SAME = 1e-12  # of a limit: costs that near are the same sum in another order


class Option(NamedTuple):
    """One option of a unit: its loss, and what it costs, a number for each limit."""

    loss: float
    costs: tuple[float, ...]


def choose(units: Sequence[Sequence[Option]], limits: Sequence[float]) -> tuple[int, ...] | None:
    """The place of each unit's option in the best choice; None where every choice exceeds a limit. Ties: the first."""
    limit = np.asarray(limits, dtype=float) * (1 + SLACK)
    each = [np.array([o.costs for o in unit], dtype=float).reshape(len(unit), len(limit)) for unit in units]
    least = [own.min(0) for own in each]
    rest = sum(least, np.zeros(len(limit)))  # what the units that are not taken yet cost at least
    if (rest > limit).any():
        return None
    differ = np.array([any(np.ptp(own[:, k]) for own in each) for k in range(len(limit))], dtype=bool)
    limit, rest = limit[differ], rest[differ]
    costs, losses, steps = np.zeros((1, len(limit))), np.zeros(1), []
    for unit, own, low in zip(units, each, least, strict=True):
        rest = rest - low[differ]
        wide = (costs[:, None] + own[None, :, differ]).reshape(len(costs) * len(unit), len(limit))
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
    K, scale = costs.shape[1], np.where(limit > 0, limit, 1)
    near = np.round(costs / (scale * SAME))
    order = np.lexsort((*near.T[::-1], losses))  # by loss, then cost
    if K == 1:
        sorted_costs = near[order, 0]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_costs[:-1]]))
        order = order[sorted_costs < before]
    else:
        order = order[:1] if K == 0 else stairs(near, order) if K == 2 else unbeaten(near, order)
    if len(order) > MOST:
        cells = np.ceil(costs[order] / scale * int(MOST ** (1 / K)))
        _, first = np.unique(cells, axis=0, return_index=True)  # of each cell the least loss
        order = order[np.sort(first)]
    return order


def stairs(costs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`unbeaten` of two costs, faster: of the rows before only a stair matters, that falls as the first cost rises."""
    kept: list[int] = []
    left: list[float] = []  # the first costs of the stair, rising, and what the second are there
    low: list[float] = []
    for i, (x, y) in zip(order.tolist(), costs[order].tolist(), strict=True):
        at = bisect.bisect_right(left, x)
        if at and low[at - 1] <= y:
            continue
        kept.append(i)
        end = at
        while end < len(left) and low[end] >= y:
            end += 1
        left[at:end], low[at:end] = [x], [y]
    return np.array(kept, dtype=int)


def unbeaten(costs: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Those of `order`, rows of costs (n, K) by rising loss, that cost less in something than every one before."""
    kept: list[int] = []
    known = np.empty((0, costs.shape[1]))
    for i in order:
        if not len(kept) or not (known <= costs[i]).all(1).any():
            kept.append(int(i))
            known = np.vstack([known, costs[i]])
    return np.array(kept, dtype=int)
