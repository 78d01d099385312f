"""Machine: how fast this machine does each kind of work that a run consists of, measured in a few seconds.

Everything is measured on pieces small enough for any machine, with the run's own solver, threads and folders.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..calibrate.statistics import Statistics
from ..prune import solvers
from ..prune.job import Chain
from ..prune.patterns import Pattern
from ..runtime import products
from .forecast import LOOP

N, LONG = 2048, 0.5  # rows and columns of the trial matrices; seconds of each measurement
BYTES = 2**26  # of what is read, written and hashed


def speeds(device: str, dtype: torch.dtype, chain: Chain, pattern: Pattern | None, reads: Path | None,
           writes: Path) -> dict[str, float]:
    """{kind of work: so much a second}; see forecast.KINDS. dtype: that of computing.

    chain, pattern: what is solved, () and None if nothing is. reads: a file of the model, or None. writes: a folder.
    """
    x, W = (torch.randn(rows, N, device=device).to(dtype) for rows in (512, N))
    half = torch.zeros(BYTES // 2, dtype=torch.bfloat16, device=device)
    data = bytes(BYTES)
    with products.float32():
        product = timed(lambda: x @ W.T, device)
    found = {"product": 2 * x.numel() * len(W) / product,
             "touched": 3 * BYTES / timed(half.float, device),
             "start": 1 / max(time.process_time(), 0.1),  # imports took that, as they will for a run
             "hashed": BYTES / timed(lambda: hashlib.sha256(data).digest(), "cpu", 1),
             "written": BYTES / written(writes, data)}
    found["read"] = read(reads) if reads else found["written"]
    return found | (solving(device, chain, pattern) if chain else {})


def solving(device: str, chain: Chain, pattern: Pattern) -> dict[str, float]:
    """The speed of a chain of solvers, from one linear of N x N."""
    needs = frozenset().union(*(module.needs for module, _ in chain))
    statistics, W = Statistics(N, needs, device), torch.randn(N, N, device=device)
    statistics.update(torch.randn(2 * N, N, device=device))

    def solve() -> None:
        statistics.forget()
        solvers.solve(W, statistics, pattern, chain)
    with products.float32():
        seconds = timed(solve, device)
    return {"solve": (N**3 / 3 + N**2 * (N + LOOP)) / seconds, "choice": N**2 / seconds}


def timed(work: Callable[[], object], device: str, threads: int = 0) -> float:
    """Seconds of one call: the least of as many as take LONG, at least three, after one that does not count.

    On a CPU, processor time divided by the number of threads (0: torch's), so that other processes do not count.
    """
    work()
    on_gpu, threads = torch.device(device).type == "cuda", threads or torch.get_num_threads()
    clock, times = time.perf_counter if on_gpu else lambda: time.process_time() / threads, []
    while len(times) < 3 or sum(times) < LONG:
        began = clock()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(max(clock() - began, 1e-6))
    return min(times)


def read(file: Path) -> float:
    """Bytes a second of reading a file that is not in memory, as far as the system lets go of it."""
    with open(file, "rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, size = time.perf_counter(), 0
        while size < 4 * BYTES and (piece := opened.read(2**22)):
            size += len(piece)
    return max(size, 1) / max(time.perf_counter() - began, 1e-6)


def written(folder: Path, data: bytes) -> float:
    """Seconds of writing `data` into a file in the folder, until it is on the disk: the least of three."""
    times = []
    for _ in range(3):
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return max(min(times), 1e-6)


def resident() -> int:
    """Bytes of this process that are in memory, mapped files counted; 500 MB where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 500_000_000
