"""RIA, "Relative Importance and Activations" (Zhang et al., ICLR 2024): a weight's share of its row and of its column.

    S_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · sqrt(E[x_j²])^a

Σ_i is over a column (one input), Σ_j over a row (one output), so that no input or output loses all its weights. No
weight is updated. The comparison group is the whole matrix, as in the authors' code unless `--per_outneuron` is given
(github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning). Their channel permutation for N:M is not
implemented: it reorders the inputs of a linear, which a solver for a single linear cannot do.
"""

from dataclasses import dataclass

import torch

from ...calibrate.statistics import Statistics
from ...runtime.flag import flag
from ..linalg import require_finite
from ..patterns import Pattern
from . import Solution

needs = frozenset({"sum_sq"})
updates = False


@dataclass(frozen=True)
class Config:
    a: float = flag(0.5, "exponent of the inputs' norm; 0 ignores the data")
    group = "matrix"

    def __post_init__(self) -> None:
        if not self.a >= 0:
            raise ValueError(f"--ria.a {self.a}: must not be negative")


def prune(W: torch.Tensor, statistics: Statistics, pattern: Pattern, cfg: Config) -> Solution:
    """Keep the highest scores; kept weights are unchanged.

    Raises NumericalError when the inputs are not finite.
    """
    require_finite(statistics.mean_sq)
    size, tiny = W.abs(), torch.finfo(W.dtype).tiny  # for a row of zeros the share is 0 / tiny
    share = size / size.sum(0).clamp_min_(tiny) + size / size.sum(1, keepdim=True).clamp_min_(tiny)
    mask = pattern.with_default_group(cfg.group).keep(share * statistics.mean_sq.sqrt().pow(cfg.a).to(W))
    return Solution(W * mask, mask)
