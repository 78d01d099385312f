"""Wanda (arXiv 2306.11695): weight magnitude times the norm of its input, compared within each output row.

    S_ij = |W_ij| · sqrt(E[x_j²])      (eq. 1; the paper's ‖X_j‖ is this up to one factor for all)

No weight is updated.
"""

from dataclasses import dataclass

import torch

from ...runtime.flag import flag
from ..linalg import input_weighted
from ..patterns import Unstructured
from . import Solution

needs = frozenset({"sum_sq"})
updates = False


@dataclass(frozen=True)
class Config:
    use_variant: bool = flag(False, "rows may differ in sparsity (unstructured): each loses its lowest scores up to "
                                    "one share of the sum")

    @property
    def group(self):
        return "matrix" if self.use_variant else "row"


def prune(W, statistics, pattern, cfg):
    """Keep the highest scores of each row (unstructured) or of each group (N:M).

    Raises NumericalError when the inputs are not finite.
    """
    S = input_weighted(W, statistics)
    pattern = pattern.with_default_group(cfg.group)
    info = {}
    if cfg.use_variant and isinstance(pattern, Unstructured):
        S = share_of_row(S)
    mask = pattern.keep(S)
    if cfg.use_variant and isinstance(pattern, Unstructured):
        info["alpha"] = S[~mask].max().item() if not mask.all() else 0.0
    return Solution(W * mask, mask, info)


def share_of_row(S):
    """The share of its row's sum that a score and all lower ones make up, (R, C).

    The paper's variant (`use_variant` in its code) removes what lies below one share α for all rows, and finds by
    bisection in [0, 0.8] the α that meets the layer's sparsity within 0.1 %. Ranking by the share itself is that
    bisection's limit, with the exact count.
    """
    ordered, order = S.sort(dim=1, stable=True)
    share = ordered.cumsum(1).div_(S.sum(1, keepdim=True).clamp_min_(torch.finfo(S.dtype).tiny))
    return torch.empty_like(S).scatter_(1, order, share)
