"""Runs the tests in `interpreted/` in a process where Triton interprets its kernels on CPU.

To run them by hand: TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

HERE = Path(__file__).parent


def _version(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


def test_kernels_under_the_interpreter():
    triton = pytest.importorskip("triton", reason="the kernels need Triton (pip install triton)")
    if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        pytest.skip("Triton before 3.7 cannot interpret loops with run-time bounds under NumPy 2.4: install numpy<2.4")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / "interpreted")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
