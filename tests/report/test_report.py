"""Laws of oneshot.report: the file, tables, the page and its pictures, on invented records."""

import csv
import doctest
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from oneshot import report
from oneshot.report import figures, tables
from oneshot.report import table as table_writer
from oneshot.report.columns import is_dense, is_pruned
from oneshot.report.figures import drawing
from oneshot.report.figures.time import PARTS, seconds
from oneshot.report.page import html, write_html
from oneshot.report.table import Bold, render

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def layers(pattern, blocks, kinds=KINDS):
    sparsity = 0.5 if ":" in pattern else float(pattern)
    return [{"name": f"model.layers.{b}.{k}", "block": b, "linear": k, "shape": [64, 32], "pattern": pattern,
             "target_zeros": int(2048 * sparsity), "zeros": int(2048 * sparsity) + (b == 0),
             "surplus": int(b == 0), "relative_error": 0.01 * (b + 1), "error_from": "gram", "seconds": 0.02,
             "info": {"damping": 0.01}}
            for b in range(blocks) for k in kinds]


def record(method="sparsegpt", pattern="2:4", ppl=21.4, *, model="demo", window=256, seed=0, sha="7a" * 32,
           blocks=2, warnings=(), kinds=KINDS, **settings):
    """A record as a run writes it; the dense one if `method` is dense."""
    dense = method == "dense"
    settings = {"model": model, "method": method, "pattern": "dense" if dense else pattern, "seed": seed,
                "solver": {"sparsegpt": {"damping": 0.01, "block_size": 128}}} | settings
    rng = random.Random(f"{settings}{ppl}")
    return {
        "schema": 1, "run_id": f"{model}-{method}-{rng.getrandbits(32):08x}", "status": "finished",
        "settings": settings,
        "model": {"name": model, "family": "llama", "dtype": "bfloat16", "fingerprint": "ab" * 32},
        "data": {"calibration": {"source": "text", "sha256": "9f" * 32, "nsamples": 64, "tokens": 16384},
                 "evaluation": {"builtin": {"source": "text", "sha256": sha, "windows": 60}}},
        "environment": {"oneshot": "0.1.0", "commit": "abc1234", "date": "2026-11-21T03:00:00Z"},
        "layers": [] if dense else layers(pattern, blocks, kinds),
        "blocks": [{"block": b, "seconds": {"collect": 1.0}} for b in range(0 if dense else blocks)],
        "skipped": [{"name": "lm_head.weight", "reason": "never pruned: output head"}],
        "metrics": {"builtin/ppl": ppl},
        "metric_info": {"builtin/ppl": {"window": window, "windows": 60, "tokens": 15300}},
        "sparsity": 0.0 if dense else 0.5 if ":" in pattern else float(pattern), "warnings": list(warnings),
        "peak_memory_bytes": 812_000_000,
        "seconds": {"load": 0.5, "prune": 0 if dense else 10.1, "total": 14.0}}


def sweep():
    """Magnitude, wanda and SparseGPT at three patterns with two seeds each, dense last."""
    runs = [record(m, p, 10 + 10 * i + s / 8, seed=s) for p in ("2:4", "0.5", "0.6")
            for i, m in enumerate(("magnitude", "wanda", "sparsegpt")) for s in (0, 1)]
    return [*runs, record("dense", ppl=9.5)]


# ---------------------------------------------------------------- the file

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


# ---------------------------------------------------------------- old names

def of_version_0_1():
    """A record with the words of version 0.1: recovery, and repair within a block."""
    old = record("alps", recover="block,distil", allocate="owl",
                 recovery={"block": {"steps": 6}, "distil": {"steps": 7}})
    old["blocks"][0] |= {"repair": {"steps": 6}, "seconds": {"collect": 1.0, "repair": 2.0}}
    return old | {"recovery": {"distil": {"steps": 7, "lr": 0.01}}}


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


# ---------------------------------------------------------------- tables

