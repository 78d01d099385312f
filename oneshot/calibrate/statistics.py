"""Calibration statistics: what pruning needs to know about the inputs of one linear.

    x       the linear's input for one token, (C,)
    n       number of tokens seen
    outer   sum of x xᵀ, (C, C); G = outer / n is the Gram matrix (the papers' Hessian H = 2 X Xᵀ, up to a factor)
    sum_sq  sum of x², (C,)
    sum     sum of x, (C,)
    cross   sum of (x_dense - x) xᵀ, (C, C), where x_dense is the linear's input for the same token in the dense model
    held    sum of x xᵀ over the held-out tokens alone, (C, C), which are part of `outer` too
    sample  some of the x themselves, (at most SAMPLE, C), on which the layer's output error is measured
    gradient  of the loss with respect to ONE linear's weight: not a sum over x, see gradients.py

All others are running SUMS in float32, so the statistics of batches, processes or machines combine by addition.
"""

import copy
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch

from ..runtime import products

SAMPLE = 256  # tokens; measuring a layer's error on them costs 4·R·C·256 operations, 1.5 % of two passes over 16k
NEEDS = frozenset({"sum", "sum_sq", "outer", "sample", "cross", "held", "gradient"})


class Gradient(NamedTuple):
    """Of the loss, over the calibration windows, with respect to one linear's weight; both (R, C).

    mean: of the mean loss. mean_sq: the mean square, over batches, of each batch's.
    """

    mean: torch.Tensor
    mean_sq: torch.Tensor


