"""The file of a record: what was written is read, nothing else is, old words are today's."""

import io
import json
import math
import os
import re

import pytest
from reporting import of_version_0_1, record

from oneshot import report
from oneshot.report import tables
from oneshot.report.figures.time import seconds
from oneshot.report.page import html


def test_read_gives_what_write_got(tmp_path):
    first = record(warnings=["damping raised"])
    given = json.loads(json.dumps(first))
    returned = report.write(first, tmp_path / "new" / "r.json")
    assert first == given, "write changed its input"
    assert report.read(tmp_path / "new" / "r.json") == first == returned
    before = (tmp_path / "new" / "r.json").read_bytes()
    report.write(report.read(tmp_path / "new" / "r.json"), tmp_path / "new" / "r.json")
    assert (tmp_path / "new" / "r.json").read_bytes() == before
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]


def test_order_of_keys_does_not_depend_on_order_of_filling(tmp_path):
    one = record() | {"extra": 1, "another": 2}
    report.write(one, tmp_path / "a.json")
    report.write(dict(reversed(one.items())), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert list(json.loads((tmp_path / "a.json").read_text()))[:3] == ["schema", "run_id", "status"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "r.json"
    report.write(record(ppl=1.0), path)

    def fail(*_):
        raise KeyboardInterrupt

    if step == "write":
        monkeypatch.setattr("builtins.open", lambda name, *_, **__: FullDisk(name, "w"))
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        report.write(record(ppl=2.0), path)
    monkeypatch.undo()
    assert report.read(path)["metrics"]["builtin/ppl"] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


class FullDisk(io.FileIO):
    def write(self, _):
        raise OSError(28, "No space left on device")


def test_unwritable_record_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        report.write(record() | {"extra": object()}, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_metrics_stay_valid_json_and_come_back(tmp_path, bad):
    one = record(ppl=bad)
    one["layers"][1]["relative_error"] = one["layers"][2]["relative_error"] = bad
    returned = report.write(one, tmp_path / "r.json")

    def refuse(constant):
        raise AssertionError(constant)

    stored = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert stored["metrics"]["builtin/ppl"] is None and stored["layers"][1]["relative_error"] is None
    assert len(stored["warnings"]) == 2 and "builtin/ppl not finite" in stored["warnings"][0]
    again = report.read(tmp_path / "r.json")
    assert str(again["metrics"]["builtin/ppl"]) == str(returned["metrics"]["builtin/ppl"]) == str(bad)
    assert report.storable(again)["warnings"] == stored["warnings"], "the warning is not repeated"
    for text in (tables.table([one]), tables.table([again])):
        assert re.search(rf"(?<!\S){bad}\b", text)
    assert re.search(r"\bnan\b", tables.table([stored]))


@pytest.mark.parametrize("content, says", [
    ("", "not JSON"), ("{", "not JSON"), ("[1]", "not a run"), ('{"a": 1}', "not a run record"),
    ('{"schema": 7, "run_id": "x", "environment": {"oneshot": "9.1"}}', "schema 7 .by oneshot 9.1.")])
def test_what_is_no_record_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        report.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        report.read(path)
    with pytest.raises(ValueError, match="is a folder"):
        report.read(tmp_path)


def test_old_words_are_read_as_todays_and_the_file_stays(tmp_path):
    path, old = tmp_path / "r.json", of_version_0_1()
    report.write(old, path)
    before = path.read_bytes()
    new = report.read(path)
    assert path.read_bytes() == before and old == of_version_0_1(), "neither the file nor the input changed"
    assert not re.search("recover|repair", json.dumps(new))
    assert new["settings"]["heal"] == "block,distil" and new["settings"]["healing"]["distil"] == {"steps": 7}
    assert new["heal"] == old["recovery"] and new["blocks"][0]["heal"] == {"block": {"steps": 6}}
    assert new["blocks"][0]["seconds"] == {"collect": 1.0, "heal": 2.0} and new["blocks"][1] == old["blocks"][1]
    assert list(new["settings"]) == [{"recover": "heal", "recovery": "healing"}.get(k, k) for k in old["settings"]]
    assert report.method_of(new) == "alps, owl, block, distil" and seconds(new)["heal"] >= 2
    assert dict(report.flat_settings(new["settings"]))["distil.steps"] == 7, "the name of its flag"
    assert "distil.steps" in html([new])


def test_todays_words_stay_as_they_are(tmp_path):
    new = report.in_todays_words(of_version_0_1())
    assert report.in_todays_words(new) == new == report.write(new, tmp_path / "new.json")
    order = [*json.loads((tmp_path / "new.json").read_text())]
    assert order.index("warnings") < order.index("heal") < order.index("layers"), "short entries first"
    for odd in ({"schema": 1}, {"settings": None, "blocks": None}, {"blocks": [3, {"seconds": 4}]}):
        assert report.in_todays_words(odd) == odd
