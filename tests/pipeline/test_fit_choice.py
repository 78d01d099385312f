"""The knapsack of `oneshot fit`: as good as trying everything, within every limit."""

import itertools
import random

import numpy as np
import pytest

from oneshot.pipeline.fit import choice
from oneshot.pipeline.fit.choice import Option


def by_force(units, limits):
    """The least loss of all choices within the limits; None where there is none."""
    best = None
    for picked in itertools.product(*units):
        costs = [sum(o.costs[k] for o in picked) for k in range(len(limits))]
        if all(c <= limit + 1e-9 for c, limit in zip(costs, limits, strict=True)):
            loss = sum(o.loss for o in picked)
            best = loss if best is None else min(best, loss)
    return best


@pytest.mark.parametrize("limits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(25))
def test_it_is_as_good_as_trying_everything(limits, seed):
    draw = random.Random(seed)
    units = [[Option(draw.random(), tuple(draw.choice((draw.random(), 0.5)) for _ in range(limits)))
              for _ in range(draw.randint(1, 4))] for _ in range(draw.randint(1, 6))]
    bounds = [draw.uniform(0.1, 0.7) * len(units) for _ in range(limits)]
    found, least = choice.choose(units, bounds), by_force(units, bounds)
    if least is None:
        assert found is None
        return
    picked = [unit[i] for unit, i in zip(units, found, strict=True)]
    assert sum(o.loss for o in picked) == pytest.approx(least)
    assert all(sum(o.costs[k] for o in picked) <= bounds[k] + 1e-9 for k in range(limits))


@pytest.mark.parametrize("seed", range(10))
def test_the_stair_of_two_costs_keeps_what_no_other_row_beats(seed):
    draw = random.Random(seed)
    rows = [(draw.choice((draw.random(), draw.randint(0, 4))), draw.choice((draw.random(), draw.randint(0, 4))),
             draw.random()) for _ in range(60)]
    costs, losses = np.array([row[:2] for row in rows], dtype=float), np.array([row[2] for row in rows])
    want = {i for i, own in enumerate(rows) if not any(all(a <= b for a, b in zip(other, own, strict=True))
                                                       for j, other in enumerate(rows) if j != i)}
    assert set(choice.front(costs, losses, np.ones(2)).tolist()) == want and len(want) > 2


def test_what_all_options_cost_alike_is_no_choice_but_a_limit():
    units = [[Option(0.0, (1.0, 3.0)), Option(0.1, (0.5, 3.0))] for _ in range(4)]
    assert sum(choice.choose(units, [3.0, 12.0])) == 2 and choice.choose(units, [3.0, 11.9]) is None
    assert choice.choose([[Option(0.2, ()), Option(0.1, ())]] * 3, []) == (1, 1, 1)


def test_many_units_stay_within_the_limit_and_near_the_best(monkeypatch):
    """With a coarse grid in place of exact fronts, the limit still holds; and equal units are decided exactly."""
    draw = random.Random(0)
    units = [[Option(0.0, (1.0, 1.0)), Option(draw.random(), (draw.random(), draw.random()))] for _ in range(14)]
    exact = choice.choose(units, [10.0, 11.0])
    monkeypatch.setattr(choice, "MOST", 20)
    rough = choice.choose(units, [10.0, 11.0])
    losses = [sum(unit[i].loss for unit, i in zip(units, found, strict=True)) for found in (exact, rough)]
    assert losses[0] <= losses[1] <= 1.5 * losses[0] + 0.1
    assert all(sum(unit[i].costs[k] for unit, i in zip(units, rough, strict=True)) <= (10.0, 11.0)[k] + 1e-9
               for k in range(2))
    same = [[Option(0.0, (1.0,)), Option(loss, (0.5,))] for loss in (0.3, 0.1, 0.2, 0.4)]
    assert choice.choose(same, [3.0]) == (0, 1, 1, 0)


def test_nothing_to_choose_and_nothing_that_fits():
    assert choice.choose([], [1.0]) == () and choice.choose([[Option(1.0, (2.0,))]], [1.0]) is None
    assert choice.choose([[Option(1.0, (1.0,)), Option(1.0, (1.0,))]], [1.0]) == (0,)
