"""Head: the output head, rounded to nearest where `--quantise` names it in full: `int8:row,lm_head=int8:row`.

Of a small model it is a fifth to a third of the bytes that a token reads. It is rounded before the blocks are: where it
is tied to the embedding, that is rounded with it, and the blocks are rounded for what they will see. (`--quantiser
joint` rounds blocks while it prunes them, and the head after that.)
"""

import torch
from torch import nn

from .. import models
from ..prune.patterns import Dense
from . import rtn
from .grids import Grid
from .mixed import Grids

ROWS = 4096  # of the head at a time: its float32 copies would be larger than the model's largest matrix


def named(model: nn.Module, grids: Grids) -> dict[str, tuple[int, int]]:
    """{full name: (R, C)} of the output head where an entry names it, else {}."""
    found = models.output_head(model)
    return {found[0]: tuple(found[1].weight.shape)} if found and found[0] in dict(grids.others) else {}


def check(model: nn.Module, grids: Grids) -> None:
    """Raise ValueError, which goes behind the flag's name, where the output head's weights fit no float16 scales."""
    for name in named(model, grids):
        W = models.output_head(model)[1].weight.data
        if (grid := grids.named(name)) and not W.is_meta:
            row = torch.maximum(W.amax(1), -W.amin(1)).argmax()  # a NaN is the largest
            if not torch.isfinite(grid.scales(wide(W[row:row + 1]))).all():
                raise ValueError(f"{name}={grid}: its weights are too large for float16 scales")


def wide(W: torch.Tensor) -> torch.Tensor:
    """Rows of a weight in the precision they are rounded in."""
    return W if W.dtype == torch.float64 else W.float()


@torch.no_grad()
def round_head(model: nn.Module, grids: Grids) -> tuple[dict, dict[str, torch.Tensor], list[str]]:
    """Round the output head in place where an entry names it.

    (`said` and "rounded_to_zero": how many weights became zero; {name: scales (R, groups)}; warnings), empty if none
    does. Raises ValueError naming it where its weights are too large for float16 scales.
    """
    name, head = models.output_head(model) or ("", None)
    if not name or not (grid := grids.named(name)):
        return {}, {}, []
    scales, lost, vanished = [], 0, 0
    for part in head.weight.data.split(ROWS):  # each row has scales of its own
        W = wide(part)
        s = grid.scales(W)
        if not torch.isfinite(s).all():
            raise ValueError(f"{name}: its weights are too large for the float16 scales of {grid}")
        W_hat = grid.value(grid.round(W, s), s)
        lost, vanished = lost + int(((W != 0) & (W_hat == 0)).sum()), vanished + rtn.vanished(W, s, grid)
        part.copy_(W_hat)
        scales.append(s)
    return said(model, grid) | {"rounded_to_zero": lost}, {name: torch.cat(scales)}, [
        f"{name}: {vanished} groups became zero, their float16 scale vanished"] * bool(vanished)


def said(model: nn.Module, grid: Grid) -> dict:
    """What a record says of an output head on a grid: {"name", "grid", "tied", "stored", "dense": bytes}."""
    (name, head), embedding = models.output_head(model), model.get_input_embeddings()
    p = head.weight
    return {"name": name, "grid": str(grid), "tied": embedding is not None and embedding.weight is p,
            "stored": grid.bytes(*p.shape, Dense()), "dense": Dense().bytes(*p.shape, p.element_size())}
