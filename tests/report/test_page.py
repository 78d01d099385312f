"""The page: well-formed, whatever a record says; it loads nothing, and says what there is."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reporting import KINDS, damaged, record

from oneshot import report
from oneshot.report import figures
from oneshot.report.figures import drawing
from oneshot.report.page import html, write_html

ROOT = Path(__file__).resolve().parents[2]
EVIL = '<script>alert(1)</script> $x_1$ & "q" \'s\' {{ 3 ** 60 }} {% if %} {# ]]> \x00\x1b'


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def evil_page():
    runs = [record("dense", model=EVIL), record("wanda", model=EVIL, warnings=[EVIL], source=EVIL),
            record(EVIL, "0.5", model=EVIL)]
    runs[1]["skipped"].append({"name": EVIL, "reason": EVIL})
    runs[1]["layers"][0] |= {"name": EVIL, "linear": EVIL, "info": {EVIL: EVIL}, "error_from": EVIL}
    runs[1]["data"]["evaluation"][EVIL] = {"source": "https://example.org/text"}
    runs[1]["metrics"][f"{EVIL}/ppl"] = 4.0
    runs[1]["damage"] = damaged([EVIL], EVIL)
    runs[1]["sensitivity"] = [{"name": EVIL, "block": 0, "linear": EVIL, "loss_increase": 0.1}]
    runs[1] |= {EVIL: EVIL, f"{EVIL} rows": [{EVIL: EVIL}], f"{EVIL} facts": {EVIL: EVIL}}
    runs[2] |= {"status": EVIL, "environment": {EVIL: EVIL, "oneshot": EVIL, "date": EVIL}}
    return html(runs, EVIL)


def test_text_is_escaped(evil_page):
    page = Page(evil_page)
    assert "script" not in page.tags and "&lt;script&gt;" in evil_page
    assert "&amp;lt;" not in evil_page, "escaped once"
    assert "{{ 3 ** 60 }} {% if %} {#" in evil_page and str(3 ** 60) not in evil_page, "names are no templates"
    assert not set("\x00\x1b") & set(evil_page)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_page_is_well_formed_and_ids_are_unique(evil_page):
    root = ET.fromstring(evil_page.removeprefix("<!DOCTYPE html>\n"))
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids)) and len(root.findall(".//svg")) >= 3
    used = re.findall(r'(?:href="|url\()#([^")]+)', evil_page)
    assert used and set(used) <= set(ids)


def test_page_loads_nothing(evil_page):
    page = Page(evil_page)
    assert not {"link", "iframe", "img", "object", "embed", "base", "video"} & set(page.tags)
    for name, content in page.attributes:
        if name in ("href", "src", "srcset", "xlink:href", "data", "action"):
            assert content.startswith(("#", "data:image/png;base64,")), (name, content)  # data: a heat map's pixels
        assert "http" not in (content or ""), (name, content)
    assert not re.search(r"@import|url\((?!#)", evil_page)


def test_page_says_what_there_is():
    page = html([record(warnings=["damping raised to 0.1"])])
    order = ("damping raised to 0.1", "builtin ppl @256", "Error by depth", "Zeros by depth", "Where the")
    place = [page.index(text) for text in order]
    assert place == sorted(place), "warnings first, then results"
    details = ("abc1234", "9f9f", "lm_head.weight", "Surplus zeros")
    assert all(page.index(text) > place[-1] for text in details)
    assert page.count("model.layers.1.mlp.down_proj") == 1, "each layer once, surplus only where there is any"
    assert "Error by depth" not in html([record("dense")])
    with pytest.raises(ValueError, match="no run records"):
        html([])


def test_one_warning_of_many_runs_is_said_once_with_the_runs():
    page = html([record(m, warnings=["same thing"]) for m in ("wanda", "magnitude")])
    assert page.count("same thing") == 1 and "wanda 2:4, magnitude 2:4" in page


def test_the_page_shows_where_the_loss_increase_sits():
    page = html([record() | {"damage": damaged(["numbers", "names"])}, record("wanda")])
    parts = ["Where the loss increase sits, 2:4", "No token in: prose (content).", "<li>numbers lost 0.9 nats</li>",
             "Tokens hurt most", "␣numbers\\n", "12\u2009345", "Passages hurt most",
             "prose, window 2, from token 5: 1.25 nats a token"]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert "Where the loss increase sits" not in html([record()])
    (ax,) = figures.fig_damage([record() | {"damage": damaged(["numbers", "names"])}]).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["numbers", "names"]
    assert not figures.fig_damage([record() | {"damage": {"overall": {}, "slices": []}}]).axes


def test_parts_of_a_record_that_nobody_knows_are_shown():
    """A new measurement needs no change of the page."""
    page = html([record() | {"speed": [{"batch": 1, "tokens": 12345, "how": "eager"}, {"batch": 8, "p99": 0.123456}],
                             "memory": {"peak": 20000, "parts": {"weights": 0.5}, "rows": [{"at": "load"}]},
                             "verdict": "fine", "nothing": [], "empty": {}, "absent": None}])
    heads = '<th class="n">batch</th><th class="n">tokens</th><th>how</th><th class="n">p99</th>'
    assert re.search(rf'<h3>speed</h3>\s*<div class="tall"><div class="scroll"><table><thead><tr>{heads}', page)
    assert '<td class="n">12\u2009345</td><td>eager</td><td class="n">-</td>' in page
    assert '<td class="n">0.1235</td>' in page and "<h3>memory rows</h3>" in page and "<td>load</td>" in page
    for name, fact in (("peak", "20\u2009000"), ("parts.weights", "0.5000"), ("verdict", "fine")):
        assert f"<dt>{name}</dt><dd>{fact}</dd>" in page
    assert not re.search("<h3>(nothing|empty|absent)</h3>", page)


def test_a_part_of_the_runs_is_named_and_coloured_as_all_of_them():
    """wanda's runs differ in batch_size across patterns, not within one: a picture of one pattern says so as well."""
    runs = [record("wanda", "0.5", batch_size=16), record("wanda", batch_size=8) | {"damage": damaged(["numbers"])}]
    assert report.series(runs[1:]) == ["wanda"]
    assert report.series(runs[1:], among=runs) == ["wanda (batch_size 8)"]
    page = html(runs)
    assert page.count("wanda (batch_size 8)</text>") == 3, "in the legends of sparsity, depth and damage"
    colours = {drawing.series_styles(runs)["wanda (batch_size 8)"][0]}
    (ax,) = figures.fig_damage(runs[1:], runs).axes
    assert {line.get_color() for line in ax.lines} == colours


def test_page_is_deterministic(tmp_path):
    runs = [record(kinds=KINDS[:1]), record("dense")]
    assert html(runs) == html(runs)
    write_html(runs[:1], tmp_path / "a" / "report.html", title="A title")
    assert "<h1>A title</h1>" in (tmp_path / "a" / "report.html").read_text()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["report.html"]


def test_without_matplotlib_the_page_says_so_and_a_figure_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        figures.fig_time([record()])
    page = html([record()])
    assert "Pictures left out" in page and "pip install matplotlib" in page and "<svg" not in page


def test_matplotlib_is_imported_only_to_draw():
    code = ("import gc, sys; gc.disable()\n"
            "import oneshot.report.page, oneshot.report.figures; print('matplotlib' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
