"""Mixture: which experts of each layer are left: those that put the most into the hidden state.

    energy of expert e    Σ_t ‖W x_t‖², approximated by n_e Σ_j ‖W_:j‖² E[x_j²]: W its down projection, x_t the inputs
                          of the n_e tokens that reach it (the products of different inputs left out)

They are chosen on the dense model before anything else is cut, the same number in every layer. Only what follows
(refit, fold, healing) makes up for the others.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .. import models
from ..models import groups
from ..prune.options import Options
from ..prune.shared_inputs import dense_pass
from .cut import pool_key


def choose(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: Options,
           count: int) -> dict[str, torch.Tensor]:
    """{`pool_key`: int64 (count,), the experts that are left, in order}.

    Raises ValueError naming `--experts` for a model without experts, or where so many are not there.
    """
    pools = {pool_key(block, pool): (f"{block.name}.{pool.name}.down_proj", pool) for block in models.walk(model)
             for pool in groups.pools(block.module)}
    if not pools:
        raise ValueError(f"--experts {count}: this model has no mixture of experts")
    least = min(pool.count for _, pool in pools.values())
    if count >= least:
        raise ValueError(f"--experts {count}: the layers have {least} experts, so none would go")
    energy: dict[str, float] = {}
    for _, weights, statistics in dense_pass(model, ids, mask, {"sum_sq"}, options):
        for weight in weights:
            if weight.expert is not None and weight.name in statistics:
                columns = weight.get().square().sum(0)
                energy[weight.name] = float((columns * statistics[weight.name].sum_sq).sum())
    groups_of = getattr(models.config_of(model), "n_group", None) or 1
    found = {}
    for key, (name, pool) in pools.items():
        score = torch.tensor([energy.get(f"{name}.{e}", 0.0) for e in range(pool.count)]).view(groups_of, -1)
        best = score.argsort(dim=1, descending=True, stable=True)[:, : count // groups_of]
        best = best + torch.arange(0, pool.count, pool.count // groups_of).unsqueeze(1)
        found[key] = best.flatten().sort().values
    return found


def block_of(key: str) -> int:
    """The number of the block in a `pool_key`: the first number in it."""
    return next(int(part) for part in key.split(".") if part.isdecimal())


def before(units: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The units of a model that first lost experts and then units, with its experts' numbers from before both."""
    ending = f" ({groups.WHOLE})"
    pools = {key.removesuffix(ending): kept for key, kept in units.items() if key.endswith(ending)}
    found = {}
    for key, kept in units.items():
        stem, _, number = key.rpartition(".")
        own = pools.get(stem.rpartition(".")[0]) if number.isdecimal() else None
        found[key if own is None else f"{stem}.{own[int(number)]}"] = kept
    return found


def now(name: str, units: Mapping[str, str], read: Callable[[str], torch.Tensor]) -> str:
    """The name in the smaller model of an expert's consumer in the larger one. units: as a manifest has them."""
    stem, _, number = name.rpartition(".")
    own = units.get(f"{stem.rpartition('.')[0]} ({groups.WHOLE})") if number.isdecimal() else None
    if own is None:
        return name
    kept = read(own).tolist()
    return f"{stem}.{kept.index(int(number))}" if int(number) in kept else name
