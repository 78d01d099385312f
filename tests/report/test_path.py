"""The picture of `oneshot fit`: every state has its mark, kept ones are joined, floors and targets are lines."""

import math

from oneshot.pipeline import forms
from oneshot.pipeline.fit import ending
from oneshot.report import figures
from oneshot.report.figures.path import KINDS, Point, placed

POINTS = [Point("dense", "dense", {"latency": 1.0}, {"a/ppl": 10.0}),
          Point("1", "kept", {"latency": 0.9, "bytes": 0.8}, {"a/ppl": 11.0}),
          Point("2", "taken back", {"latency": 0.7}, {"a/ppl": 20.0}),
          Point("3", "kept", {"latency": 0.8}, {"a/ppl": 12.0}),
          Point("4", "taken back", {}, {}), Point("5", "taken back", {"latency": 0.7}, {"a/ppl": None}),
          Point("int8", "plain rounding", {"latency": 0.5}, {"a/ppl": 10.5})]


def test_states_floors_and_targets_are_drawn():
    [ax] = figures.fig_path(POINTS, {"latency": 0.75}, {"a/ppl": 15.0}).axes
    lines = [line.get_xydata().tolist() for line in ax.get_lines()]
    assert lines[0] == [[1.0, 10.0], [0.9, 11.0], [0.8, 12.0]]  # the path
    assert [[0.7, 20.0]] in lines and [[0.5, 10.5]] in lines and len(lines) == 1 + 5 + 2
    assert lines[-2] == [[0.0, 15.0], [1.0, 15.0]] and lines[-1] == [[0.75, 0.0], [0.75, 1.0]]
    assert sorted(t.get_text() for t in ax.texts) == ["1", "2", "3", "dense", "int8"]


def test_a_panel_for_each_metric_and_target_and_none_without_values():
    more = [p._replace(metrics=p.metrics | {"b/acc": 0.5}) for p in POINTS if p.shares]
    assert len(figures.fig_path(more, {"latency": 0.7, "bytes": 0.5}, {"a/ppl": math.nan, "b/acc": 0.4}).axes) == 4
    assert placed(POINTS, "a/ppl", "bytes") == [("1", "kept", 0.8, 11.0)]
    nothing = figures.fig_path(POINTS[4:5], {"latency": 0.7}, {"a/ppl": 1.0})
    assert not nothing.axes and {kind for _, kind, *_ in POINTS} == set(KINDS)


def test_what_each_block_can_spare():
    fig = figures.fig_candidates([("round-1", {"2:4": {0: 0.1, 1: 0.3}, "influence": {1: 0.5}}),
                                  ("round-2", {"2:4": {}, "int8": {}}), ("final", {"int8": {0: 1.0}})])
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["round-1", "final"]
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {
        "KL of the block alone in 2:4 (nats)", "influence: 1 - cosine of what the block changes",
        "the block's share of the KL of all in int8 (nats)"}
    assert not figures.fig_candidates([]).axes


def test_the_output_head_stands_right_of_all_blocks():
    looked = ending.looked_at({"grids": {"int8": [[0, 0.1], [3, 0.3]]}, "output": {"int8": 0.2, "int4": 0.4}})
    assert looked == {"2:4": {}, "int8": {0: 0.1, 3: 0.3, forms.HEAD: 0.2}, "influence": {}, "int4": {forms.HEAD: 0.4}}
    [ax] = figures.fig_candidates([("round-1", looked)]).axes
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 3, 5], [5]]
    assert [text.get_text() for text in ax.texts] == [forms.HEAD]
    assert figures.fig_candidates([("round-1", {"int8": {forms.HEAD: 0.2}})]).axes
