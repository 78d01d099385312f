"""Ragged: what no ordinary config says of a smaller model, layer by layer; models/uneven.py stores it.

An attention that is gone keeps no keys and values. The cache's length and the masks are taken from the first layer of
each type, so that one must keep its attention.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from .. import calibrate, models
from ..models import groups, uneven
from .cut import Cut, key_of
from .depth import through


def differences(model: nn.Module, made: nn.Module, cut: Cut, keep: Sequence[int], units: Mapping[str, torch.Tensor],
                block_state: Callable) -> tuple[dict[str, list[int]], dict[str, str]]:
    """({linear of the smaller model: its own shape}, {part that is gone: what it was}), see `uneven.reshape`.

    made: the smaller model by its config alone. block_state: (block, units) -> its state dict without what goes.

    Raises ValueError naming what cannot differ from layer to layer.
    """
    path, _ = models.blocks(model)
    wanted, shapes, gone = made.state_dict(), {}, {}
    for block in models.walk(model):
        if block.number not in keep:
            continue
        new = f"{path}.{list(keep).index(block.number)}"
        for width in groups.widths(block.module):
            if len(units.get(key_of(block, width), [0])) == 0:
                gone |= part_gone(model, made, block, width, new)
            elif width.kind == groups.EXPERTS and f"{block.name}.{width.consumer}" in dict(cut.own):
                raise ValueError(f"--uneven: the experts of {block.name} are one parameter, so their widths cannot "
                                 "differ")
        for name, t in block_state(block, units).items():
            full = f"{new}.{name}"
            if name.endswith(".weight") and t.ndim == 2 and wanted[full].shape != t.shape and \
                    not any(full.startswith(f"{part}.") for part in gone):
                shapes[full.removesuffix(".weight")] = list(t.shape)
    return shapes, gone


def part_gone(model: nn.Module, made: nn.Module, block: models.Block, width: groups.Width, new: str) -> dict[str, str]:
    """{name of the attention or MLP in the smaller model: what it was and its consumer}."""
    part, _, consumer = width.consumer.rpartition(".")
    said = f"--drop: {block.name}.{width.consumer}"
    if not part or width.kind in (groups.EXPERTS, groups.SHARED):
        raise ValueError(f"{said}: is no part of its own that could go alone")
    if width.kind == groups.HEADS:
        types = getattr(models.config_of(made), "layer_types", None) or []
        place = int(new.rpartition(".")[2])
        own = types[place] if place < len(types) else None
        if own not in types[:place] if types else place == 0:
            raise ValueError(f"{said}: is the first attention{f' of type {own}' if own else ''}, from which the cache "
                             "takes its length; drop another")
    return {f"{new}.{part}": f"{uneven.ATTENTION if width.kind == groups.HEADS else uneven.MLP}:{consumer}"}


@torch.no_grad()
def check(model: nn.Module, made: nn.Module, cut: Cut) -> None:
    """Raise ValueError unless the smaller model computes what the larger one does without the dropped blocks.

    A family's code may take widths from the config instead of from its linears, or let an MLP add the residual. Both
    compute in float32 for it: in 16 bits the same sums in another order differ by more than a small fault would.
    """
    ids = (torch.arange(16).view(2, 8) * 7919) % models.embedded(model)
    said = f"--uneven: layers of a {model.config.model_type} model cannot differ in this way"
    with models.own_code(said, ()), models.experts_one_by_one(model), models.computing(False, model, made):
        wanted, found = (logits(m, ids, without) for m, without in ((model, cut.dropped), (made, ())))
    if not torch.allclose(wanted, found, rtol=1e-2, atol=1e-2 * float(wanted.std())):
        raise ValueError(f"{said}: its own code would compute something else")


def logits(model: nn.Module, ids: torch.Tensor, without: Sequence[int]) -> torch.Tensor:
    """Logits (2, T, V), float32, of a model without some of its blocks."""
    activations = through(model, calibrate.capture(model, ids, batch_size=2), 0, without)
    with models.resident(model, "cpu", models.rest_of(model, models.blocks(model)[1])):
        return torch.cat([part.float() for _, part in calibrate.logits(model, activations, 0)], dim=1)
