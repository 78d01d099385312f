"""Laws of the tables of oneshot.report, on invented records."""

import csv
import doctest
import io
import math
import re

import pytest
from reporting import record, sweep

from oneshot import report
from oneshot.report import table as table_writer
from oneshot.report import tables
from oneshot.report.page import html
from oneshot.report.table import Bold, render

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
