"""RIA, "Relative Importance and Activations" (Zhang et al., ICLR 2024): a weight's share of its row and of its column.

    S_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · sqrt(E[x_j²])^a

Σ_i runs over a column's weights (one input), Σ_j over a row's (one output); no input or output loses all its weights.
No weight is updated. Comparison group: the whole matrix, as in the authors' code unless `--per_outneuron` is given
(github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning). Its channel permutation for N:M is not
here: it reorders the inputs of a linear, which a solver of one linear cannot do.
"""

from dataclasses import dataclass

import torch

from ...runtime.flag import flag
from ..linalg import require_finite
from . import Solution

needs = frozenset({"sum_sq"})
updates = False


@dataclass(frozen=True)
class Config:
    a: float = flag(0.5, "exponent of the inputs' norm; 0 looks at no data")
    group = "matrix"

    def __post_init__(self):
        if not self.a >= 0:
            raise ValueError(f"--ria.a {self.a}: must not be negative")


def prune(W, statistics, pattern, cfg):
    """Keep the highest scores; kept weights stay as they are.

    Raises NumericalError when the inputs are not finite.
    """
    require_finite(statistics.mean_sq)
    size, tiny = W.abs(), torch.finfo(W.dtype).tiny  # a row of zeros: 0 / tiny
    share = size / size.sum(0).clamp_min_(tiny) + size / size.sum(1, keepdim=True).clamp_min_(tiny)
    mask = pattern.with_default_group(cfg.group).keep(share * statistics.mean_sq.sqrt().pow(cfg.a).to(W))
    return Solution(W * mask, mask)
