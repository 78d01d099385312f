"""Which shapes of sparsity exist: how many zeros, where they may lie, whether a weight has them.

A pattern is a frozen value with five questions answered: `keep(score)` (which weights stay), `zeros(R, C)` (how many
go), `holds(W)` (does a stored weight have the shape), `check(R, C)` (can a weight of this shape have it at all) and
`bytes(R, C, itemsize)` (what its kept values and their places take, `itemsize` bytes a value).

Text form: `0.5` (half of the weights are zero), `2:4` (KEEPS 2 of every 4 in a row, NVIDIA's meaning; SparseGPT's code
counts the removed ones), `dense`.

    R, C    rows (outputs) and columns (inputs) of a weight
    s       sparsity, the share of zeros
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

import numpy as np
import torch


def count(s: float, n: int) -> int:
    """floor(s * n) in decimal arithmetic: float arithmetic gives 28 for 29 % of 100."""
    return int(Decimal(str(s)) * n)


def lowest(score: torch.Tensor, k: int) -> torch.Tensor:
    """True at the `k` lowest entries of each row of `score` (..., n); among equals the lower index goes first.

    By selection instead of sorting; equal scores at the threshold are told apart only when there are any.
    """
    if k <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if k >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = kth_smallest(score, k)
    chosen = score <= threshold
    if int(chosen.count_nonzero()) > k * score[..., 0].numel():
        tied = score == threshold
        missing = k - (score < threshold).sum(-1, keepdim=True)
        chosen &= ~tied | (tied.cumsum(-1) <= missing)
    return chosen


def highest(rows: Sequence[torch.Tensor], n: int) -> Sequence[torch.Tensor]:
    """The n highest of each column of `rows`, a sequence of (groups,), in descending order: halves, then merged.

    A few elementwise operations on long rows, where a sort would take the columns, m values each, one by one.
    """
    if len(rows) == 1:
        return rows
    a, b = halves(rows, n)
    return [nth_of_two(a, b, r) for r in range(1, min(n, len(rows)) + 1)]


def halves(rows, n):
    middle = len(rows) // 2
    return highest(rows[:middle], n), highest(rows[middle:], n)


def nth_of_two(a, b, r):
    """The r-th highest of a ∪ b, both descending: the largest of a_r, b_r and min(a_i, b_(r-i)) for 0 < i < r."""
    return functools.reduce(torch.maximum, [
        *(half[r - 1] for half in (a, b) if r <= len(half)),
        *(torch.minimum(a[i - 1], b[r - i - 1]) for i in range(1, r) if i <= len(a) and r - i <= len(b))])


def kth_smallest(score: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest of each row of `score` (..., n), as (..., 1)."""
    if score.device.type == "cpu":  # numpy's vectorised selection: 35 ms against 230 for 2048 rows of 5504
        return torch.from_numpy(np.partition(score.numpy(), k - 1, axis=-1)[..., k - 1 : k])
    return score.kthvalue(k, dim=-1, keepdim=True).values


