"""Solving one layer in the tests: chains of solvers with exactly the Statistics they ask for."""

import json
from typing import NamedTuple

import torch
from problems import groups, removed_of, statistics_of

from oneshot.calibrate.statistics import Gradient
from oneshot.prune import solvers
from oneshot.prune.patterns import Dense
from oneshot.settings.flags import configured


class Case(NamedTuple):
    """A chain to test: [(module, cfg), ...], and what of X it may look at."""

    chain: list
    needs: frozenset
    name: str


def case(method, **flags):
    """The chain `method`, its last part with `flags` in place of the defaults."""
    *before, last = solvers.chain(method)
    chain = [(m, m.Config()) for m in before] + [(last, last.Config(**flags))]
    return Case(chain, frozenset().union(*(m.needs for m, _ in chain)), method)


def run(c, W, X, pattern, statistics=None):
    """The chain's solution with exactly the Statistics it says it needs, in W's precision."""
    statistics = statistics or statistics_of(X, c.needs, W.dtype)
    statistics = seen(statistics, W, c.needs)
    return solvers.solve(W, statistics, resolved(c, pattern), c.chain)


def seen(statistics, W, needs):
    """The statistics with a gradient where one is needed: that of half the squared norm of the layer's output."""
    g = W @ statistics.G.to(W) if "gradient" in needs else None
    return statistics if g is None else statistics.with_gradient(Gradient(g, g.square()))


def resolved(c, pattern):
    """The pattern with the solver's own comparison group, as the loop hands it over."""
    return pattern.with_default_group(c.chain[0][1].group)


def assert_sound(solution, W, pattern):
    """A well-formed solution with exactly the zeros asked for in every group."""
    W_hat, mask, info = solution.W_hat, solution.mask, solution.info
    assert W_hat.shape == mask.shape == W.shape and W_hat.dtype == W.dtype and mask.dtype == torch.bool
    assert torch.isfinite(W_hat).all() and not W_hat[~mask].any() and pattern.holds(W_hat)
    assert int((~mask).sum()) == pattern.zeros(*W.shape)
    if not isinstance(pattern, Dense):
        for rows, columns in groups(pattern, *W.shape):
            part = mask[rows, columns]
            assert int((~part).sum()) == removed_of(pattern, part.numel())
    json.dumps(info)  # plain values
    assert all(isinstance(w, str) for w in info.get("warnings", []))


def solved(method, W, X, pattern, **given):
    """The solution of `method`, flags as in refit__steps=3."""
    flags = {k.replace("__", "."): v for k, v in given.items()}
    chain = [(module, configured(module, flags)) for module in solvers.chain(method)]
    statistics = statistics_of(X, {"outer", "sum", "sum_sq"}, W.dtype)
    return solvers.solve(W, statistics, pattern.with_default_group(chain[0][1].group), chain)
