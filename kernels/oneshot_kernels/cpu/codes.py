"""Codes and scales of integer weights and inputs: rounding to them, and the reference in float64.

    N, K   outputs, inputs      weight   scale · code; symmetric, so zero stays zero

int8: a scale for each row, float32 (N,). int4: one for each row and 64 columns, an fp16 number, (N, ceil(K / 64)).
"""

import torch
import torch.nn.functional as F

BLOCK = 64


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale): int8 (N, K) and float32 (N,), the row's largest |w| / 127; the nearest codes, ties to even.

    Raises ValueError for a weight that is not finite.
    """
    weight = _finite(weight)
    scale = weight.abs().amax(1) / 127
    scale[scale == 0] = 1
    return (weight / scale[:, None]).round().to(torch.int8), scale


def round_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) for int4: int8 (N, K) with |code| <= 7 and float32 (N, ceil(K / 64)), max |w| / 7 as fp16.

    Raises ValueError for a weight that is not finite, or too large for an fp16 scale.
    """
    groups = F.pad(_finite(weight), (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = (groups.abs().amax(-1) / 7).half().float()
    scale[scale == 0] = 1
    if not torch.isfinite(scale).all():
        raise ValueError("a weight above 458000 has no fp16 scale; round it to int8")
    codes = (groups / scale[..., None]).round().clamp_(-7, 7).to(torch.int8)
    return codes.flatten(1)[:, : weight.shape[1]], scale


def _finite(weight: torch.Tensor) -> torch.Tensor:
    """The weight in float32. Raises ValueError for NaN and infinity."""
    if not torch.isfinite(weight).all():
        raise ValueError("a weight with NaN or infinity cannot be rounded to integers")
    return weight.float()


def round_input(x: torch.Tensor) -> torch.Tensor:
    """x (M, K) as the kernel sees it, rounded to codes with a scale for each token and 64 columns; float64."""
    parts = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    most = parts.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # `127 / most` would be 127 times a rounded reciprocal
    rounded = (parts * torch.where(most > 0, inverse, 0)).round().double() * (most / 127).double()
    return rounded.flatten(1)[:, : x.shape[1]]


def emulate(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None,
            plain: bool = False) -> torch.Tensor:
    """The reference, in float64: x (M, K), rounded as the kernel rounds it, times scale · codes (N, K) -> (M, N)."""
    seen = x.double() if plain else round_input(x)
    return F.linear(seen, value(codes, scale), None if bias is None else bias.double())


def value(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale · codes (N, K) in float64, for the scales of `round_rows` or `round_groups`."""
    if scale.ndim == 1:
        return codes.double() * scale.double()[:, None]
    return codes.double() * scale.double().repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
