"""`oneshot compare` on any of the repository's own records: a table and a page with pictures."""

import json
import random
from pathlib import Path

import pytest
import soak_mutations

from oneshot.report import compare, page, read

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted(f for folder in ("runs", "quality") for f in (ROOT / "results" / folder).glob("*.json"))
KINDS = {"damage": '"damage": {', "sensitivity": '"sensitivity": [', "tasks": '"correct"', "dense": '"method": "dense"'}


def chosen(seed):
    """Two or three records, not twice of one kind where that can be."""
    draw = random.Random(seed)
    holding = {name: [f for f in RECORDS if words in f.read_text(encoding="utf-8")] for name, words in KINDS.items()}
    pools = draw.sample([pool for pool in [*holding.values(), RECORDS] if pool], 2)
    return [draw.choice(pool) for pool in (*pools, RECORDS)[:2 + seed % 2]]


@pytest.mark.parametrize("seed", range(8))
def test_a_random_few(seed, tmp_path, monkeypatch, capsys):
    """With every picture made; from the third seed on matplotlib need not draw it too."""
    if len(RECORDS) < 2:
        pytest.skip("this checkout has no records")
    if seed > 1:
        monkeypatch.setattr(page, "svg", lambda figure, prefix: "<svg></svg>")
    files, file = [*map(str, chosen(seed))], tmp_path / "page.html"
    code = compare.main([*files, "--page", str(file), "--format", ("terminal", "markdown", "csv")[seed % 3]])
    out, err = capsys.readouterr()
    assert code == 0, (files, err)
    assert err == f"report: {file}\n" and len(out.splitlines()) > 1
    text = file.read_text(encoding="utf-8")
    assert text.endswith("</html>\n") and "Traceback" not in text


def test_records_with_and_without_damage(tmp_path, capsys):
    """The pair that ended in KeyError: 'sparsegpt'."""
    pair = [ROOT / "results" / folder / name for folder, name in (
        ("quality", "demo-sparsegpt-2of4-28058a8e.json"), ("runs", "demo-sparsegpt-2of4-da03b9ee.json"))]
    if not all(file.is_file() for file in pair):
        pytest.skip("this checkout has no such records")
    assert compare.main([*map(str, pair), "--page", str(tmp_path / "page.html")]) == 0
    assert "sparsegpt" in capsys.readouterr().out


@pytest.mark.parametrize("where, value, words", [
    ("metrics", [1], "`metrics` is"), ("layers", {"a": 1}, "`layers` is an object, not a list"),
    ("layers.0", "abc", "`layers` 0 is text, not an object"), ("layers.0.zeros", "abc", "`layers` 0 `zeros` is text"),
    ("warnings.0", 7, "`warnings` 0 is a number, not text"), ("settings.method", ["wanda"], "`method` is a list"),
    ("environment.torch", {}, "`environment` `torch` is an object"), ("seconds.total", True, "`total` is true or")])
def test_a_part_of_another_kind_is_refused_by_name(tmp_path, where, value, words):
    record = {"schema": 1, "run_id": "a", "settings": {"method": "wanda"}, "model": {}, "metrics": {},
              "environment": {}, "layers": [{"zeros": 1}], "warnings": ["x"], "seconds": {"total": 1.0}}
    (tmp_path / "good.json").write_text(json.dumps(record))
    assert read(tmp_path / "good.json")["run_id"] == "a"
    *path, last = [int(part) if part.isdecimal() else part for part in where.split(".")]
    place = record
    for part in path:
        place = place[part]
    place[last] = value
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"x\.json is not a run record: its ") as error:
        read(tmp_path / "x.json")
    assert words in str(error.value)


@pytest.mark.skipif(not RECORDS, reason="this checkout has no records")
def test_changed_records_are_refused_or_shown(tmp_path, monkeypatch, capsys):
    """Whatever has become of a record: a page, or one line that names the file."""
    monkeypatch.setattr(page, "_pictures", lambda records: [])
    for seed in range(40):
        draw = random.Random(seed)
        data = json.loads(draw.choice(RECORDS).read_text())
        place, key = draw.choice(soak_mutations.places(data)[:400])
        try:
            soak_mutations.JSON[draw.choice(list(soak_mutations.JSON))](draw, place, key)
            (tmp_path / "x.json").write_text(json.dumps(data))
        except (ValueError, TypeError):
            continue
        code = compare.main([str(tmp_path / "x.json"), "--page", str(tmp_path / "p.html")])
        err = capsys.readouterr().err
        assert code == 0 or (code == 2 and len(err.splitlines()) == 1 and "x.json" in err), (seed, err)