def test_the_example_of_the_table_writer():
    assert doctest.testmod(table_writer) == (0, 2)  # failed, attempted


def test_one_writer_escapes_what_has_a_meaning():
    head, body = ["name", "x"], [["a|b <i> \\ \"q\"", "1"], ["c & d", Bold("2")]]
    assert render(head, body, "markdown", {"name"}).splitlines() == [
        "| name               |     x |", "| ------------------ | ----: |", '| a\\|b &lt;i> \\\\ "q" |     1 |',
        "| c & d              | **2** |"]
    assert render(head, body, "terminal", {"name"}).splitlines()[2:] == ['a|b <i> \\ "q"    1', "c & d            2"]
    page = render(head, body, "html", {"name"})
    assert "<td>a|b &lt;i&gt; \\ &quot;q&quot;</td>" in page and '<td class="n"><b>2</b></td>' in page
    assert list(csv.reader(io.StringIO(render(head, body, "csv")))) == [head, *body]
    with pytest.raises(ValueError, match="terminal, markdown, csv"):
        render(head, body, "latex")


def test_dense_first_then_pattern_then_method_as_given():
    runs = sweep()
    methods = ["magnitude", "wanda", "sparsegpt"]
    expected = [("dense", "dense"), *((p, m) for p in ("0.5", "0.6", "2:4") for m in methods for _ in (0, 1))]
    assert [(r["pattern"], r["method"]) for r in tables.rows(runs)] == expected


def test_models_stay_together_as_given():
    runs = [record("wanda", model="b"), record("wanda", model="a"), record("dense", model="a"),
            record("dense", model="b")]
    assert [(r["model"], r["method"]) for r in tables.rows(runs)] == [
        ("b", "dense"), ("b", "wanda"), ("a", "dense"), ("a", "wanda")]


def test_windows_never_share_a_column():
    runs = [record("dense", ppl=9.0, window=256), record("wanda", ppl=11.0, window=256),
            record("wanda", ppl=7.0, window=2048)]
    first, narrow, wide = tables.rows(runs)
    assert (narrow["builtin ppl @256"], narrow["builtin ppl @2048"]) == (11.0, None)
    assert (wide["builtin ppl @256"], wide["builtin ppl @2048"]) == (None, 7.0)
    assert "builtin ppl @2048 / dense" not in wide, "no dense run at that window"
    assert narrow["builtin ppl @256 / dense"] == pytest.approx(11 / 9)
    assert first["builtin ppl @256 / dense"] == 1
    body = tables.pivot(runs, "builtin/ppl", "csv").splitlines()
    assert [line.split(",")[0] for line in body] == ["metric", "builtin ppl @256", "builtin ppl @2048"]
    assert "7.0" not in body[1] and "11.0" not in body[2]


def test_two_texts_of_one_name_do_not_share_a_column():
    runs = [record("dense", ppl=9.0), record("wanda", ppl=11.0, sha="00" * 32)]
    headers = [c.header for c in report.columns(runs)]
    assert headers == ["builtin ppl @256 (60 windows, 7a7a7a7a)", "builtin ppl @256 (60 windows, 00000000)"]
    assert all(sum(r[h] is not None for r in tables.rows(runs)) == 1 for h in headers)
    other = [record("dense"), record("dense", model="other", sha="00" * 32)]  # another tokenizer
    assert [c.header for c in report.columns(other)] == ["builtin ppl @256"]


def test_same_name_other_weights_is_another_model():
    other = record("dense", ppl=5.0)
    other["model"]["fingerprint"] = "cd" * 32
    found = tables.rows([record("dense", ppl=9.0), record("wanda", ppl=18.0), other])
    assert [r["model"] for r in found] == ["demo #ababab", "demo #ababab", "demo #cdcdcd"]
    assert [r["builtin ppl @256 / dense"] for r in found] == [1, 2, 1]


