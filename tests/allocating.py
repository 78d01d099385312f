"""Plans in the tests: models as lists of shapes, measured curves, what every plan must meet."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from oneshot.prune import allocate
from oneshot.prune.patterns import count

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
GROUPS = st.sampled_from(["matrix", "row", *range(1, 9)])
SHARES = st.sampled_from([0.0, 0.05, 0.29, 0.5, 0.6, 0.7, 0.95])


def model(*shapes_of_blocks):
    """blocks [{name: Linear}] from lists of shapes, of weights of two bytes."""
    return [{f"layers.{b}.{i}": allocate.Linear(*shape, 2) for i, shape in enumerate(shapes)}
            for b, shapes in enumerate(shapes_of_blocks)]


def same_blocks(n, shapes=((20, 30), (10, 50))):
    return model(*[shapes] * n)


def flat(blocks):
    return {name: linear.shape for block in blocks for name, linear in block.items()}


def zeros(plan, blocks):
    return sum(plan[name].zeros(*shape) for name, shape in flat(blocks).items())


def method(name, **flags):
    module = allocate.module(name)
    return module, module.Config(**flags)


def curve(pattern, cfg, size):
    """A measured curve: error = size * s², on the grid that the method itself takes."""
    grid = np.linspace(*allocate.module("error").bounds(pattern, cfg), cfg.points).round(6).tolist()
    return {"sparsity": grid, "error": [size * s * s for s in grid]}


def assert_met(plan, blocks, pattern, lowest=0.0, highest=1.0):
    """The zeros of the uniform plan within one weight a row, sparsities within bounds and readable."""
    uniform = dict.fromkeys(flat(blocks), pattern)
    rows = sum(R for R, _ in flat(blocks).values())
    assert list(plan) == list(flat(blocks))
    assert abs(zeros(plan, blocks) - zeros(uniform, blocks)) <= rows
    if pattern.group == "matrix":
        assert zeros(plan, blocks) == zeros(uniform, blocks)
    for name, p in plan.items():
        n = allocate.group_size(pattern, *flat(blocks)[name])
        assert 0 <= p.sparsity < 1 and p.group == pattern.group
        assert lowest - 1 / n < p.sparsity <= highest + 1 / n
        if p != pattern:  # one decimal less would say another count
            digits = len(repr(p.sparsity).partition(".")[2])
            k = count(p.sparsity, n)
            assert all(count(q / 10 ** (digits - 1), n) != k for q in range(10 ** (digits - 1) + 1)) or digits <= 1
