"""Perturbed text: a tenth changes, always the same, in the way that was asked for."""

import random
import re

import pytest
import tiny
from tiny import plain_pages  # noqa: F401

from oneshot.data.perturb import KINDS, SHARE, perturbed

TEXT = " ".join(random.Random(0).choices(["The", "great", "river", "of", "Paris", "1940", "ran", "deep"], k=4000))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_always_the_same(kind):
    again = perturbed(TEXT, kind)
    assert again == perturbed(TEXT, kind) != TEXT
    if kind != "whitespace":
        before, after = TEXT.split(" "), again.split(" ")
        changed = sum(a != b for a, b in zip(before, after, strict=True))
        could = sum(bool(re.fullmatch(KINDS[kind][0], w)) for w in before)
        assert changed / could == pytest.approx(SHARE, abs=0.02)
    assert perturbed("", kind) == "" and perturbed("12 .", kind) in ("12 .", "12  .", "12\n.", "12\t.", "12.")


def test_each_changes_only_what_it_says():
    assert re.sub(r"\s", "", perturbed(TEXT, "whitespace")) == TEXT.replace(" ", "")
    assert perturbed(TEXT, "casing").lower() == TEXT.lower()
    for before, after in zip(TEXT.split(" "), perturbed(TEXT, "typos").split(" "), strict=True):
        assert (after[0] == before[0] and set(after) == set(before)) or len(after) == len(before) - 1
        assert abs(len(after) - len(before)) <= 1 and (len(before) > 3 or after == before)


@pytest.mark.usefixtures("plain_pages")
def test_a_run_measures_dense_and_pruned_on_the_same(tmp_path):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--robustness", "--divergence", eval_windows=60)) == 0
    found = tiny.records(place / "runs")
    pruned, dense = found["wanda", "2:4"], found["dense", "dense"]
    names = {"evaluation", *(f"evaluation+{kind}" for kind in KINDS)}
    assert {m.removesuffix("/ppl") for m in dense["metrics"]} == names
    assert {m.removesuffix("/ppl") for m in pruned["metrics"] if m.endswith("/ppl")} == names
    digests = {name: text["sha256"] for name, text in dense["data"]["evaluation"].items()}
    assert digests == {name: text["sha256"] for name, text in pruned["data"]["evaluation"].items()}
    assert len(set(digests.values())) == 4
    assert "with typos in a tenth" in dense["data"]["evaluation"]["evaluation+typos"]["source"]
    assert not [m for m in pruned["metrics"] if "+" in m and not m.endswith("/ppl")], "compared on the plain text only"
