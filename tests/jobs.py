"""Pruning jobs on the families' random models: tokens, chains of solvers, plans, runs of the block loop."""

import torch
from families import VOCAB, T
from torch import nn

from oneshot import models
from oneshot.prune import loop, solvers
from oneshot.prune.job import Chain, Job, Result
from oneshot.prune.options import Options
from oneshot.prune.patterns import parse

BYTE = 2**-30  # GiB; a `gram_budget` of it holds one Gram matrix at a time


def tokens(n: int = 12, seed: int = 3) -> torch.Tensor:
    """int64 (n, T), never a special token."""
    return torch.randint(3, VOCAB, (n, T), generator=torch.Generator().manual_seed(seed))


def chain_of(method: str) -> Chain:
    """The chain that `--method` names, with every part's defaults."""
    return [(module, module.Config()) for module in solvers.chain(method)]


def job_of(model: nn.Module, method: str | Chain = "sparsegpt", pattern: str = "2:4", *, healers=(), held_out=(),
           **options) -> Job:
    """The job of pruning a model to one pattern. method: its name, or a chain. options: `Options`."""
    chain = chain_of(method) if isinstance(method, str) else method
    return Job(loop.make_plan(model, parse(pattern), chain), chain,
               Options(**{"batch_size": 4, "progress": False, "device": "cpu"} | options), tuple(healers),
               tuple(held_out))


def prune(model: nn.Module, method: str | Chain = "sparsegpt", pattern: str = "2:4", *, ids=None, mask=None,
          on_block=None, **more) -> Result:
    """Prune the model in place, on `ids` (default: `tokens()`). more: see `job_of`."""
    job = job_of(model, method, pattern, **more)
    return loop.prune_model(model, tokens() if ids is None else ids, mask, job, on_block=on_block)


def weights_in(block: nn.Module) -> list[models.Weight]:
    """The prunable weights of a block, named within it."""
    return models.weights_of(block)[0]


def first_walked(model: nn.Module) -> models.Block:
    """Block 0 as `models.walk` yields it, offloaded."""
    return next(models.walk(model))
