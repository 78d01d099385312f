"""Mix: one of several patterns for each linear, within a budget of bytes.

    e_lp    relative error ‖(W - Ŵ)x‖² / ‖Wx‖² of linear l under pattern p, Ŵ by Wanda's mask
    n_l     number of weights of linear l
    b_lp    bytes of linear l under pattern p (`Pattern.bytes`) in its stored dtype, as the record counts them

    minimise Σ_l n_l e_lp(l)   subject to   Σ_l b_lp(l) <= budget · Σ_l (dense bytes of l)

The candidates are the run's `--pattern` and those of `also`; 2:4 and dense are what hardware can run (SpenseGPT, arXiv
2606.10445, mixes the two within a linear). Every linear starts with its smallest candidate. Then, repeatedly, the step
along a linear's lower convex hull of (bytes, error) that saves the most error per byte is taken; steps that exceed the
budget are skipped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...runtime.flag import flag
from .. import patterns
from ..linalg import input_weighted
from ..patterns import Pattern
from . import Blocks, Linear, Linears, Measured, Plan, sizes

needs = frozenset({"sum_sq", "sample"})
Point = tuple[int, float, Pattern]  # (bytes, error, pattern)


@dataclass(frozen=True)
class Config:
    budget: float = flag(0.75, "bytes of all linear layers, as a share of their dense bytes")
    also: str = flag("dense", "patterns to mix with --pattern: dense or N:M, separated by commas")

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(f"--mix.budget {self.budget}: must be above 0 and at most 1")
        for text in self.also.split(","):
            try:
                unstructured = isinstance(patterns.parse(text), patterns.Unstructured)
            except ValueError:
                unstructured = True
            if unstructured:
                raise ValueError(f"--mix.also {text}: give dense or N:M patterns such as 4:8, separated by commas")


def candidates(pattern: Pattern, cfg: Config) -> list[Pattern]:
    """The patterns to choose from, `pattern` first."""
    return list(dict.fromkeys([pattern, *(patterns.parse(text) for text in cfg.also.split(","))]))


def fits(pattern: Pattern, shape: Sequence[int]) -> bool:
    """Whether a weight of this shape (R, C) can have the pattern."""
    try:
        pattern.check(*shape)
    except ValueError:
        return False
    return True


def measure(linears: Linears, pattern: Pattern, cfg: Config) -> Measured:
    """{name: {pattern as text: relative error}} of the candidates that a linear's shape allows."""
    measured = {}
    for name, (weight, statistics) in linears.items():
        W = weight()
        S = input_weighted(W, statistics)
        measured[name] = {str(p): statistics.relative_error(W, W * p.keep(S))
                          for p in candidates(pattern, cfg) if fits(p, W.shape)}
    return measured


def check(blocks: Blocks, pattern: Pattern, cfg: Config) -> None:
    """Raise ValueError when a shape allows none of the candidates, or the smallest candidates exceed the budget."""
    spent = sum(min(p.bytes(*linear) for p in possible(name, linear, pattern, cfg))
                for block in blocks for name, linear in block.items())
    dense = dense_bytes(blocks)
    if spent > cfg.budget * dense:
        raise ValueError(f"--mix.budget {cfg.budget}: the smallest choice of patterns takes {spent / dense:.4f} of the "
                         "dense bytes; raise the budget or add a sparser pattern to --mix.also")


def plan(measured: Measured, blocks: Blocks, pattern: Pattern, cfg: Config) -> Plan:
    """One of the candidates per linear; a linear that was not measured gets the smallest. Raises as `check` does."""
    check(blocks, pattern, cfg)
    size, chosen, steps, limit = sizes(blocks), {}, [], cfg.budget * dense_bytes(blocks)
    for name, linear in ((name, linear) for block in blocks for name, linear in block.items()):
        errors = measured.get(name, {})
        hull = lower_hull([(p.bytes(*linear), size[name] * (errors.get(str(p)) or 0.0), p)
                           for p in possible(name, linear, pattern, cfg)])
        chosen[name] = hull[0]
        steps += [((a[1] - b[1]) / (b[0] - a[0]), name, a, b) for a, b in pairwise(hull)]
    spent = sum(choice[0] for choice in chosen.values())
    for _, name, a, b in sorted(steps, key=lambda step: -step[0]):
        if chosen[name] is a and spent + b[0] - a[0] <= limit:
            chosen[name], spent = b, spent + b[0] - a[0]
    return {name: choice[2] for name, choice in chosen.items()}


def possible(name: str, linear: Linear, pattern: Pattern, cfg: Config) -> list[Pattern]:
    """The candidates that a linear's shape allows. Raises ValueError naming `--mix.also` when there are none."""
    found = [p for p in candidates(pattern, cfg) if fits(p, linear.shape)]
    if not found:
        raise ValueError(f"--mix.also {cfg.also}: {name} ({linear.R}x{linear.C}) can have none of these patterns, "
                         f"nor {pattern}; add dense")
    return found


def dense_bytes(blocks: Blocks) -> int:
    """Bytes of all linears when dense."""
    return sum(linear.R * linear.C * linear.itemsize for block in blocks for linear in block.values())


def lower_hull(points: Iterable[Point]) -> list[Point]:
    """The points on the lower convex hull, in order of increasing bytes and decreasing error."""
    hull = []
    for p in sorted(points, key=lambda p: p[:2]):
        if hull and p[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (p[0] - hull[-1][0]) <= \
                (hull[-1][1] - p[1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append(p)
    return hull
