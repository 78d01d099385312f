"""Honest GPU times for kernels of microseconds.

Launching one by one measures the launches; repeating one call measures the L2 cache. So: one CUDA graph over calls that
each have their own copy of the weights, at least four times the L2 in all, and the median of its replays.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 20
_MIN_CALLS = 16


def copies_needed(weight_bytes: int, device: torch.device) -> int:
    """How many distinct copies of a weight make at least four L2 caches, and at least 16 calls a graph."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(_MIN_CALLS, -(-4 * l2 // weight_bytes))


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call in µs. Each call must be capturable; the first ones are run as warm-up."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
