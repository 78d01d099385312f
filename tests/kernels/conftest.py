"""Where the package is, and which tests need which Triton mode."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

# Triton fixes interpreted or compiled when a kernel is defined, so the two kinds of test cannot share a
# process. test_sparse24_interpreter.py runs the folder in one of its own, with TRITON_INTERPRET=1.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["interpreted"]
if INTERPRETED:
    sys.path.insert(0, str(Path(__file__).parent / "interpreted"))  # for its helpers, under any import mode


@pytest.fixture
def steps(monkeypatch):
    """How many tokens were computed by one compiled call (oneshot_kernels.fast_decode)."""
    from oneshot_kernels.cpu.decode import Decoder

    made, real = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: (made.append(1), real(self, *args))[1])
    return made


@pytest.fixture
def untuned(tmp_path, monkeypatch):
    """No table of measurements."""
    from oneshot_kernels import dispatch

    monkeypatch.setenv("ONESHOT_KERNELS_CACHE", str(tmp_path))
    dispatch._table_name.cache_clear()
    dispatch.forget()
    yield
    dispatch._table_name.cache_clear()
    dispatch.forget()
