"""Task: what a run does, of its settings, as far as memory and time depend on it (forecast.py)."""

import math

import torch
from torch import nn

from .. import calibrate
from ..data import choose
from ..models import Tokenizer
from ..prune import allocate, solvers
from ..runtime import distributed, environment
from ..settings import RunConfig
from .forecast import Task
from .plan import needs_data, pruning_chain


def task_of(cfg: RunConfig, model: nn.Module, tokenizer: Tokenizer) -> Task:
    """The Task that a run's settings ask for. Evaluation texts are read only to count their windows.

    Raises ValueError naming the flags where there are fewer batches than processes.
    """
    with distributed.joined():
        calibrate.check_parts(cfg.nsamples if needs_data(cfg) else distributed.world(), cfg.batch_size if needs_data(
            cfg) else 1)
    seqlen = choose.window(model, cfg.seqlen, "--seqlen")
    length = choose.window(model, cfg.eval_seqlen, "--eval-seqlen") if cfg.eval_seqlen else seqlen
    texts = 0
    if cfg.evaluations:
        texts = cfg.eval_windows * len(cfg.evaluations) if cfg.eval_windows else sum(
            len(tokens.ids) for tokens in choose.evaluation(cfg, model, tokenizer).values())
    modules = [module for module, _ in pruning_chain(cfg)] if cfg.prunes else []
    needs = frozenset().union(*(module.needs for module in modules)) | (
        {"outer", "cross"} if cfg.prunes and cfg.dense_target else set())
    as_stored = cfg.compute == "stored"
    waiting = cfg.waiting_dtype or (model.dtype if as_stored else torch.float32)
    return Task(tuple(map(solvers.short, modules)), len(needs & {"outer", "cross", "held"}),
                1 + bool(cfg.prunes and cfg.dense_target),
                (share(cfg.nsamples, cfg.batch_size) if needs_data(cfg) else 0, seqlen),
                (share(texts, cfg.eval_batch_size or cfg.batch_size), length), cfg.batch_size,
                cfg.eval_batch_size or cfg.batch_size, cfg.gram_bytes, waiting.itemsize, passes(cfg),
                cfg.offload == "disk", bool(cfg.save), environment.total_memory(cfg.device) is not None,
                cfg.activations == "cpu", distributed.world(), as_stored)


def share(windows: int, batch: int) -> int:
    """How many of the windows the process with most of them has; batches are not divided."""
    return min(windows, math.ceil(math.ceil(windows / batch) / distributed.world()) * batch)


def passes(cfg: RunConfig) -> int:
    """How often the calibration windows pass through the blocks, if the Gram matrices fit their budget."""
    stages = 4 if cfg.true_sequential else 1  # q, k, v; o; gate, up; down
    return 1 + stages * (1 + bool(cfg.dense_target)) + bool(cfg.dense_target) + 2 * bool(
        allocate.module(cfg.allocate).needs)
