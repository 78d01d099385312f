"""Worker processes of a sweep: each imports the program once and makes run after run.

A worker that dies, say of the system's out-of-memory killer, fails its run and is replaced. Workers die with the
process that started them.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection

import torch

from oneshot import models
from oneshot.pipeline.attempt import attempt, failed
from oneshot.settings import RunConfig

START = "spawn"  # CUDA cannot be forked


def attempts(configs: Sequence[RunConfig], workers: int) -> Iterator[tuple[RunConfig, dict]]:
    """Yields (configuration, record) as runs end. workers: how many processes; 0: in this one, for a debugger."""
    if not workers:
        models.quiet()
        yield from ((cfg, attempt(cfg)) for cfg in configs)
        return
    n = min(workers, len(configs))
    waiting, places, idle, busy = collections.deque(configs), list(range(n)), [], {}
    try:
        while waiting or busy:
            while waiting and (idle or places):
                worker = idle.pop() if idle else Worker(places.pop(), n)
                busy[worker.pipe] = worker
                worker.start(waiting.popleft())
            for pipe in connection.wait(list(busy)):
                worker = busy.pop(pipe)
                record = worker.result()
                idle, places = (idle, [*places, worker.place]) if worker.dead else ([*idle, worker], places)
                yield worker.cfg, record
    finally:
        for worker in busy.values():
            worker.process.kill()
        for worker in idle:
            worker.send(None)  # it leaves its loop
        for worker in [*busy.values(), *idle]:
            worker.process.join()


class Worker:
    """A process, the `place`-th of `of`, and this end of the pipe to it."""

    def __init__(self, place: int, of: int):
        self.place, self.dead = place, False
        context = multiprocessing.get_context(START)
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, max(1, cores() // of), gpu(place)), daemon=True)
        self.process.start()
        there.close()

    def start(self, cfg: RunConfig) -> None:
        """Give it a run to make."""
        self.cfg, self.began = cfg, time.perf_counter()
        self.send(cfg)

    def send(self, what: RunConfig | None) -> None:
        """Put something into the pipe; None ends the process."""
        with contextlib.suppress(ConnectionError):  # it died while it had nothing to do: `result` will see it
            self.pipe.send(what)

    def result(self) -> dict:
        """The record that the process made, or that of its death."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.dead, code = True, self.process.exitcode
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = "; out of memory? fewer --workers need less" if code == -signal.SIGKILL else ""
            return failed(self.cfg, f"the worker process died ({why}{hint})", time.perf_counter() - self.began)


def serve(pipe: connection.Connection, threads: int, device: str | None) -> None:
    """A worker's life: configurations in, records out, until None comes or its parent is gone."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends this process
    threading.Thread(target=follow, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    models.quiet()
    while (cfg := pipe.recv()) is not None:
        pipe.send(attempt(cfg))


def follow() -> None:
    """End this process when its parent does, however that ended: an orphan would repeat the next sweep's work."""
    multiprocessing.parent_process().join()
    os._exit(1)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpu(place: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker, so that several share the GPUs out and records all say `cuda`; None: leave."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return there[place % len(there)] if len(there) > 1 else None
