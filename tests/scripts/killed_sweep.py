"""Not a test: a sweep that is killed and started again, and a worker that dies. Prints what came of it as JSON.

    python tests/scripts/killed_sweep.py SWEEP.yaml AGAIN.yaml RESULTS

Processes are forked with one thread, so that the program is imported once; only the second sweep's worker is spawned,
as it is in use.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import sweep
import torch
import workers


def begin(file, results):
    """The process id of a sweep with one worker."""
    if not (pid := os.fork()):
        os._exit(sweep.main([file, "--results", str(results)]))
    return pid


def children(pid):
    """Processes that a process has started."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()]


def running(pid):
    """Whether a process is there and not merely unburied: who has adopted an orphan may never ask for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_after(n, file, results):
    """Kill a sweep once it has n records; whether its worker has ended too."""
    pid = begin(file, results)
    while len(list(results.glob("*.json"))) < n:
        time.sleep(0.005)
    orphans = children(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until = time.monotonic() + 20
    while any(map(running, orphans)) and time.monotonic() < until:
        time.sleep(0.01)
    return len(orphans) == 1 and not any(map(running, orphans))


def dying(configs):
    """[(seed, status, error)] of three runs; the second one's worker is killed, as the out-of-memory killer would."""
    def deadly(cfg):
        if cfg.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(cfg)
    real, workers.attempt = workers.attempt, deadly
    ended = [(cfg.seed, record["status"], record.get("error", "")) for cfg, record in workers.attempts(configs, 1)]
    workers.attempt = real
    return ended


def main(file, again, results):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr
    workers.START = "fork"
    configs = sweep.expand(sweep.load(Path(file)), file, results.parent / "dying")
    workers.attempt(configs[0])  # here, so that the children find everything imported
    told = {"ended": kill_after(3, file, results)}
    told["kept"] = {f.name: f.read_text() for f in results.glob("*.json")}
    told["dying"] = dying([c for c in configs if c.method == "wanda"][:3])
    workers.START = "spawn"
    told["code"] = sweep.main([again, "--results", str(results)])
    print(json.dumps(told), file=sys.__stdout__)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
