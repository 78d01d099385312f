"""Blocks: a tensor as the bytes of a GGUF type, and back.

    f32, f16, bf16   as they are
    q8_0             for each 32 weights of a row the float16 scale d and 32 int8 codes: 34 bytes
    q4_0             d and 16 bytes; byte j holds the codes j (low half) and j + 16 (high half), each plus 8: 18 bytes

A weight is d · code, with the codes and scales of quantise/grids.py as they are: nothing is rounded here.
"""

import numpy as np
import torch

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ROUNDED = ("q8_0", "q4_0")
WIDTH, BYTES = 32, {"q8_0": 34, "q4_0": 18}


def plain(t: torch.Tensor, kind: str) -> np.ndarray:
    """A tensor in the type `kind`; bfloat16 as its bytes (..., 2·C) uint8, as numpy has none."""
    t = t.detach().to(PLAIN[kind]).contiguous()
    return t.view(torch.uint8).numpy() if kind == "bf16" else t.numpy()


def rounded(codes: torch.Tensor, scales: torch.Tensor, kind: str) -> np.ndarray:
    """The rows (R, C/32 · 34 or 18), uint8, of codes (R, C) with scales (R, C/32), float16."""
    R, C = codes.shape
    d = scales.half().contiguous().view(torch.uint8).view(R, C // WIDTH, 2)
    if kind == "q8_0":
        q = codes.to(torch.int8).contiguous().view(torch.uint8).view(R, C // WIDTH, WIDTH)
    else:
        low, high = (codes + 8).to(torch.uint8).view(R, C // WIDTH, 2, WIDTH // 2).unbind(2)
        q = low | (high << 4)
    return torch.cat([d, q], dim=-1).view(R, -1).numpy()


def unrounded(rows: np.ndarray, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (R, C) int16, scales (R, C/32) float16) of such rows."""
    t = torch.from_numpy(np.array(rows)).view(rows.shape[0], -1, BYTES[kind])
    d, q = t[..., :2].contiguous().view(torch.float16).squeeze(-1), t[..., 2:].contiguous()
    if kind == "q8_0":
        return q.view(torch.int8).flatten(1).to(torch.int16), d
    return torch.stack([q & 15, q >> 4], dim=2).flatten(1).to(torch.int16) - 8, d


def unplain(data: np.ndarray, kind: str) -> torch.Tensor:
    """The tensor of what `plain` made."""
    t = torch.from_numpy(np.array(data))
    return t.view(torch.bfloat16) if kind == "bf16" else t
