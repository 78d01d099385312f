"""The pictures: what they show, and that the same records give the same bytes."""

import math

import pytest
from reporting import KINDS, record, sweep

from oneshot.report import figures
from oneshot.report.columns import is_dense, is_pruned
from oneshot.report.figures import drawing
from oneshot.report.figures.time import PARTS, seconds
from oneshot.report.page import html


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
