"""Worker processes of a sweep: each imports the program once and makes run after run.

A run that fails is a record too (status "failed", its error in one line). A worker that dies, say of the system's
out-of-memory killer, fails its run and is replaced. Workers die with the process that started them.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection
from pathlib import Path

import torch
from _sweep_index import stored

from oneshot import models, report
from oneshot.pipeline import checks, run
from oneshot.runtime import environment


def attempt(cfg):
    """The record of one configuration: the stored one, a new one, or that of its failure."""
    began = time.perf_counter()
    try:
        checks.check([cfg])
        record = run.run(cfg, reuse=stored)
    except Exception as error:  # what the user can mend and what is a bug of ours alike: the other runs go on
        return fail(cfg, f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{run.one_line(error)}",
                    time.perf_counter() - began)
    failure_file(cfg).unlink(missing_ok=True)
    return record


def fail(cfg, why, seconds):
    """Write and return the record of a run that failed."""
    record = {"schema": report.SCHEMA, "run_id": failure_file(cfg).stem, "status": "failed", "error": report.clean(why),
              "settings": cfg.settings(), "model": {"name": Path(cfg.model.rstrip("/")).name},
              "environment": environment.environment("cpu") | {"device": cfg.device}, "metrics": {},
              "warnings": [f"failed: {report.clean(why)}"], "seconds": {"total": seconds}}
    return report.write(record, failure_file(cfg))


def failure_file(cfg):
    """Where a failure of this configuration is kept: gone when a later attempt succeeds."""
    return Path(cfg.results) / f"{cfg.run_id('failed')}-failed.json"


def attempts(configs, workers):
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


START = "spawn"  # CUDA cannot be forked


class Worker:
    """A process, the `place`-th of `of`, and this end of the pipe to it."""

    def __init__(self, place, of):
        self.place, self.dead = place, False
        context = multiprocessing.get_context(START)
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, max(1, cores() // of), gpu(place)), daemon=True)
        self.process.start()
        there.close()

    def start(self, cfg):
        self.cfg, self.began = cfg, time.perf_counter()
        self.send(cfg)

    def send(self, what):
        with contextlib.suppress(ConnectionError):  # it died while it had nothing to do: `result` will see it
            self.pipe.send(what)

    def result(self):
        """The record that the process made, or that of its death."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            self.dead, code = True, self.process.exitcode
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = "; out of memory? fewer --workers need less" if code == -signal.SIGKILL else ""
            return fail(self.cfg, f"the worker process died ({why}{hint})", time.perf_counter() - self.began)


def serve(pipe, threads, device):
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


def follow():
    """End this process when its parent does, however that ended: an orphan would repeat the next sweep's work."""
    multiprocessing.parent_process().join()
    os._exit(1)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpu(place):
    """CUDA_VISIBLE_DEVICES of a worker, so that several share the GPUs out and records all say `cuda`; None: leave."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return there[place % len(there)] if len(there) > 1 else None
