"""Meaningful GPU times for kernels that take microseconds.

Launching kernels one by one would measure the launches, and repeating one call would measure the L2 cache. So a CUDA
graph is made of calls that each have their own copy of the weights, together at least four times the size of the L2,
and the median time of its replays is taken.
"""

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 20
_MIN_CALLS = 16


def copies_needed(weight_bytes: int, device: torch.device) -> int:
    """The number of copies of a weight that fill four L2 caches, at least 16."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(_MIN_CALLS, -(-4 * l2 // weight_bytes))


def graph_microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """The median time of one call in µs. Every call must be capturable; the first three are run as a warm-up."""
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
