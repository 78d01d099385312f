"""Head: the output head, rounded to nearest where `--quantise` names it in full: `int8:row,lm_head=int8:row`.

Of a small model it is a fifth to a third of the bytes that a token reads. It is rounded before the blocks are: where it
is tied to the embedding, that is rounded with it, and the blocks are rounded for what they will see.
"""

import torch
from torch import nn

from .. import models
from ..prune.linalg import NumericalError
from ..prune.patterns import Dense
from ..prune.solvers import Solution
from . import rtn
from .mixed import Grids


def named(model: nn.Module, grids: Grids) -> dict[str, tuple[int, int]]:
    """{full name: (R, C)} of the output head where an entry names it, else {}."""
    found = models.output_head(model)
    return {found[0]: tuple(found[1].weight.shape)} if found and grids.named(found[0]) else {}


@torch.no_grad()
def round_head(model: nn.Module, grids: Grids) -> tuple[dict, dict[str, torch.Tensor]]:
    """Round the output head in place where an entry names it.

    ({"name", "grid", "tied", "rounded_to_zero", "stored", "dense": bytes}, {name: scales (R, groups)}); empty if none
    does. Raises ValueError naming it where its weights are too large for float16 scales.
    """
    if not named(model, grids):
        return {}, {}
    (name, head), tied = models.output_head(model), model.get_input_embeddings()
    grid, p = grids.named(name), head.weight
    W = p.data if p.dtype == torch.float64 else p.data.float()
    try:
        found = rtn.quantise(W, Solution(W, W != 0), None, grid, rtn.Config())
    except NumericalError as error:
        raise ValueError(f"{name}: {error}") from None
    lost = int(((W != 0) & (found.W_hat == 0)).sum())
    p.data.copy_(found.W_hat)
    return {"name": name, "grid": str(grid), "tied": tied is not None and tied.weight is p, "rounded_to_zero": lost,
            "stored": grid.bytes(*p.shape, Dense()), "dense": Dense().bytes(*p.shape, p.element_size())
            }, {name: found.scales}