class Statistics:
    """Running sums of x over tokens.

    C: inputs of the linear. needs: which sums to keep, a subset of NEEDS; the others are None. device, dtype: of the
    sums. Padding must not reach `update`: the caller drops those rows.

    Raises ValueError for unknown `needs`.
    """

    def __init__(self, C: int, needs: Iterable[str], device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        if unknown := frozenset(needs) - NEEDS:
            raise ValueError(f"statistics: {', '.join(sorted(unknown))} unknown; there are {', '.join(sorted(NEEDS))}")
        self.C, self.needs, self.dtype, self.n = C, frozenset(needs), dtype, 0

        def zeros(name: str, *shape: int) -> torch.Tensor | None:
            return torch.zeros(shape, dtype=dtype, device=device) if name in self.needs else None

        self.sum, self.sum_sq = zeros("sum", C), zeros("sum_sq", C)
        self.outer = zeros("outer", C, C)  # the upper triangle of the sum; once `G` was asked for, the whole mean
        self.cross = zeros("cross", C, C)
        self.held, self.n_held = zeros("held", C, C), 0
        self.gradient: Gradient | None = None
        self.sample = zeros("sample", 0, C)
        self._outer_is_mean = False
        self._derived: dict[Hashable, Any] = {}

    def update(self, x: torch.Tensor, x_dense: torch.Tensor | None = None, held: bool = False) -> None:
        """Add the tokens of x (T, C). x_dense (T, C): the same tokens' inputs in the dense model (default: x).

        held: whether they are held out.
        """
        came, x = x.dtype, x.to(self.dtype)
        self._to_sums()
        self.n += x.shape[0]
        if self.sum is not None:
            self.sum += x.sum(0)
        if self.sum_sq is not None:
            for rows in x.split(64):  # the squares of 64 rows stay in the cache: six times as fast as one norm over all
                self.sum_sq.addmv_(rows.square().T, rows.new_ones(len(rows)))
        if self.outer is not None:  # strips of the upper triangle suffice by symmetry: 9/16 of the multiplications
            strip = max(-(-self.C // 8), 64)
            with products.of(came, x.device):
                for i in range(0, self.C, strip):
                    self.outer[i : i + strip, i:].addmm_(x[:, i : i + strip].T, x[:, i:])
        if self.held is not None and held:
            with products.of(came, x.device):
                self.held.addmm_(x.T, x)
            self.n_held += x.shape[0]
        if self.cross is not None and x_dense is not None:
            self.cross.addmm_((x_dense.to(self.dtype) - x).T, x)
        if self.sample is not None and len(x):
            take = min(SAMPLE - len(self.sample), SAMPLE // 4, len(x))
            rows = torch.linspace(0, len(x) - 1, take, device=x.device).long()
            self.sample = torch.cat([self.sample, x[rows]]) if take else self.sample

    @property
    def G(self) -> torch.Tensor:
        """The Gram matrix E[x xᵀ] (C, C). It replaces the sums in place, so that memory holds one such matrix only."""
        if not self._outer_is_mean:
            self.outer.div_(max(self.n, 1))
            strip = 512
            for i in range(0, self.C, strip):  # mirror the upper triangle
                j = min(i + strip, self.C)
                corner = self.outer[i:j, i:j].triu()
                self.outer[i:j, i:j] = corner + corner.triu(1).T
                self.outer[j:, i:j] = self.outer[i:j, j:].T
            self._outer_is_mean = True
        return self.outer

    def _to_sums(self) -> None:
        """Undo `G` and drop everything derived from the sums."""
        self.forget()
        if self._outer_is_mean:
            self.outer.mul_(self.n)
            self._outer_is_mean = False

    @property
    def mean(self) -> torch.Tensor:
        """E[x] (C,)."""
        return self.sum / max(self.n, 1)

    @property
    def mean_sq(self) -> torch.Tensor:
        """E[x_j²] (C,)."""
        return self.sum_sq / max(self.n, 1) if self.sum_sq is not None else self.G.diagonal()

    @property
    def apart(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(G of the tokens that are not held out, G of those that are), both (C, C); None unless there are both."""
        if self.held is None or not 0 < self.n_held < self.n:
            return None
        return (self.G * self.n - self.held) / (self.n - self.n_held), self.held / self.n_held

    def with_gradient(self, gradient: Gradient | None) -> "Statistics":
        """These statistics, everything derived from them included, with one linear's gradient."""
        own = copy.copy(self)
        own.gradient = gradient
        return own

    def in_order(self, order: torch.Tensor) -> "Statistics":
        """The Gram matrix alone, of the inputs in another order: numbers of inputs, int64 (C,)."""
        own = Statistics(self.C, (), dtype=self.dtype)
        own.needs, own.n, own._outer_is_mean = frozenset({"outer"}), self.n, True
        own.outer = self.G[order][:, order]
        return own

    def divided(self, by: torch.Tensor) -> "Statistics":
        """The Gram matrix alone, of the inputs divided by `by` (C,)."""
        own = Statistics(self.C, (), dtype=self.dtype)
        own.needs, own.n, own._outer_is_mean = frozenset({"outer"}), self.n, True
        own.outer = self.G / by.unsqueeze(1) / by
        return own

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, cached under `key` until the next update, so that linears with the same input share the result."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def forget(self) -> None:
        """Drop everything derived from the sums; it is computed again when needed."""
        self._derived.clear()

    def finite(self) -> bool:
        """Whether all sums are finite. (For a Gram matrix the diagonal suffices: |G_ij|² <= G_ii G_jj.)"""
        outer = None if self.outer is None else self.outer.diagonal()
        sums = (self.sum, self.sum_sq, outer, self.cross, self.sample)
        return self.derived("finite", lambda: all(bool(torch.isfinite(t).all()) for t in sums if t is not None))

    def relative_error(self, W: torch.Tensor, W_hat: torch.Tensor) -> float | None:
        """‖(W-Ŵ)x‖² / ‖Wx‖² over the sampled inputs, for W and W_hat (R, C); None without a sample."""
        if self.sample is None or not len(self.sample):
            return None
        sample = self.sample.to(W.dtype)
        error, whole = (torch.linalg.vector_norm(sample @ M.T).item() ** 2 for M in (W - W_hat, W))
        return error / whole if whole else 0.0
