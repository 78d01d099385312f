"""Wanda (arXiv 2306.11695): weight magnitude times the norm of its input, compared within each output row.

    S_ij = |W_ij| · sqrt(E[x_j²])      (eq. 1; the paper's ‖X_j‖ up to a common factor)

No weight is updated.
"""

from dataclasses import dataclass

import torch

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from ..linalg import input_weighted
from ..patterns import Pattern, Unstructured
from . import Solution

needs = frozenset({"sum_sq"})
updates = False


@dataclass(frozen=True)
class Config:
    use_variant: bool = flag(False, "let rows differ in sparsity (unstructured): each row loses its lowest scores up "
                                    "to the same share of their sum")

    @property
    def group(self) -> str:
        """The default comparison group."""
        return "matrix" if self.use_variant else "row"


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Keep the highest scores of each row (unstructured) or of each group of m (N:M); kept weights are unchanged.

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


def share_of_row(S: torch.Tensor) -> torch.Tensor:
    """(R, C): for each score in S (R, C), the share of its row's sum that it and all lower scores make up.

    The paper's variant (`use_variant` in its code) removes, in every row, what is below a share α, and finds by
    bisection in [0, 0.8] the α that meets the layer's sparsity to within 0.1 %. Ranking by the share itself is the
    limit of that bisection, with an exact count.
    """
    ordered, order = S.sort(dim=1, stable=True)
    share = ordered.cumsum(1).div_(S.sum(1, keepdim=True).clamp_min_(torch.finfo(S.dtype).tiny))
    return torch.empty_like(S).scatter_(1, order, share)
