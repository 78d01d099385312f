"""Sparsity patterns: how many weights are zero, which ones may be, and whether a given weight has the pattern.

A pattern is a frozen dataclass with

    keep(score) -> mask         bool (R, C): which weights stay, for scores (R, C) of which the highest are kept
    zeros(R, C) -> int          how many weights are removed, exactly
    holds(W) -> bool            whether a stored weight (R, C) has the pattern
    check(R, C)                 raise ValueError if a weight of this shape cannot have the pattern
    bytes(R, C, itemsize)       storage of the kept values, `itemsize` bytes each, and of their positions
    positions(R, C)             storage of the positions alone
    with_default_group(group)   the pattern with its comparison group set, unless the user has set one

Written as text: `0.5` (half of the weights are zero), `2:4` (2 of every 4 in a row are KEPT, as NVIDIA means it;
SparseGPT's code counts the removed ones), `dense`. Columns are cut off afterwards; --shrink asks for them.

    R, C    rows (outputs) and columns (inputs) of a weight
    s       sparsity, the share of zeros
    group   the weights that compete with one another, see Unstructured
"""

import math
from dataclasses import dataclass, replace

import torch

from .choice import count, halves, highest, kth_smallest, lowest, lowest_of_all, nth_of_two

__all__ = ["NM", "Columns", "Dense", "Pattern", "Unstructured", "count", "highest", "kth_smallest", "lowest", "parse",
           "parse_group", "strength"]


