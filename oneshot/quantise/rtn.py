"""Round to nearest (RTN): what the same number of bytes achieves without pruning.

A pruned model should be compared not with the dense model but with a quantised model of the same size. No data, no
search: each row is divided into groups of 128 inputs (the last may be smaller), and a group shares one float16 scale.

    s     a group's scale, max|w| / ((2^b - 1) / 2), rounded to float16
    code  round(w / s), at least -2^(b-1), at most 2^(b-1) - 1

Quantisation is simulated: s·code is written back, rounded to the stored dtype, which is what kernels that compute in
that dtype use.
"""

import torch
from torch import nn

from .. import models
from .grids import Integers


def round_to_nearest(W: torch.Tensor, grid: Integers) -> tuple[torch.Tensor, int]:
    """(Ŵ (R, C), number of groups that became zero because their scale underflowed float16) for W (R, C).

    W is float32 or float64; Ŵ has its dtype.
    """
    out, lost, half = torch.zeros_like(W), 0, 2 ** (grid.bits - 1)
    for part, result in zip(W.split(grid.group, dim=1), out.split(grid.group, dim=1), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        s = (largest / ((2**grid.bits - 1) / 2)).half().to(W.dtype)
        code = (part / s).round_().clamp_(-half, half - 1)
        result.copy_((s * code).where(s > 0, 0.0))
        lost += int(((s == 0) & (largest > 0)).sum())
    return out, lost


@torch.no_grad()
def quantise_model(model: nn.Module, grid: Integers) -> list[str]:
    """Round every prunable linear of an offloaded model in place; returns warnings.

    Raises ValueError naming a linear whose weights are too large for float16 scales.
    """
    warnings = []
    for weight in models.all_weights(model):
        W, lost = round_to_nearest(weight.get(), grid)
        if not torch.isfinite(W.sum()):
            raise ValueError(f"{weight.name}: its weights are too large for the float16 scales of {grid}")
        weight.set(W)
        if lost:
            warnings.append(f"{weight.name}: {lost} groups became zero, their float16 scale vanished")
    return warnings
