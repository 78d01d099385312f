"""`oneshot fit`: when a floor holds, and when plain rounding is the better answer."""

import math
from types import SimpleNamespace

import pytest

from oneshot.pipeline.fit import ending, targets
from oneshot.pipeline.fit.ledger import Round

DENSE = {"metrics": {"task/acc": 0.5, "text/ppl": 20.0}, "metric_info": {}}


@pytest.mark.parametrize("text, holds", [
    ("task/acc>=-0.1", True), ("task/acc>=-0.01", False), ("task/acc>=-10%", True), ("task/acc>=-1%", False),
    ("task/acc>=0.95x", False), ("text/ppl<=25", True), ("text/ppl<=1.2x", False), ("text/ppl<=+4.6", True)])
def test_floors_without_a_standard_error(text, holds):
    own = targets.floor(text)
    found = own.judge({"metrics": {"task/acc": 0.45, "text/ppl": 24.5}}, DENSE)
    assert found.holds is holds and found.worst is None


def texts(*nats):
    """The record of a text with these mean losses of its windows."""
    return {"metrics": {"text/ppl": math.exp(sum(nats) / len(nats))}, "metric_info": {"text/ppl": {"by_window": nats}}}


def test_a_text_is_compared_in_pairs_of_windows():
    """All windows lose 0.1 nats: no doubt about it, though windows differ. Where they lose differently, there is."""
    dense = texts(2.0, 3.0, 4.0)
    same = targets.floor("text/ppl<=1.11x").judge(texts(2.1, 3.1, 4.1), dense)
    assert same.holds and same.worst == pytest.approx(same.value) == pytest.approx(math.exp(3.1))
    unsure = targets.floor("text/ppl<=1.11x").judge(texts(2.0, 3.1, 4.2), dense)
    spread = 0.1 / math.sqrt(3)  # the standard error of a mean of 0, 0.1, 0.2
    assert not unsure.holds and unsure.worst == pytest.approx(math.exp(3.1 + targets.SURE * spread))
    assert unsure.value <= unsure.bound < unsure.worst and "with its error" in str(unsure)
    alone = targets.floor("text/ppl<=23").judge(texts(2.1, 3.1, 4.1), dense)  # against a number: its own error
    assert alone.worst == pytest.approx(math.exp(3.1 + targets.SURE / math.sqrt(3))) and not alone.holds
    added = targets.floor("text/ppl<=+4").judge(texts(2.1, 3.1, 4.1), dense)
    assert added.bound == pytest.approx(math.exp(3) + 4) and added.worst > added.value


def test_a_window_that_is_no_number_keeps_no_floor():
    """In a record it is null."""
    own, dense = texts(2.1, 3.1, 4.1), texts(2.0, 3.0, 4.0)
    own["metric_info"]["text/ppl"]["by_window"] = [2.1, None, 4.1]
    for text in ("text/ppl<=9x", "text/ppl<=900", "text/ppl<=+90"):
        assert not targets.floor(text).judge(own, dense).holds


def test_plain_rounding_wins_by_all_metrics_or_not_at_all(monkeypatch):
    def fit(**metrics):
        monkeypatch.setattr(ending, "record_of", lambda state: {"metrics": metrics})
        return SimpleNamespace(shares={"bytes": 0.5}, asked=SimpleNamespace(targets={"bytes": 0.5}, floors=[]),
                               state=SimpleNamespace(result="round"), steps=SimpleNamespace(model="dense"))

    def plain(**metrics):
        return Round("int8", {}, 1.0, metrics=metrics, shares={"bytes": 0.4}, kept=True)
    assert ending.wins(fit(ppl=10.0, acc=0.5), plain(ppl=10.0, acc=0.6))
    assert not ending.wins(fit(ppl=10.0, acc=0.6), plain(ppl=9.0, acc=0.25))
    assert not ending.wins(fit(acc=0.6), plain(acc=0.25)) and not ending.wins(fit(acc=0.6), plain(ppl=1.0))


def test_the_dense_model_keeps_a_floor_of_its_own_value():
    dense = texts(2.0, 3.0, 4.0)
    assert targets.floor("text/ppl<=1x").judge(dense, dense).holds


def test_a_task_is_compared_in_pairs_of_documents():
    def task(bits):
        return {"metrics": {"t/acc": bits.count("1") / len(bits)}, "metric_info": {"t/acc": {
            "samples": len(bits), "correct": hex(int(bits, 2)), "documents": "x", "stderr": 0.1}}}
    dense = task("1111111100")
    one = targets.floor("t/acc>=-10%").judge(task("1111111000"), dense)  # the bound itself, and nothing to spare
    assert not one.holds and one.value == pytest.approx(one.bound) and one.worst < one.bound
    assert targets.floor("t/acc>=-30%").judge(task("1111111000"), dense).holds
    own = targets.floor("t/acc>=0.6").judge(task("1111111000"), dense)
    assert own.worst == pytest.approx(0.7 - targets.SURE * 0.1)
