"""Every flag reaches what it is for: its effect is seen at the far end of the wire, not only in the settings.

A new flag fails here until a check in tests/wires says how it is seen. A check runs `oneshot prune` with the flag and
without, and compares weights, record or files; or it spies on what is called with the flag's value.
"""

import json

import pytest
import tiny
from tiny import plain_pages  # noqa: F401
from wires import Bench, checks

from oneshot.settings.known import known


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tiny.make(tmp_path_factory.mktemp("wires"))
    lines = (place / "calibration.txt").read_text()
    (place / "lines.txt").write_text("\n".join(lines[i : i + 40] for i in range(0, 1200, 40)))
    (place / "rows.jsonl").write_text("".join(json.dumps({"a": lines[i : i + 12], "b": lines[i + 700 : i + 712]}) + "\n"
                                              for i in range(0, 600, 12)))
    return place


@pytest.mark.usefixtures("plain_pages")
@pytest.mark.parametrize("name", known())
def test_flag(name, place, tmp_path, monkeypatch, capfd):
    assert name in checks(), f"{known()[name].option} has no check yet: say in tests/wires how it is seen"
    checks()[name](Bench(place, tmp_path, monkeypatch, capfd))


def test_no_check_is_left_over():
    assert set(checks()) == set(known())
