"""Pictures for choosing what to prune: what the Pareto front holds, and that size and sensitivity show the records."""

import itertools
import math

import pytest
import reporting
from hypothesis import given
from hypothesis import strategies as st

from oneshot.report import page
from oneshot.report.figures import drawing, sensitivity, size

POINTS = st.dictionaries(st.integers(), st.tuples(st.floats(1, 100), st.floats(1, 100).map(lambda x: [x])), min_size=1)


@given(POINTS, st.booleans())
def test_nothing_beats_the_front_and_it_beats_the_rest(points, higher):
    kept = size.front(points, higher)
    assert kept, "something is best"
    better = (lambda a, b: a > b) if higher else (lambda a, b: a < b)
    best = [(points[k][0], points[k][1][0]) for k in kept]
    for (small, mean), (larger, other) in itertools.pairwise(best):
        assert (small, mean) == (larger, other) or (small < larger and better(other, mean))
    for own, [mean] in points.values():  # each is on the front, or something no worse on it is no larger, or hardly
        assert any((not better(mean, m)) and s <= own * size.SAME ** len(points) for s, m in best)


def test_front_of_known_points():
    points = {"a": (1.0, [9.0]), "b": (2.0, [5.0, 7.0]), "c": (2.001, [4.0]), "d": (3.0, [8.0]), "e": (4.0, [3.0])}
    assert size.front(points) == ["a", "c", "e"], "b is smaller by less than rounding"
    assert size.front(points, higher_is_better=True) == ["a"]


def test_bytes_picture(tmp_path):
    runs = reporting.sweep()
    fig = size.fig_bytes(runs, "builtin/ppl", lambda r: 4e6 * (1 - (r["sparsity"] or 0)))
    [ax] = fig.axes
    text = ax.get_xlabel()
    assert "(MB)" in text and "dense: 9.500 at 4.00 MB" in text and "magnitude 0.6: 10.06 at 1.60 MB" in text
    drawing.save(fig, tmp_path / "a.svg")
    assert "Pareto front" in (tmp_path / "a.svg").read_text()
    for empty in (size.fig_bytes(runs, "c4/ppl", len), size.fig_bytes(runs, "builtin/ppl", lambda r: None)):
        assert not empty.axes


def rows(values):
    return [{"name": f"model.layers.{b}.{k}", "block": b, "linear": k, "loss_increase": x, "relative_error": 0.1}
            for (k, b), x in values.items()]


def test_the_page_ranks_what_must_not_be_touched():
    text = page.html([reporting.record() | {"sensitivity": [
        {"name": f"model.layers.{b}.mlp", "block": b, "linear": "mlp", "loss_increase": 0.3 - b / 10,
         "relative_error": None, "weights": 64} for b in range(3)]}])
    places = [text.index(f"model.layers.{b}.mlp</td>") for b in range(3)]
    assert places == sorted(places) and text.count("What must not be touched") == 3  # heading and name of the map, list


def test_sensitivity_map():
    one = reporting.record() | {"sensitivity": rows({
        ("mlp.up_proj", 0): 0.1, ("mlp.up_proj", 2): 0.002, ("self_attn.q_proj", 0): -0.01,
        ("mlp.experts.up[0]", 1): 0.2, ("mlp.experts.up[1]", 1): 0.4, ("self_attn.q_proj", 1): math.nan})}
    grid = sensitivity.cells(one)
    assert grid["mlp.experts.up", 1] == pytest.approx(0.3) and ("self_attn.q_proj", 1) not in grid
    ax, bar = sensitivity.fig_sensitivity([one, reporting.record("wanda")]).axes
    shown = ax.images[0].get_array()
    assert shown.shape == (3, 3) and shown.count() == 3, "what lowers the loss, and what was not measured, is blank"
    assert "loss increase" in bar.get_ylabel()
    for nothing in ([reporting.record()], [reporting.record() | {"sensitivity": rows({("a", 0): -1.0})}]):
        assert not sensitivity.fig_sensitivity(nothing).axes
