"""Shared inputs: solve many jobs from one pass over the DENSE model's inputs; and that pass itself.

Cheaper than a pass for each, and for comparing methods fairer in one way: all see the same inputs. What a pruned block
does to the inputs of later blocks is not seen.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Limits, Statistics
from ..models import Block, Weight
from . import linear
from .job import Job, Result, Rows, skipped_rows
from .loop import float32_products, start
from .options import Options


@torch.no_grad()
def dense_pass(model: nn.Module, ids: torch.Tensor | None, mask: torch.Tensor | None, needs: Iterable[str],
               options: Options) -> Iterator[tuple[Block, list[Weight], dict[str, Statistics]]]:
    """Walk the DENSE model: yields (block, weights, {weight's name: Statistics}), the block resident.

    Gram matrices beyond `gram_budget` come in further portions, so a block may be yielded several times, each time with
    other weights. Without `needs` nothing is run and the statistics are empty.
    """
    bar = tqdm(total=len(models.blocks(model)[1]), desc="calibrate (dense)", unit="block",
               disable=not options.progress, leave=False)
    with models.experts_one_by_one(model), float32_products(options.tf32), bar:
        activations = start(model, ids, mask, options) if needs else None
        for block in models.walk(model, options.device, bar=bar):
            remaining = block.weights
            if not activations:  # the solver looks at no data
                yield block, remaining, {}
                continue
            while remaining:
                statistics, deferred, _ = calibrate.collect(block.module, activations, block.number, remaining, needs,
                                                            limits=Limits(options.gram_bytes))
                waiting = {w.name for w in deferred}
                yield block, [w for w in remaining if w.name not in waiting], statistics
                remaining = deferred
            calibrate.replay(block.module, activations, block.number)


@torch.no_grad()
def prune_shared(model: nn.Module, ids: torch.Tensor | None, mask: torch.Tensor | None,
                 jobs: Sequence[Job]) -> list[tuple[Result, dict[str, torch.Tensor]]]:
    """Solve many jobs from the DENSE model's inputs: [(Result, {full linear name: new weight}), ...], one a job; the
    model is left as it was.

    One pass over the data serves all jobs, and so does what solvers compute of a Gram matrix and keep with its
    Statistics (SparseGPT: one factorisation; ALPS: one for each penalty). The new weights are kept in the stored dtype
    on the CPU: so many copies of the model's linears. Computed by the first job's options.
    """
    options, needs = jobs[0].options, frozenset().union(*(job.needs for job in jobs))
    found = [(Result(skipped=skipped_rows(model)), {}) for _ in jobs]
    for block, weights, statistics in dense_pass(model, ids, mask, needs, options):
        for weight in weights:
            W, own = weight.get().clone(), statistics.pop(weight.name, None)
            for job, (result, new) in zip(jobs, found, strict=True):
                rows = Rows(result.layers, {"block": block.number}, result.warnings)
                linear.write(linear.solve(job, weight, own), rows)
                new[weight.name] = weight.get().to("cpu", weight.stored, copy=True)
                weight.set(W)
        own = None  # the last one does not outlast its portion
    return found


def write_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights of `prune_shared` into the model."""
    for weight in models.all_weights(model):
        weight.set(weights[weight.name])
