"""A short slice of the soak (tests/soak.py, `make soak`): some of every kind, the same ones each time."""

import os
from pathlib import Path

import processes
import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the soak forks")
def test_a_slice_of_the_soak(tmp_path):
    done = processes.script(Path(processes.__file__).with_name("soak.py"), "--work", tmp_path / "work", "--page",
                            tmp_path / "soak.md", "--seed", 7, "--kills", 4, "--pairs", 2, "--flips", 8,
                            "--mutations", 12, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "soak.md").read_text()
    assert "4 kills, 2 pairs, 8 flips, 12 mutations" in text and "**0 wrong results, 0 tracebacks.**" in text
