"""Shared inputs: solve many jobs from one pass over the DENSE model's inputs; and that dense calibration pass itself.

This is cheaper than a pass per job, and a fair comparison of methods in that all see the same inputs. But no job sees
how its pruned blocks change the inputs of later blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Limits, Statistics
from ..models import Block, Weight
from ..runtime import distributed, products, together
from . import linear
from .job import Job, Result, skipped_rows
from .loop import start
from .options import Options


@torch.no_grad()
def dense_pass(model: nn.Module, ids: torch.Tensor | None, mask: torch.Tensor | None, needs: Iterable[str],
               options: Options) -> Iterator[tuple[Block, list[Weight], dict[str, Statistics]]]:
    """The dense calibration pass: yields (block, weights, {weight's name: Statistics}), with the block resident.

    ids: int64 (n, T), mask: bool (n, T) or None. needs: which statistics to collect; if empty, nothing is run and the
    statistics are empty. If the Gram matrices exceed `gram_budget`, a block is yielded several times, each time with
    other weights. Where other processes hold the model as well, all run their share of the windows, and what is yielded
    is rank 0's.
    """
    with together.joint(take_part, model, ids, mask, needs, options):
        yield from blocks_of(model, ids, mask, needs, options)


def take_part(*args: Any) -> None:
    """What the other processes do of a `dense_pass`."""
    for _ in blocks_of(*args):
        pass


@torch.no_grad()
def blocks_of(model: nn.Module, ids: torch.Tensor | None, mask: torch.Tensor | None, needs: Iterable[str],
              options: Options) -> Iterator[tuple[Block, list[Weight], dict[str, Statistics]]]:
    """`dense_pass` in this process, on its share of the windows."""
    options = options.here if distributed.ranks() > 1 else options
    bar = tqdm(total=len(models.blocks(model)[1]), desc="calibrate (dense)", unit="block",
               disable=not options.progress, leave=False)
    with models.experts_one_by_one(model), products.float32(options.tf32), bar:
        activations = start(model, ids, mask, options) if needs else None
        for block in models.walk(model, options.device, bar=bar):
            remaining = block.weights
            if not activations:  # the solver needs no data
                yield block, remaining, {}
                continue
            while remaining:
                statistics, deferred, _ = calibrate.collect(block.module, activations, block.number, remaining, needs,
                                                            limits=Limits(options.gram_bytes))
                statistics, deferred, _ = calibrate.reduce(statistics, deferred, remaining, options.device,
                                                           only_first=True)
                waiting = {w.name for w in deferred}
                yield block, [w for w in remaining if w.name not in waiting], statistics
                remaining = deferred
            calibrate.replay(block.module, activations, block.number)


@torch.no_grad()
def prune_shared(model: nn.Module, ids: torch.Tensor | None, mask: torch.Tensor | None,
                 jobs: Sequence[Job]) -> list[tuple[Result, dict[str, torch.Tensor]]]:
    """Solve many jobs on the DENSE model's inputs: one (Result, {full linear name: new weight (R, C)}) per job.

    The model is unchanged at the end. All jobs share one pass over the data, and what solvers derive from a Gram matrix
    (SparseGPT: one factorisation; ALPS: one per penalty). The new weights are kept on the CPU in the stored dtype, so
    memory holds one copy of the model's linears per job. The first job's options apply to all.
    """
    options, needs = jobs[0].options, frozenset().union(*(job.needs for job in jobs))
    found = [(Result(skipped=skipped_rows(model)), {}) for _ in jobs]
    for block, weights, statistics in dense_pass(model, ids, mask, needs, options):
        for weight in weights:
            W, own = weight.get().clone(), statistics.pop(weight.name, None)
            for job, (result, new) in zip(jobs, found, strict=True):
                rows = linear.write(linear.solve(job, weight, own), block.number)
                result.layers += rows.layers
                result.warnings += rows.warnings
                new[weight.name] = weight.get().to("cpu", weight.stored, copy=True)
                weight.set(W)
        own = None  # frees the last linear's statistics before the next pass collects more
    return found


def write_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write the new weights {full linear name: (R, C)} of one job of `prune_shared` into the model."""
    for weight in models.all_weights(model):
        weight.set(weights[weight.name])