@dataclass(frozen=True)
class Unstructured:
    """A share `sparsity` of the weights is zero, counted within each comparison group.

    group: "matrix" (the whole weight), "row" (each output) or a number of columns (each column block of that width,
    across all rows). None: the solver's default, which is what its paper uses.
    """

    sparsity: float
    group: str | int | None = None

    def __str__(self) -> str:
        return str(self.sparsity).removesuffix(".0")  # all digits, so that `parse` of it gives the same count

    def with_default_group(self, group: str | int | None) -> "Unstructured":
        """This pattern, with `group` if it has none."""
        return self if self.group is not None else replace(self, group=group)

    def check(self, R: int, C: int) -> None:
        """Every shape allows it."""

    def blocks(self, C: int) -> list[tuple[int, int]]:
        """[(first, end)] of the column blocks within which zeros are counted; one unless the group is a number."""
        width = self.group if isinstance(self.group, int) else C
        return [(i, min(i + width, C)) for i in range(0, C, width)]

    def zeros(self, R: int, C: int) -> int:
        """How many weights are removed: floor(s · size) in each comparison group."""
        if self.group == "row":
            return R * count(self.sparsity, C)
        return sum(count(self.sparsity, R * (j - i)) for i, j in self.blocks(C))

    def bytes(self, R: int, C: int, itemsize: int) -> int:
        """Bytes of the kept values and of a bitmap with one bit per weight; never more than dense."""
        return min(R * C * itemsize, (R * C - self.zeros(R, C)) * itemsize + self.positions(R, C))

    def positions(self, R: int, C: int) -> int:
        """Bytes of a bitmap with one bit per weight."""
        return -(-R * C // 8)

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """Mask, bool (R, C), of the weights that stay: all but the lowest of `score` (R, C) in each group."""
        if self.group == "row":
            return ~lowest(score, count(self.sparsity, score.shape[1]))
        parts = [score[:, i:j] for i, j in self.blocks(score.shape[1])]
        masks = [~lowest_of_all(p, count(self.sparsity, p.numel())) for p in parts]
        return masks[0] if len(masks) == 1 else torch.cat(masks, dim=1)

    def holds(self, W: torch.Tensor) -> bool:
        """Whether W (R, C) has at least the required number of zeros in every group."""
        R, C = W.shape
        if self.group == "row":
            return bool((C - W.count_nonzero(dim=1) >= count(self.sparsity, C)).all())
        return all(R * (j - i) - int(W[:, i:j].count_nonzero()) >= count(self.sparsity, R * (j - i))
                   for i, j in self.blocks(C))


@dataclass(frozen=True)
class NM:
    """At most `n` nonzeros in every `m` consecutive weights of a row."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.n / self.m

    @property
    def group(self) -> None:
        """An N:M pattern has no comparison group to choose."""
        return None

    def with_default_group(self, group: str | int | None) -> "NM":
        """This pattern."""
        return self

    def check(self, R: int, C: int) -> None:
        """Raise ValueError unless C is divisible by m."""
        if C % self.m:
            raise ValueError(f"pattern {self} needs a width divisible by {self.m}, this one is {C}")

    def zeros(self, R: int, C: int) -> int:
        """How many weights are removed."""
        return R * C // self.m * (self.m - self.n)

    def bytes(self, R: int, C: int, itemsize: int) -> int:
        """Bytes of the kept values and of their positions: 0.5625 of dense for 2:4 at 16 bits per weight.

        Never more than dense.
        """
        return min(R * C * itemsize, (R * C - self.zeros(R, C)) * itemsize + self.positions(R, C))

    def positions(self, R: int, C: int) -> int:
        """Bytes of a number for each group of m that encodes which are kept; 2:4 as `oneshot_kernels`: four bits."""
        bits = 4 if (self.n, self.m) == (2, 4) else (math.comb(self.m, self.n) - 1).bit_length()
        return R * math.ceil(C // self.m * bits / 8)

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """Mask, bool (R, C): the n highest of each m in `score` (R, C) stay; ties are removed from the left."""
        self.check(*score.shape)
        columns = score.reshape(-1, self.m).T
        keep = torch.empty(columns.shape[1], self.m, dtype=torch.bool, device=score.device)
        return keep.copy_(self.keep_of(columns.contiguous()).T).view(score.shape)

    def keep_of(self, s: torch.Tensor) -> torch.Tensor:
        """Mask, bool (m, groups), for scores s (m, groups) with one group per column; otherwise as `keep`."""
        if self.n in (0, self.m):
            return torch.full_like(s, self.n > 0, dtype=torch.bool)
        keep = s >= nth_of_two(*halves(s.unbind(0), self.n), self.n)
        if int(keep.count_nonzero()) > self.n * s.shape[1]:  # ties at the threshold
            tied = keep.sum(0) > self.n
            first = s[:, tied].argsort(dim=0, stable=True)[: self.m - self.n]
            keep[:, tied] = torch.ones_like(keep[:, tied]).scatter_(0, first, False)
        return keep

    def holds(self, W: torch.Tensor) -> bool:
        """Whether every group of m weights of W (R, C) has at most n nonzeros."""
        if W.shape[1] % self.m:
            return False
        columns = (W != 0).reshape(-1, self.m).unbind(1)
        return bool((sum(c.to(torch.int16) for c in columns) <= self.n).all())


@dataclass(frozen=True)
class Columns:
    """Whole columns are zero: of every `count` units of `size` consecutive columns, `kept` stay.

    For the consumer of what is cut together (models/groups.py): a neuron is one column of down_proj, a KV group
    several of o_proj. A unit's score is the sum of its weights' scores.
    """

    kept: int
    count: int
    size: int = 1
    group = None

    def __str__(self) -> str:
        return f"{self.kept}/{self.count}" + (f"x{self.size}" if self.size > 1 else "")

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.kept / self.count

    def with_default_group(self, group: str | int | None) -> "Columns":
        """This pattern."""
        return self

    def check(self, R: int, C: int) -> None:
        """Raise ValueError unless C is a multiple of the units' columns."""
        if C % (self.count * self.size):
            raise ValueError(f"pattern {self} needs a width divisible by {self.count * self.size}, this one is {C}")

    def zeros(self, R: int, C: int) -> int:
        """How many weights are removed."""
        return R * C // self.count * (self.count - self.kept)

    def bytes(self, R: int, C: int, itemsize: int) -> int:
        """Bytes of the columns that stay; the others are cut off."""
        return (R * C - self.zeros(R, C)) * itemsize

    def positions(self, R: int, C: int) -> int:
        """None: the columns are cut off."""
        return 0

    def units(self, score: torch.Tensor) -> torch.Tensor:
        """(C / size,): the summed score of each unit, for scores (R, C)."""
        return score.sum(0).view(-1, self.size).sum(1)

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """Mask, bool (R, C): of every `count` units those of highest score stay; ties are removed from the left."""
        self.check(*score.shape)
        return self.mask(self.units(score), score.shape[0])

    def mask(self, score: torch.Tensor, R: int) -> torch.Tensor:
        """Mask, bool (R, C), for one score per unit (C / size,)."""
        keep = ~lowest(score.view(-1, self.count), self.count - self.kept)
        return keep.view(-1, 1).expand(-1, self.size).reshape(1, -1).expand(R, -1).contiguous()

    def holds(self, W: torch.Tensor) -> bool:
        """Whether of every `count` units of W (R, C) at most `kept` have a weight that is not zero."""
        if W.shape[1] % (self.count * self.size):
            return False
        used = (W != 0).any(0).view(-1, self.count, self.size).any(2)
        return bool((used.sum(1) <= self.kept).all())


@dataclass(frozen=True)
class Dense:
    """Nothing is removed."""

    sparsity = 0.0
    group = None

    def __str__(self) -> str:
        return "dense"

    def with_default_group(self, group: str | int | None) -> "Dense":
        """This pattern."""
        return self

    def check(self, R: int, C: int) -> None:
        """Every shape allows it."""

    def zeros(self, R: int, C: int) -> int:
        """None."""
        return 0

    def bytes(self, R: int, C: int, itemsize: int) -> int:
        """Bytes of all weights."""
        return R * C * itemsize

    def positions(self, R: int, C: int) -> int:
        """None."""
        return 0

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """All weights stay: True (R, C)."""
        return torch.ones_like(score, dtype=torch.bool)

    def holds(self, W: torch.Tensor) -> bool:
        """Always."""
        return True


Pattern = Unstructured | NM | Dense | Columns


def strength(W: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(R, C): what of W the nearest weight with this pattern keeps is its highest: W² summed over columns, else |W|."""
    return W.square() if isinstance(pattern, Columns) else W.abs()


def parse(text: str, group: str | int | None = None) -> Pattern:
    """The pattern written as `text`, with the comparison group `group` if it is unstructured.

    Raises ValueError naming `--pattern` or `--group` when there is no such pattern.
    """
    text = str(text).strip()
    if text == "dense":
        return Dense()
    try:
        if ":" in text:
            n, m = (int(part) for part in text.split(":"))
            if 0 < n <= m:
                return NM(n, m)
        else:
            sparsity = float(text)
            if 0 <= sparsity < 1:
                return Unstructured(sparsity, parse_group(group))
    except ValueError as error:
        if "--group" in str(error):
            raise
    raise ValueError(f"--pattern {text}: give a sparsity in [0, 1) such as 0.5, an N:M such as 2:4 "
                     "(keeps 2 of 4), or dense")


def parse_group(group: str | int | None) -> str | int | None:
    """A comparison group: None, "matrix", "row" or a positive number of columns. Raises ValueError naming `--group`."""
    if group in (None, "matrix", "row"):
        return group
    if str(group).isdecimal() and int(group) > 0:
        return int(group)
    raise ValueError(f"--group {group}: give matrix, row, or a number of columns such as 128")