def test_rates_are_compared_by_difference_and_standard_errors_not_at_all():
    runs = [record("dense"), record("wanda")]
    for one, x in zip(runs, (0.5, 0.42), strict=True):
        one["metrics"] |= {"arc_easy/acc": x, "arc_easy/acc_stderr": 0.01}
    row = tables.rows(runs)[1]
    assert row["arc_easy acc - dense"] == pytest.approx(-0.08)
    assert not any("stderr" in k and "dense" in k for k in row)
    assert "-0.08" in tables.table(runs)


@pytest.mark.parametrize("x, text", [
    (5.4721, "5.472"), (117.44, "117.4"), (7058.3, "7058"), (70583.4, "70583"), (9.99999, "10.00"),
    (0.0312, "0.03120"), (2.5e7, "2.500e+07"), (3e-6, "3.000e-06"), (0.0, "0"), (3, "3"), (None, "-"),
    (math.inf, "inf"), (math.nan, "nan")])
def test_numbers_have_four_digits(x, text):
    assert report.number(x) == text


def test_csv_parses_back_to_the_rows():
    runs = [record("dense", ppl=9.123456789012345), record(model='a,"b"\n|c'), record("wanda", ppl=math.inf)]
    found = list(csv.DictReader(io.StringIO(tables.table(runs, "csv"))))
    for parsed, row in zip(found, tables.rows(runs), strict=True):
        assert list(parsed) == list(row)
        for key, text in parsed.items():
            same = text == "" if row[key] is None else text == str(row[key])
            assert same, (key, text, row[key])


def test_terminal_and_markdown_have_one_line_a_run_and_straight_columns():
    runs = [*sweep(), record(model="evil | name\n\x1b[31m<b>")]
    lines = tables.table(runs).splitlines()
    assert len(lines) == len(runs) + 2 and "\x1b" not in "".join(lines)
    lines = tables.table(runs, "markdown").splitlines()
    assert len(lines) == len(runs) + 2 and len({len(line) for line in lines}) == 1
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<b>" not in "".join(lines)
    with pytest.raises(ValueError, match="terminal, markdown, csv"):
        tables.table(runs, "latex")


def test_runs_that_differ_in_a_setting_say_so():
    runs = [record(nsamples=64), record(nsamples=128), record("wanda")]
    assert [r["variant"] for r in tables.rows(runs)] == ["nsamples 64", "nsamples 128", ""]
    assert "variant" not in tables.table([record(), record("wanda")])
    assert len(set(report.labels([record(ppl=1), record(ppl=2), *sweep()]))) == len(sweep()) + 2


def test_unfinished_run_without_anything_is_a_row():
    failed = {"schema": 1, "run_id": "x", "status": "failed", "settings": {"method": "wanda"}}
    runs = [record("dense"), failed]
    assert "failed" in tables.table(runs) and "status" not in tables.table(runs[:1])
    page = html(runs)
    assert "not finished: status is failed" in page
    assert tables.table([]).startswith("model")


def test_pivot_is_mean_and_deviation_over_seeds_with_the_best_in_bold():
    text = tables.pivot(sweep(), "builtin/ppl", "markdown")
    head, _, *body = [[c.strip() for c in line.strip("| ").split("|")] for line in text.splitlines()]
    assert head == ["builtin ppl @256", "dense", "0.5", "0.6", "2:4"]
    assert [line[0] for line in body] == ["magnitude", "wanda", "sparsegpt"]
    assert body[0][2] == "**10.06 ± 0.09**" and body[1][2] == "20.06 ± 0.09" and body[0][1] == "9.500"
    rows = list(csv.DictReader(io.StringIO(tables.pivot(sweep(), "builtin ppl @256", "csv"))))
    assert float(rows[0]["2:4"]) == 10.0625 and float(rows[0]["2:4 std"]) == pytest.approx(math.sqrt(1 / 128))
    assert rows[0]["2:4 n"] == "2" and rows[0]["dense std"] == ""
    with pytest.raises(ValueError, match="builtin ppl @256"):
        tables.pivot(sweep(), "c4/ppl")


