"""Error: every linear is pruned to the sparsity at which removing one more weight costs the same.

    e_l(s)  relative error ‖(W - Ŵ)x‖² / ‖Wx‖² of linear l at sparsity s, Ŵ by Wanda's mask in the pattern's group
    n_l     its number of weights
    w_b     weight of block b: geometric, from `early` at the first block to 1 at the last

    minimise Σ_l w_b n_l e_l(s_l)   subject to   Σ_l n_l s_l = s Σ_l n_l,   |s_l - s| <= spread

Absolute errors cannot be compared between linears, because the sizes of their outputs differ by orders of magnitude;
relative errors can. With the factor n_l, equal curves give equal sparsities whatever the sizes. The effect of an error
on later blocks is not measured, so early blocks seem easy to prune, and without w_b (`early` 1) the plan can be far
worse than the uniform one. The default was the best of several values from 1 to 15 on two small models with Wanda at
60 %, and it beat the uniform plan on only one of them. Nor is it measured that a solver can compensate for errors.

At the optimum w_b e_l'(s_l) = μ for all l. The curve is measured at `points` sparsities on the Statistics' sample of
tokens. Its slopes, made increasing by the lower convex hull, are interpolated linearly between the midpoints of the
intervals, so that s_l(μ) is continuous; μ is found by bisection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...runtime.flag import flag
from ..linalg import input_weighted
from ..patterns import Pattern
from . import Blocks, Linears, Measured, Plan, meet, sizes

needs = frozenset({"sum_sq", "sample"})
TILT = 1e-6  # added to the slopes, in mean slopes per unit of sparsity: where errors tie, sparsities become equal


@dataclass(frozen=True)
class Config:
    spread: float = flag(0.08, "a linear layer's sparsity differs from the mean by at most this")
    points: int = flag(9, "number of sparsities at which the error of every linear layer is measured")
    early: float = flag(15.0, "how many times as much an error counts in the first block as in the last")

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1:
            raise ValueError(f"--error.spread {self.spread}: must be from 0 to 1")
        if self.points < 3:
            raise ValueError(f"--error.points {self.points}: must be at least 3")
        if not self.early > 0:
            raise ValueError(f"--error.early {self.early}: must be positive")


def measure(linears: Linears, pattern: Pattern, cfg: Config) -> Measured:
    """{name: {"sparsity": [...], "error": [...]}}, the curve e_l of each linear."""
    measured, grid = {}, np.linspace(*bounds(pattern, cfg), cfg.points).round(6).tolist()
    for name, (weight, statistics) in linears.items():
        W = weight()
        S = input_weighted(W, statistics)
        measured[name] = {"sparsity": grid, "error": [
            statistics.relative_error(W, W * replace(pattern, sparsity=s).keep(S)) for s in grid]}
    return measured


def plan(measured: Measured, blocks: Blocks, pattern: Pattern, cfg: Config) -> Plan:
    """One sparsity per linear."""
    size, slopes = sizes(blocks), {}
    for b, block in enumerate(blocks):
        weight = cfg.early ** (1 - b / max(len(blocks) - 1, 1))
        for name in block:
            if name in measured and None not in measured[name]["error"]:
                s, rising = convex_slopes(measured[name]["sparsity"], measured[name]["error"])
                slopes[name] = s, weight * rising
    wanted = dict.fromkeys(size, pattern.sparsity)
    wanted.update(equal_slope(slopes, size, pattern.sparsity))
    return meet(wanted, blocks, pattern, *bounds(pattern, cfg))


def bounds(pattern: Pattern, cfg: Config) -> tuple[float, float]:
    """(lowest, highest) sparsity that a linear may have."""
    return max(pattern.sparsity - cfg.spread, 0.0), min(pattern.sparsity + cfg.spread, 1.0)


def convex_slopes(s: Sequence[float], e: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(sparsities, slopes) of the lower convex hull of the points (s, e); arrays (len(s) + 1,).

    The slopes are at the midpoints of the intervals of s, and extrapolated to both ends.
    """
    hull = [0]
    for i in range(1, len(s)):
        while len(hull) > 1 and (e[hull[-1]] - e[hull[-2]]) * (s[i] - s[hull[-1]]) >= \
                (e[i] - e[hull[-1]]) * (s[hull[-1]] - s[hull[-2]]):
            hull.pop()
        hull.append(i)
    x = np.asarray(s)
    y = np.interp(x, x[hull], np.asarray(e)[hull])
    slopes = np.diff(y) / np.maximum(np.diff(x), 1e-12)
    ends = 1.5 * slopes[[0, -1]] - 0.5 * slopes[[1, -2]]
    return np.concatenate([x[:1], (x[1:] + x[:-1]) / 2, x[-1:]]), np.concatenate([ends[:1], slopes, ends[1:]])


def equal_slope(slopes: Mapping[str, tuple[np.ndarray, np.ndarray]], size: Mapping[str, int],
                mean: float) -> dict[str, float]:
    """{name: sparsity} at which all slopes equal one μ and the mean weighted by `size` is `mean`.

    slopes: {name: (sparsities, increasing slopes there)}.
    """
    if not slopes:
        return {}
    weights = np.array([size[name] for name in slopes], dtype=float)
    tilt = TILT * (np.mean([np.abs(rising).mean() for _, rising in slopes.values()]) or 1.0)
    curves = [(rising + tilt * s, s) for s, rising in slopes.values()]
    below, above = min(c[0][0] for c in curves), max(c[0][-1] for c in curves)
    for _ in range(100):
        mu = (below + above) / 2
        s = np.array([np.interp(mu, *curve) for curve in curves])
        below, above = (below, mu) if np.average(s, weights=weights) > mean else (mu, above)
    return dict(zip(slopes, s.tolist(), strict=True))
