"""Round to nearest (RTN): what the same bytes would buy without pruning.

A pruned model's honest rival is not the dense one but a quantised one of equal size. No data, no search: each row is
cut into groups of 128 inputs (the last may be narrower), and a group shares one float16 scale (grids.py).

    s     a group's scale, max|w| / ((2^b - 1) / 2), rounded to float16
    code  round(w / s), at least -2^(b-1), at most 2^(b-1) - 1

Simulated: s·code is written back, rounded to the stored dtype, as kernels that compute in that dtype see it.
"""

import torch
from torch import nn

from .. import models
from .grids import Integers


def round_to_nearest(W: torch.Tensor, grid: Integers) -> tuple[torch.Tensor, int]:
    """(Ŵ, groups whose scale vanished in float16 so that they became zero) for W (R, C), float32 or float64."""
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
    """Round every prunable linear of an offloaded model, in place; warnings.

    Raises ValueError naming the linear that does not fit float16 scales.
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
