"""Health: effective dimensions, the collapse of a block by name, the alarm that may stop a run."""

import families
import pytest
import tiny
import torch
from jobs import prune
from tiny import plain_pages  # noqa: F401

from oneshot.calibrate import health
from oneshot.prune.patterns import NM


def test_equal_outputs_are_sound():
    Y = torch.randn(2, 40, 16)
    values = health.compare(Y, Y)
    assert values["relative_error"] == 0 and values["norm_ratio"] == values["dimensions_ratio"] == 1
    assert not health.collapses(values)


def test_dimensions_count_directions():
    gen = torch.Generator().manual_seed(0)
    for d in (1, 3, 8):
        Q, _ = torch.linalg.qr(torch.randn(32, d, generator=gen))
        Y = torch.randn(4000, d, generator=gen) @ Q.T + 5  # a common offset is no dimension
        assert health.dimensions(Y) == pytest.approx(d, rel=0.1)
    assert health.dimensions(torch.ones(9, 4)) == 0


@pytest.mark.parametrize("broken, word", [
    (lambda Y: 0.1 * Y, "norm"), (lambda Y: Y.mean(-1, keepdim=True).expand_as(Y), "dimensions"),
    (lambda Y: Y.flip(0), "relative error"), (lambda Y: Y * float("nan"), "norm")])
def test_a_collapse_is_named(broken, word):
    Y = torch.randn(4, 30, 12, generator=torch.Generator().manual_seed(1))
    assert any(found.startswith(word) for found in health.collapses(health.compare(Y, broken(Y))))


def test_padding_is_not_looked_at():
    Y, rows = torch.randn(2, 6, 8), torch.ones(12, dtype=torch.bool)
    rows[[3, 4, 5]] = False
    broken = Y.clone()
    broken[0, 3:] = float("nan")
    assert not health.collapses(health.compare(Y, broken, rows))


@pytest.mark.usefixtures("plain_pages")
def test_the_alarm_is_a_warning_and_may_stop_the_run(tmp_path, capsys):
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", method="magnitude", pattern="0.95")
    assert tiny.main(*argv) == 0
    [record] = tiny.records(place / "runs").values()
    assert any("collapsed" in w for w in record["warnings"])
    assert tiny.main(*argv, "--stop-on-collapse", "--save", str(place / "out")) == 2
    assert "--stop-on-collapse: model.layers." in capsys.readouterr().err
    assert not (place / "out" / "oneshot.json").exists()


def test_a_sound_run_has_no_alarm():
    result = prune(families.tiny("llama"), pattern=str(NM(3, 4)))
    assert not [w for w in result.warnings if "collapsed" in w]
    assert all("dimensions" in b for b in result.blocks)


def test_a_token_of_enormous_size_hides_nothing():
    """As in SmolLM2, whose first token is 180 times as large as the others: those collapse, it stays."""
    Y = torch.randn(4, 30, 12, generator=torch.Generator().manual_seed(2))
    Y[:, 0] *= 1000
    broken = 0.1 * Y
    broken[:, 0] = Y[:, 0]
    assert any(found.startswith("norm ratio") for found in health.collapses(health.compare(Y, broken)))
    assert not health.collapses(health.compare(Y, Y + 0.1 * Y.roll(1, -1)))
