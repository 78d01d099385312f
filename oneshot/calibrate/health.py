"""Health: compare a pruned block's output with the dense block's, and decide whether it has collapsed.

    Y, Y'       output of the dense and of the pruned block on the pruned model's inputs, one batch, (B, T, H), each
                token divided by the norm of its dense output: in some models (SmolLM2) the first token's is 180 times
                the others', which would leave it alone to decide
    dimensions  (tr K)² / ‖K‖², K the covariance of the output over tokens: 1 if all tokens lie on a line, at most H

A perplexity at the end shows that something broke; this shows where, and while it happens.
"""

import torch

TOKENS = 512  # number of tokens from which the dimensions are computed
BOUNDS = {  # {value: (lowest, highest) that counts as sound}
    "relative_error": (0.0, 1.0), "norm_ratio": (0.5, 2.0), "dimensions_ratio": (0.5, float("inf"))}


def compare(dense: torch.Tensor, pruned: torch.Tensor, real: torch.Tensor | None = None) -> dict[str, float]:
    """The block's entry in the record, plain values: relative_error, norm_ratio, dimensions (pruned and dense, ratio).

    dense, pruned: outputs (..., B, T, H). real: bool (B·T,), False at padding, or None.
    """
    dense, pruned = (t.float().reshape(-1, *real.shape, t.shape[-1])[:, real] if real is not None else t.float()
                     for t in (dense, pruned))
    size = torch.linalg.vector_norm(dense, dim=-1, keepdim=True)
    size = size.where(size > 0, 1.0)
    dense, pruned = dense / size, pruned / size
    change, before, after = (torch.linalg.vector_norm(t).item() for t in (pruned - dense, dense, pruned))
    d, p = dimensions(dense), dimensions(pruned)
    return {"relative_error": (change / before) ** 2 if before else 0.0,
            "norm_ratio": after / before if before else 1.0, "dimensions": p, "dimensions_dense": d,
            "dimensions_ratio": p / d if d else 1.0}


def dimensions(Y: torch.Tensor) -> float:
    """Effective dimensions (participation ratio) of the tokens of Y (..., H); 0 if all tokens are equal."""
    Y = Y.reshape(-1, Y.shape[-1])
    Y = Y[:: max(1, len(Y) // TOKENS)]
    Y = Y - Y.mean(0)
    Y = Y / (Y.abs().max() or 1.0)
    K = Y @ Y.T if len(Y) < Y.shape[1] else Y.T @ Y  # both have the same nonzero eigenvalues
    squares = K.square().sum().item()
    return K.trace().item() ** 2 / squares if squares else 0.0


def collapses(values: dict[str, float]) -> list[str]:
    """The values of `compare` that are out of bounds, in words; [] if the block is sound. NaN is out of bounds."""
    return [f"{name.replace('_', ' ')} {values[name]:.3g} (sound: {low:g} to {high:g})"
            for name, (low, high) in BOUNDS.items() if name in values and not low <= values[name] <= high]
