"""Health: what a pruned block's output looks like beside the dense block's, and when that is a collapse.

    Y, Y'      output of the dense and of the pruned block on the pruned model's inputs, one batch, (B, T, H)
    dimensions (tr K)² / ‖K‖², K the covariance of the output over tokens: 1 if all tokens lie on a line, at most H

A perplexity at the end says that something broke; this says where, while it happens.
"""

import torch

TOKENS = 512  # the dimensions are counted on so many
BOUNDS = {  # value: (lowest, highest) that is still sound
    "relative_error": (0.0, 1.0), "norm_ratio": (0.5, 2.0), "dimensions_ratio": (0.5, float("inf"))}


def compare(dense: torch.Tensor, pruned: torch.Tensor, real: torch.Tensor | None = None) -> dict[str, float]:
    """Plain values for the record. dense, pruned: (..., B, T, H); real: bool (B·T,), False at padding, or None."""
    dense, pruned = (t.float().reshape(-1, *real.shape, t.shape[-1])[:, real] if real is not None else t.float()
                     for t in (dense, pruned))
    change, before, after = (torch.linalg.vector_norm(t).item() for t in (pruned - dense, dense, pruned))
    d, p = dimensions(dense), dimensions(pruned)
    return {"relative_error": (change / before) ** 2 if before else 0.0,
            "norm_ratio": after / before if before else 1.0, "dimensions": p, "dimensions_dense": d,
            "dimensions_ratio": p / d if d else 1.0}


def dimensions(Y: torch.Tensor) -> float:
    """Effective dimensions (participation ratio) of the tokens of Y (..., H); 0 where all are equal."""
    Y = Y.reshape(-1, Y.shape[-1])
    Y = Y[:: max(1, len(Y) // TOKENS)]
    Y = Y - Y.mean(0)
    Y = Y / (Y.abs().max() or 1.0)
    K = Y @ Y.T if len(Y) < Y.shape[1] else Y.T @ Y  # the same eigenvalues but for zeros
    squares = K.square().sum().item()
    return K.trace().item() ** 2 / squares if squares else 0.0


def collapses(values: dict[str, float]) -> list[str]:
    """What is out of bounds, in words; an empty list where the block is sound. A NaN is out of all bounds."""
    return [f"{name.replace('_', ' ')} {values[name]:.3g} (sound: {low:g} to {high:g})"
            for name, (low, high) in BOUNDS.items() if name in values and not low <= values[name] <= high]
