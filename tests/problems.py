"""Random layers to prune, shared by the tests of the numerical core.

    W (R, C) weights, X (T, C) tokens; both float64, the same for the same arguments
"""

import reference as ref
import torch

from oneshot.calibrate.statistics import Statistics
from oneshot.prune.patterns import NM, Columns


def layer(R, C, T, *, seed=0, dead=()):
    """W, and X whose inputs are correlated and of different size; the inputs in `dead` are always zero."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    W = randn(R, C)
    X = randn(T, C) + 2 * randn(T, max(1, C // 8)) @ randn(max(1, C // 8), C) / max(1, C // 8) ** 0.5
    X = X * (0.7 * randn(C)).exp() + 0.3
    X[:, list(dead)] = 0
    return W, X


def white(C, variance=4.0):
    """Tokens (C, C) whose G is exactly variance · I (for a variance and C that are powers of four)."""
    return torch.eye(C, dtype=torch.float64) * (variance * C) ** 0.5


def statistics_of(X, needs, dtype=None, batch=None):
    """Statistics of the tokens X (T, C), in batches of `batch`."""
    needs = {*needs, "outer"} if "gradient" in needs else needs  # of which `solving.run` makes one
    statistics = Statistics(X.shape[1], needs, dtype=dtype or X.dtype)
    for x in X.split(batch or max(len(X), 1)):
        statistics.update(x)
    return statistics


def ref_pattern(pattern):
    """How the reference writes a pattern."""
    return (pattern.n, pattern.m) if isinstance(pattern, NM) else pattern.sparsity


def groups(pattern, R, C):
    """The index sets (row slice, column slice) within which a pattern counts."""
    whole = slice(None)
    if isinstance(pattern, NM):
        return [(slice(i, i + 1), slice(j, j + pattern.m)) for i in range(R) for j in range(0, C, pattern.m)]
    if isinstance(pattern, Columns):
        return [(whole, slice(j, j + pattern.count * pattern.size))
                for j in range(0, C, pattern.count * pattern.size)]
    if pattern.group == "row":
        return [(slice(i, i + 1), whole) for i in range(R)]
    width = pattern.group if isinstance(pattern.group, int) else C
    return [(whole, slice(j, j + width)) for j in range(0, C, width)]


def removed_of(pattern, size):
    """How many of a group of `size` weights go."""
    if isinstance(pattern, Columns):
        return size // pattern.count * (pattern.count - pattern.kept)
    return pattern.m - pattern.n if isinstance(pattern, NM) else ref.exact_count(size, pattern.sparsity)
