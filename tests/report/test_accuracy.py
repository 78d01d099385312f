"""Differences between runs' task results, chance, and how tables show them, on invented records."""

import csv
import io
import math
import random
import statistics

import pytest
import reporting
from hypothesis import given
from hypothesis import strategies as st

from oneshot.report import accuracy, figures, tables, task_table
from oneshot.report.page import html


def hexed(answers):
    return f"{int(''.join(map(str, answers)), 2):x}"


def run(method, answers, *, metric="letters/acc", documents="d0", chance=0.25, correct=True, **more):
    """A record that measured one task, with lm-eval's standard error."""
    n, mean = len(answers), statistics.fmean(answers)
    info = {"stderr": statistics.stdev(answers) / n**0.5, "samples": n, "documents": documents, "chance": chance,
            "correct": hexed(answers) if correct else None, "group": None} | more
    record = reporting.record(method)
    return record | {"metrics": {metric: mean}, "metric_info": {metric: info}}


answers = st.integers(2, 40).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n)] * 2))


@given(answers)
def test_a_difference_is_the_mean_of_the_documents_differences(pair):
    mine, dense = pair
    found = accuracy.difference(run("wanda", mine), run("dense", dense), "letters/acc")
    each = [a - b for a, b in zip(mine, dense, strict=True)]
    assert found.paired
    assert found.value == pytest.approx(statistics.fmean(mine) - statistics.fmean(dense), abs=1e-12)
    assert found.stderr == pytest.approx(statistics.stdev(each) / len(each) ** 0.5, abs=1e-12)


def test_the_standard_error_is_the_spread_of_the_difference_over_draws_of_documents():
    """And the unpaired one is not, where the runs answer alike."""
    draw = random.Random(0)

    def documents():
        dense = [int(draw.random() < 0.6) for _ in range(200)]
        return [a if draw.random() < 0.9 else 1 - a for a in dense], dense

    draws = [documents() for _ in range(400)]
    found = [accuracy.difference(run("wanda", a), run("dense", b), "letters/acc") for a, b in draws]
    spread, stderr = statistics.stdev(d.value for d in found), statistics.fmean(d.stderr for d in found)
    assert stderr == pytest.approx(spread, rel=0.12)
    a, b = draws[0]
    loose = accuracy.difference(run("wanda", a), run("dense", b, documents="d1"), "letters/acc")
    assert not loose.paired and loose.stderr > 1.8 * spread


def test_other_documents_are_not_paired():
    mine, dense = [0, 1, 1, 0], [1, 1, 0, 0]
    for other in ({"documents": "d1"}, {"correct": None}):
        a, b = run("wanda", mine), run("dense", dense, **other)
        found = accuracy.difference(a, b, "letters/acc")
        errors = [r["metric_info"]["letters/acc"]["stderr"] for r in (a, b)]
        assert not found.paired and found.stderr == pytest.approx(math.hypot(*errors))
    assert accuracy.difference(run("wanda", mine), run("dense", dense, metric="b/acc"), "letters/acc") is None
    assert accuracy.difference(run("wanda", mine, correct=False, stderr=None), run("dense", dense),
                               "letters/acc") is None


def test_a_mean_over_tasks_has_the_standard_error_of_a_mean():
    def both(method, *lists):
        parts = [run(method, x, metric=f"{n}/acc") for n, x in zip("ab", lists, strict=True)]
        info = parts[0]["metric_info"] | parts[1]["metric_info"]
        metrics = parts[0]["metrics"] | parts[1]["metrics"]
        info["z/acc"] = {"mean_of": ["a/acc", "b/acc"], "stderr": 0.1, "samples": 8, "chance": 0.25}
        return parts[0] | {"metrics": metrics | {"z/acc": sum(metrics.values()) / 2}, "metric_info": info}

    pruned, dense = both("wanda", [0, 1, 0, 0], [1, 1, 0, 0]), both("dense", [1, 1, 0, 0], [1, 0, 1, 1])
    found = accuracy.difference(pruned, dense, "z/acc")
    parts = [accuracy.difference(pruned, dense, f"{n}/acc") for n in "ab"]
    assert found.paired and found.value == pytest.approx((parts[0].value + parts[1].value) / 2)
    assert found.stderr == pytest.approx(math.hypot(parts[0].stderr, parts[1].stderr) / 2)


def cell(mine, dense, **more):
    lines = task_table.table([run("dense", dense), run("wanda", mine, **more)], "markdown").splitlines()
    assert [x.strip() for x in lines[0].split("|")[1:-1]] == ["task", "documents", "chance", "dense", "wanda 2:4"]
    return [x.strip() for x in lines[2].split("|")[1:-1]]


def test_table_marks_noise_and_chance():
    dense = [1] * 70 + [0] * 30
    same, worse, guess = [0, *dense[1:]], [0] * 25 + dense[25:], [1] * 28 + [0] * 72
    assert cell(same, dense) == ["letters acc", "100", "0.250", "0.700 ± 0.046", "0.690 (-0.010 ± 0.010 ~)"]
    assert cell(worse, dense)[-1] == "0.450 (-0.250 ± 0.044)"
    assert cell(guess, dense)[-1] == "0.280° (-0.420 ± 0.050)"
    assert "unpaired" in cell(worse, dense, correct=None)[-1]
    assert "1 of 2 values" in task_table.table([run("dense", dense), run("wanda", guess)])
    assert "°" not in "".join(cell(guess, dense, chance=None))


def test_tasks_stand_in_a_table_of_their_own_and_in_csv_with_the_rest():
    runs = [run("dense", [1, 1, 0, 1]), run("wanda", [0, 1, 0, 1])]
    assert "letters" not in tables.table(runs) and task_table.table([reporting.record()]) == ""
    page = html(runs)
    assert "<h2>Tasks</h2>" in page and "0.500° (-0.250 ± 0.250 ~)" in page
    row = list(csv.DictReader(io.StringIO(tables.table(runs, "csv"))))[1]
    assert float(row["letters acc - dense ±"]) == 0.25
    assert float(row["letters acc ±"]) == pytest.approx(statistics.stdev([0, 1, 0, 1]) / 2)


def test_picture_has_a_dot_a_run_and_the_chance_level():
    dense = [1, 1, 0, 1]
    (ax,) = figures.fig_tasks([run("dense", dense), run("wanda", [0, 1, 0, 1])]).axes
    dots = {(round(float(line.get_xdata()[0]), 9), line.get_color()) for line in ax.lines if len(line.get_xdata()) == 1}
    assert {x for x, _ in dots} == {0.75, 0.5} and len({colour for _, colour in dots}) == 2
    spans = sorted(tuple(map(float, line.get_xdata())) for line in ax.lines if len(line.get_xdata()) == 2)
    error = statistics.stdev(dense) / 2  # of four documents
    assert (0.25, 0.25) in spans and any(span == pytest.approx((0.75 - 2 * error, 0.75 + 2 * error)) for span in spans)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["letters acc"]
    assert not figures.fig_tasks([reporting.record()]).axes


def test_members_of_a_group_are_left_out():
    runs = [run("dense", [1, 0], group="mmlu"), run("wanda", [0, 0], group="mmlu")]
    assert "letters" not in task_table.table(runs)


def test_runs_on_other_documents_stand_in_columns_of_their_own():
    runs = [run("dense", [1, 0, 1]), run("dense", [1, 0], documents="d1"), run("wanda", [1, 1], documents="d1")]
    rows = tables.rows(runs)
    assert {k for k in rows[0] if k.endswith("- dense")} == {"letters acc (d1) - dense"}
    assert rows[-1]["letters acc (d1) - dense"] == 0.5
