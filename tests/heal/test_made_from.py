"""`oneshot heal FOLDER`: pattern, comparison group and dense model are those that FOLDER's manifest names."""

import os

import pytest
import tiny
from tiny import place, plain_pages  # noqa: F401

from oneshot import checkpoint
from oneshot.pipeline import heal_command

pytestmark = pytest.mark.usefixtures("plain_pages")
SHORT = ["--tokens", "64", "--batch", "32", "--heal-seqlen", "16", "--no-dense", "--evaluate", "none", "--no-progress",
         "--device", "cpu"]


def healed(pruned, text, out, *more):
    """The record of `oneshot heal`."""
    words = [pruned, "--data", text, "--save", out, "--results", out.with_name("runs"), *more, *SHORT]
    assert heal_command.main([str(word) for word in words]) == 0
    return checkpoint.read_manifest(out)["record"]


@pytest.fixture(scope="module")
def unstructured(place):  # noqa: F811
    """A folder for each method and share of zeros, counted in each row, or in 16 columns at a time."""
    given = {"method": "wanda,sparsegpt", "pattern": "0.6,0.7", "sparsegpt.block_size": 16, "evaluate": "none"}
    with tiny.no_pictures():
        assert tiny.main(*tiny.flags(place, "--no-dense", save=place / "un", **given)) == 0
    return place / "un"


@pytest.mark.parametrize("pattern", ["0.6", "0.7"])
@pytest.mark.parametrize("method, group", [("wanda", "row"), ("sparsegpt", 16)])
def test_zeros_are_counted_in_the_groups_they_were_chosen_in(place, unstructured, method, group, pattern,  # noqa: F811
                                                             tmp_path):
    record = healed(unstructured / f"{method}-{pattern}", place / "calibration.txt", tmp_path / "out")
    assert {(row["pattern"], row["group"]) for row in record["layers"]} == {(pattern, group)}
    before, after = tiny.weights(unstructured / f"{method}-{pattern}"), tiny.weights(tmp_path / "out")
    assert not any(after[name][before[name] == 0].any() for name in before if before[name].ndim == 2)


def test_a_pattern_of_another_group_is_refused_with_both_flags_named(place, unstructured, tmp_path, capfd):  # noqa: F811
    assert tiny.main(*tiny.flags(place, model=unstructured / "wanda-0.6", method="keep", pattern="0.6")) == 2
    err = capfd.readouterr().err
    assert "--method keep: " in err and "--group" in err


def test_a_dense_model_named_by_a_relative_path_is_found_from_anywhere(place, tmp_path, monkeypatch):  # noqa: F811
    """Also by what was healed, with a teacher that was named so, and where another folder of that name lies."""
    home, away = tmp_path / "home", tmp_path / "away"
    text = place / "calibration.txt"
    tiny.copy(place / "model", home / "dense")
    tiny.save_model(away / "dense", seed=1)
    monkeypatch.chdir(home)
    assert tiny.main(*tiny.flags(place, "--no-dense", model="dense", save="pruned", evaluate="none")) == 0
    monkeypatch.chdir(away)
    first = healed(home / "pruned", text, tmp_path / "first")
    assert first["settings"]["heal_teacher"] == str(home / "dense")
    assert not [w for w in first["warnings"] if "have changed" in w]
    monkeypatch.chdir(home)
    healed(home / "pruned", text, tmp_path / "second", "--teacher", "dense")
    monkeypatch.chdir(away)
    assert heal_command.made_from(str(tmp_path / "second"))["model"] == str(home / "dense")
    monkeypatch.chdir(home)
    assert heal_command.made_from(os.path.relpath(tmp_path / "second"))["model"] == str(home / "dense")
