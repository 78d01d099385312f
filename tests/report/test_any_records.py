"""`oneshot compare` on any of the repository's own records: a table and a page with pictures."""

import random
from pathlib import Path

import pytest

from oneshot.report import compare

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
def test_a_random_few(seed, tmp_path, capsys):
    if len(RECORDS) < 2:
        pytest.skip("this checkout has no records")
    files = [*map(str, chosen(seed))]
    page = tmp_path / "page.html"
    code = compare.main([*files, "--page", str(page), "--format", ("terminal", "markdown", "csv")[seed % 3]])
    out, err = capsys.readouterr()
    assert code == 0, (files, err)
    assert err == f"report: {page}\n" and len(out.splitlines()) > 1
    text = page.read_text(encoding="utf-8")
    assert text.endswith("</html>\n") and "Traceback" not in text


def test_records_with_and_without_damage(tmp_path, capsys):
    """The pair that ended in KeyError: 'sparsegpt'."""
    pair = [ROOT / "results" / folder / name for folder, name in (
        ("quality", "demo-sparsegpt-2of4-28058a8e.json"), ("runs", "demo-sparsegpt-2of4-da03b9ee.json"))]
    if not all(file.is_file() for file in pair):
        pytest.skip("this checkout has no such records")
    assert compare.main([*map(str, pair), "--page", str(tmp_path / "page.html")]) == 0
    assert "sparsegpt" in capsys.readouterr().out
