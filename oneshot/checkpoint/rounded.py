"""Rounded weights in a checkpoint: the scales beside it, and the proof that every stored weight lies on its grid.

In a dense checkpoint a rounded weight is stored as what is computed with, scale · code rounded to the stored dtype. The
scales, float16 (R, groups) under the linears' names, lie in a file beside it that transformers does not read; with them
the codes are read back from the stored weights exactly.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..models import Weight
from ..models.intake import ROUNDED
from ..quantise import grids

FILE = ROUNDED


def write(folder: Path, scales: dict[str, torch.Tensor]) -> None:
    """Write {full linear name: scales} into a folder; no file where there are none."""
    if scales:
        save_file({name: s.contiguous() for name, s in scales.items()}, folder / FILE)


def read(folder: Path) -> dict[str, torch.Tensor]:
    """{full linear name: scales} of a folder; {} where the file is missing or damaged, which `verify` finds anyway."""
    try:
        return load_file(folder / FILE) if (folder / FILE).is_file() else {}
    except (SafetensorError, OSError, ValueError):
        return {}


def codes_of(W: torch.Tensor, grid: grids.Grid, scales: torch.Tensor) -> torch.Tensor:
    """The codes (R, C), int16, of a stored weight W (R, C): float32 or float64.

    Raises ValueError, saying how many weights are not scale · code in W's stored precision, `W` being given as stored.
    """
    wide = W.float() if W.dtype != torch.float64 else W
    if tuple(scales.shape) != (W.shape[0], -(-W.shape[1] // grid.width(W.shape[1]))) or not scales.isfinite().all():
        raise ValueError(f"its scales {tuple(scales.shape)} do not fit {grid}")
    s = scales.to(wide)
    codes = grid.round(wide, s)
    wrong = int((grid.value(codes, s).to(W.dtype) != W).sum())
    if wrong:
        raise ValueError(f"{wrong} weights are not on the grid {grid}")
    return codes.to(torch.int16)


def fault(weight: Weight, entry: dict, scales: dict[str, torch.Tensor]) -> str | None:
    """Why a linear does not have the grid that its entry in the manifest names, in words; None if it has, or has none.

    scales: of the folder.
    """
    if "grid" not in entry:
        return None
    try:
        grid = grids.parse(entry["grid"])
        if weight.name not in scales:
            return f"its scales are missing in {FILE}"
        codes_of(weight.get().to(weight.stored), grid, scales[weight.name])
    except ValueError as error:
        return str(error)
    return None