def test_pivot_averages_over_seeds_only():
    runs = [record("wanda", ppl=10.0, nsamples=64), record("wanda", ppl=20.0, nsamples=128)]
    text = tables.pivot(runs, "builtin/ppl")
    assert "±" not in text and "wanda (nsamples 64)" in text and "wanda (nsamples 128)" in text


def test_what_is_not_finite_is_never_the_best_and_more_is_better_for_rates():
    runs = [record("magnitude", ppl=math.nan), record("wanda", ppl=8.0), record("sparsegpt", ppl=7.0)]
    for one, x in zip(runs, (0.1, 0.9, 0.5), strict=True):
        one["metrics"]["arc_easy/acc"] = x
    assert "**7.000**" in tables.pivot(runs, "builtin/ppl", "markdown")
    assert "**0.9000**" in tables.pivot(runs, "arc_easy/acc", "markdown")
    assert "**" not in tables.pivot([record(m, ppl=math.inf) for m in ("wanda", "alps")], "builtin/ppl", "markdown")


# ---------------------------------------------------------------- the page

EVIL = '<script>alert(1)</script> $x_1$ & "q" \'s\' {{ 3 ** 60 }} {% if %} {# ]]> \x00\x1b'


def damaged(names, text="prose"):
    """What --damage records: some slices of the text, the first with more loss than the whole."""
    return {"frequency_from": text, "overall": {"tokens": 90, "windows": 9, "increase": 0.5, "half": 0.1},
            "slices": [{"kind": "content", "name": name, "tokens": 30, "windows": 9, "increase": 0.9 - i / 4,
                        "half": 0.1, "verdict": None if i else "more"} for i, name in enumerate(names)],
            "empty": {"content": [text]}, "found": [f"{names[0]} lost 0.9 nats"],
            "tokens": [{"token": f" {names[0]}\n", "count": 12345, "increase": 0.4, "excess": 0.2}],
            "passages": [{"text": text, "window": 2, "position": 5, "increase": 1.25, "passage": f"Once {text}"}]}


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


# ---------------------------------------------------------------- pictures

def test_every_picture_has_labelled_axes_and_says_when_it_is_empty():
    runs = sweep()
    for fig in (figures.fig_perplexity(runs, "builtin/ppl"), figures.fig_time(runs)):
        assert all(ax.get_xlabel() and (ax.get_ylabel() or ax.get_yticklabels()) for ax in fig.axes)
    fig = figures.fig_layer_errors(runs)
    assert fig.get_supxlabel().startswith("block") and fig.get_supylabel().startswith("relative error")
    assert len(fig.axes) == 3 * len(KINDS)
    for fig in (figures.fig_layer_errors([record("dense")]), figures.fig_perplexity(runs, "c4/ppl"),
                figures.fig_layer_sparsity([]), figures.fig_time([])):
        assert not fig.axes and fig.texts[0].get_text().startswith("no ")


def test_healing_picture_has_every_look_at_its_tokens_and_a_line_for_every_rate():
    attempts = [{"looks": [[2, 1.5], [4, 2.5]], "steps": 4}, {"looks": [[3, 1.2], [6, 1.0]], "steps": 6}]
    info = {"tokens": 1000, "steps": 10, "held_out_before": 2.0, "held_out_after": 1.0, "attempts": attempts}
    (ax,) = figures.fig_healing([record() | {"heal": {"full": info}}, record("dense")]).axes
    curves = [list(zip(*line.get_data(), strict=True)) for line in ax.lines]
    assert curves == [[(0, 2.0), (200, 1.5), (400, 2.5)], [(700, 1.2), (1000, 1.0)]]
    assert not figures.fig_healing([record()]).axes and ax.get_xlabel() and ax.get_ylabel()


