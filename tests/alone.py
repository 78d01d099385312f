"""Python with transformers and without oneshot, as anyone has it who is given a checkpoint."""

import subprocess
import sys

UNCOLLECTED = "import gc; gc.disable()\n"  # which would go over all of torch again and again: a third of a start


def alone(code, *argv, cwd=None):
    """The finished process of `python -c CODE ARGV`, with one thread, offline, that finds installed packages only."""
    return subprocess.run([sys.executable, "-c", UNCOLLECTED + code, *map(str, argv)], capture_output=True, text=True,
                          timeout=300, cwd=cwd, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""})
