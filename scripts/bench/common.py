"""What the benchmarks of pruning share: how fast this machine multiplies, how the published code is called, what a
model is measured on, and the line that says where rows came about."""

import os
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import nn

from oneshot import calibrate, measure
from oneshot.calibrate import Activations
from oneshot.prune import patterns


def matmul_rate(n: int) -> float:
    """Floating-point operations a second of the best of five large float32 products: the ceiling of everything here."""
    a, b = torch.randn(4 * n, n), torch.randn(n, n)
    a @ b
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 8 * n**3 / min(times)


def others() -> float:
    """Cores that other processes take: the load average of a minute less this program's threads, at least 0."""
    return max(0.0, os.getloadavg()[0] - torch.get_num_threads())


def removed(pattern: patterns.Pattern) -> tuple[float, int, int]:
    """A pattern as published.py takes it: (share removed, n of each m REMOVED, m); n is 0 where it is unstructured."""
    return (pattern.sparsity, *((pattern.m - pattern.n, pattern.m) if isinstance(pattern, patterns.NM) else (0, 0)))


def caller(activations: Activations, b: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """The published loop's call(block, x) for block b: activations of one window a batch, which pass in their order,
    as often as they like."""
    order = cycle(range(len(activations)))

    def call(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        i = next(order)
        activations.hidden[i] = x
        return calibrate.forward(block, activations, b, i)
    return call


def quality(subject: measure.Subject) -> dict:
    """Perplexity on the one text that a model is measured on, and what was asked of tasks beside it."""
    found = measure.measure(subject)
    (metric, ppl), *others = found.metrics.items()
    info = found.info[metric]
    tasks = {name: {"value": value, **{key: found.info[name][key] for key in ("stderr", "samples", "chance")}}
             for name, value in others if name.endswith("/acc")}
    return {"metric": metric, "window": info["window"], "ppl": ppl, "tokens": info["tokens"]} | (
        {"tasks": tasks} if tasks else {})


def written(program: str, environment: dict) -> str:
    """The line of a page that says how and where it came about."""
    e = environment
    return (f"Written by `python scripts/bench/{program}`; commit {e['commit']}{' (dirty)' if e['dirty'] else ''}, "
            f"{e['device']}, {e['threads']} thread{'s' * (e['threads'] > 1)}, torch {e['torch']}, {e['date']}.")