def test_a_dense_model_that_was_healed_is_no_baseline_and_has_its_picture():
    """`oneshot heal` of a smaller dense model: --method keep --pattern dense."""
    info = {"attempts": [{"looks": [[5, 1.5]], "steps": 10}], "tokens": 1000, "steps": 10, "held_out_before": 2.0}
    found = record("keep") | {"heal": {"full": info}, "layers": []}
    found["settings"] |= {"pattern": "dense", "heal": "full"}
    assert is_pruned(found) and not is_dense(found)
    assert figures.fig_healing([found]).axes and "keep" in html([found, record("dense")])


def test_speed_picture_has_every_measured_run_at_its_speed_and_the_dense_one_at_1():
    def timed(speedup, *args, **kwargs):
        made = record(*args, **kwargs)
        made["metrics"]["latency/decode1_speedup"] = speedup
        return made
    smaller = timed(1.4, "obs", "0.5", 30.0) | {"shrunk": {"share": 0.75}}
    runs = [smaller, timed(0.98, "sparsegpt", "2:4", 25.0), record("wanda", ppl=40.0), record("dense", ppl=20.0)]
    (ax,) = figures.fig_speed(runs, "builtin/ppl").axes
    dots = {(float(x), float(y)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)
            if line.get_marker() not in (None, "None", "")}
    assert dots == {(1.4, 30.0), (0.98, 25.0), (1.0, 20.0)}  # the run without a measured time is not there
    assert {t.get_text() for t in ax.texts} >= {"dense"} and "times as fast" in ax.get_xlabel()
    assert not figures.fig_speed(runs[2:3], "builtin/ppl").axes


def test_perplexity_picture_has_every_finite_value_once_and_names_the_others():
    runs = [record(m, p, ppl=10 + i) for i, (m, p) in enumerate(
        (m, p) for m in ("wanda", "sparsegpt") for p in ("0.5", "0.6", "2:4"))]
    (ax,) = figures.fig_perplexity([*runs, record("alps", ppl=math.inf)], "builtin/ppl").axes
    dots = [y for line in ax.lines if line.get_marker() not in (None, "None", "_") for y in line.get_ydata()]
    assert sorted(dots) == [10, 11, 12, 13, 14, 15] and "alps 2:4" in ax.get_xlabel()
    places = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "s"]
    assert len(set(places)) == 2 and min(places) > 0.6, "N:M stands apart, methods side by side"


def test_axis_is_logarithmic_only_when_the_range_demands_it():
    def scale(low, high):
        return figures.fig_perplexity([record("wanda", "0.5", low), record("wanda", "0.7", high)],
                                      "builtin/ppl").axes[0].get_yscale()

    assert (scale(10, 20), scale(10, 9000)) == ("linear", "log")


def test_experts_share_a_picture_and_short_names_stay_different():
    kinds = [f"mlp.experts.{e}.{k}" for e in range(8) for k in ("gate_proj", "up_proj")] + ["mlp.gate_proj"]
    fig = figures.fig_layer_errors([record(kinds=kinds)])
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["experts.gate_proj", "up_proj", "mlp.gate_proj"]
    assert drawing.kind("experts.gate_up_proj[3]") == "experts.gate_up_proj"


def test_sparsity_is_drawn_by_depth_where_it_differs():
    one = record()
    assert len(figures.fig_layer_sparsity([one]).axes) == 1
    one["layers"][0]["zeros"] = 1800
    assert len(figures.fig_layer_sparsity([one]).axes) == len(KINDS)


def test_seconds_add_up_to_the_total():
    parts = seconds(record())
    assert sum(parts.values()) == pytest.approx(14.0) and parts["collect"] == 2.0
    assert seconds({}) == {} and set(parts) <= set(PARTS)


@pytest.mark.parametrize("ending", ["svg", "pdf", "png"])
def test_saved_figures_are_the_same_bytes(tmp_path, ending):
    for name in "ab":
        drawing.save(figures.fig_time([record()]), tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_a_thousand_layers_are_read_quickly_and_once():
    page = html([record(blocks=250)])
    assert page.count("model.layers.249.mlp.up_proj") == 1 and "All 1000 layers" in page
