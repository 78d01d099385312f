"""`--allocate` by command: the sparsity or the bytes are met, what cannot be is refused before any work."""

import pytest
import tiny
from tiny import plain_pages  # noqa: F401

from oneshot import calibrate
from oneshot.prune.patterns import Unstructured

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.mark.parametrize("allocate", ["owl", "arithmetic", "error"])
def test_allocation_by_command_meets_the_sparsity(tmp_path, allocate):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", pattern="0.6", allocate=allocate)) == 0
    [record] = tiny.records(place / "runs").values()
    rows = record["layers"]
    total, zeros = (sum(f(r) for r in rows) for f in (lambda r: r["shape"][0] * r["shape"][1],
                                                      lambda r: r["target_zeros"]))
    wanted = sum(Unstructured(0.6, "row").zeros(*r["shape"]) for r in rows)
    assert abs(zeros - wanted) <= sum(r["shape"][0] for r in rows) and zeros < total
    assert len({r["pattern"] for r in rows}) > 1 and record["settings"]["allocation"]


def test_mix_by_command_stays_within_its_bytes(tmp_path):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", allocate="mix", **{"mix.budget": 0.75})) == 0
    [record] = tiny.records(place / "runs").values()
    found = {r["pattern"] for r in record["layers"]}
    assert found == {"2:4", "dense"}
    assert 0.6 < record["bytes"]["stored"] / record["bytes"]["dense"] <= 0.75


@pytest.mark.parametrize("dtype, budget", [("float32", 0.54), ("bfloat16", 0.57)])
def test_mix_and_the_record_count_the_same_bytes(tmp_path, dtype, budget):
    """A budget just above 2:4 everywhere: 0.53125 of the dense bytes at 32 bits a weight, 0.5625 at 16."""
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", "--dtype", dtype, allocate="mix")
    assert tiny.main(*argv, "--mix.budget", budget) == 0
    [record] = tiny.records(place / "runs").values()
    assert budget - 0.02 < record["bytes"]["stored"] / record["bytes"]["dense"] <= budget


@pytest.mark.parametrize("more", [[], ["--shared-inputs"], ["--sensitivity", "linear"]])
def test_mix_leaves_dense_what_the_pattern_does_not_fit(tmp_path, more):
    """Hidden 32, MLP 48: 2:32 fits all but down_proj."""
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", *more, pattern="2:32", allocate="mix", **{"mix.budget": 0.7})
    assert tiny.main(*argv) == 0
    [record] = tiny.records(place / "runs").values()
    found = {(r["linear"] == "mlp.down_proj", r["pattern"]) for r in record["layers"]}
    assert {p for down, p in found if down} == {"dense"} and (False, "2:32") in found


def test_mix_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    place = tiny.make(tmp_path)
    monkeypatch.setattr(calibrate, "capture", lambda *args, **more: pytest.fail("calibrated"))
    argv = tiny.flags(place, "--no-dense", pattern="2:32", allocate="mix")
    assert tiny.main(*argv, "--mix.also", "8:32") == 2
    error = capsys.readouterr().err
    assert "--mix.also 8:32: model.layers.0.mlp.down_proj (32x48) can have none" in error and "add dense" in error
    assert tiny.main(*argv, "--mix.budget", "0.1") == 2
    assert "--mix.budget 0.1: the smallest choice of patterns takes" in capsys.readouterr().err


def test_an_allocation_that_does_not_fit_a_pattern_is_refused_before_any_run(tmp_path, capsys):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, pattern="0.5,2:4", allocate="owl")) == 2
    assert "--allocate owl: spreads a sparsity" in capsys.readouterr().err and not (place / "runs").exists()
