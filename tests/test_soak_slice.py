"""A short slice of the soak (tests/soak.py, `make soak`): some of every kind, the same ones each time."""

from pathlib import Path

import pytest
import soak
import tiny


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="the soak forks")
def test_a_slice_of_the_soak(tmp_path):
    done = tiny.python(Path(soak.__file__), "--work", tmp_path, "--page", tmp_path / "soak.md", "--seed", 7,
                       "--kills", 10, "--pairs", 4, "--flips", 20, "--mutations", 30)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "soak.md").read_text()
    assert "10 kills, 4 pairs, 20 flips, 30 mutations" in text and "**0 wrong results, 0 tracebacks.**" in text
