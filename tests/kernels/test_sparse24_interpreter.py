"""Runs the tests in `interpreted/` in a process where Triton interprets its kernels on CPU.

To run them by hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_kernels_under_the_interpreter():
    pytest.importorskip("triton", reason="the kernels need Triton (pip install triton)")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / "interpreted")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