@dataclass(frozen=True)
class Unstructured:
    """A share `sparsity` of the weights is zero, counted within each comparison `group`.

    group: "matrix" (the whole weight), "row" (each output) or a number of columns (each block of so many columns, over
    all rows). None leaves the choice to the solver, which puts its paper's own.
    """

    sparsity: float
    group: str | int | None = None

    def __str__(self):
        return str(self.sparsity).removesuffix(".0")  # in full: read back, it asks for the same count

    def with_default_group(self, group):
        return self if self.group is not None else replace(self, group=group)

    def check(self, R: int, C: int) -> None:
        """Every shape can have it."""

    def blocks(self, C):
        """Column ranges within which the zeros are counted (one, unless the group is a number of columns)."""
        width = self.group if isinstance(self.group, int) else C
        return [(i, min(i + width, C)) for i in range(0, C, width)]

    def zeros(self, R: int, C: int) -> int:
        if self.group == "row":
            return R * count(self.sparsity, C)
        return sum(count(self.sparsity, R * (j - i)) for i, j in self.blocks(C))

    def bytes(self, R: int, C: int, itemsize: int) -> int:
        """Kept values and a bitmap, one bit a weight; never more than dense."""
        return min(R * C * itemsize, (R * C - self.zeros(R, C)) * itemsize + -(-R * C // 8))

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """Mask (R, C) of the weights that stay: all but the lowest of `score` in each group."""
        if self.group == "row":
            return ~lowest(score, count(self.sparsity, score.shape[1]))
        parts = [score[:, i:j] for i, j in self.blocks(score.shape[1])]
        masks = [~lowest(p.reshape(-1), count(self.sparsity, p.numel())).view(p.shape) for p in parts]
        return masks[0] if len(masks) == 1 else torch.cat(masks, dim=1)

    def holds(self, W: torch.Tensor) -> bool:
        """Whether W (R, C) has at least the zeros asked for, in every group."""
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

    def __str__(self):
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self):
        return 1 - self.n / self.m

    @property
    def group(self):
        return None

    def with_default_group(self, group):
        return self

    def check(self, R: int, C: int) -> None:
        if C % self.m:
            raise ValueError(f"pattern {self} needs a width divisible by {self.m}, this one is {C}")

    def zeros(self, R: int, C: int) -> int:
        return R * C // self.m * (self.m - self.n)

    def bytes(self, R: int, C: int, itemsize: int) -> int:
        """Kept values and, row by row, a number for each group that says which places they have.

        2:4 as `oneshot_kernels` stores it, four bits a group: 0.5625 of the dense bytes at 16 bits a weight. Never more
        than dense.
        """
        bits = 4 if (self.n, self.m) == (2, 4) else (math.comb(self.m, self.n) - 1).bit_length()
        return min(R * C * itemsize, (R * C - self.zeros(R, C)) * itemsize + R * math.ceil(C // self.m * bits / 8))

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        """Mask (R, C): the n highest of each m stay; among equals the lower index goes first."""
        self.check(*score.shape)
        columns = score.reshape(-1, self.m).T
        keep = torch.empty(columns.shape[1], self.m, dtype=torch.bool, device=score.device)
        return keep.copy_(self.keep_of(columns.contiguous()).T).view(score.shape)

    def keep_of(self, s: torch.Tensor) -> torch.Tensor:
        """Mask (m, groups) for scores s (m, groups), one group a column: its n highest stay, as `keep` says."""
        if self.n in (0, self.m):
            return torch.full_like(s, self.n > 0, dtype=torch.bool)
        keep = s >= nth_of_two(*halves(s.unbind(0), self.n), self.n)
        if int(keep.count_nonzero()) > self.n * s.shape[1]:  # equal scores where the line is drawn
            tied = keep.sum(0) > self.n
            first = s[:, tied].argsort(dim=0, stable=True)[: self.m - self.n]
            keep[:, tied] = torch.ones_like(keep[:, tied]).scatter_(0, first, False)
        return keep

    def holds(self, W: torch.Tensor) -> bool:
        if W.shape[1] % self.m:
            return False
        columns = (W != 0).reshape(-1, self.m).unbind(1)
        return bool((sum(c.to(torch.int16) for c in columns) <= self.n).all())


@dataclass(frozen=True)
class Dense:
    """Nothing is removed."""

    sparsity = 0.0
    group = None

    def __str__(self):
        return "dense"

    def with_default_group(self, group):
        return self

    def check(self, R: int, C: int) -> None:
        pass

    def zeros(self, R: int, C: int) -> int:
        return 0

    def bytes(self, R: int, C: int, itemsize: int) -> int:
        return R * C * itemsize

    def keep(self, score: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(score, dtype=torch.bool)

    def holds(self, W: torch.Tensor) -> bool:
        return True


Pattern = Unstructured | NM | Dense


def parse(text: str, group: str | int | None = None) -> Pattern:
    """The pattern that `text` names.

    Raises ValueError, naming `--pattern` or `--group`, when there is none.
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
    """None, "matrix", "row" or a positive number of columns."""
    if group in (None, "matrix", "row"):
        return group
    if str(group).isdecimal() and int(group) > 0:
        return int(group)
    raise ValueError(f"--group {group}: give matrix, row, or a number of columns such as 128")
