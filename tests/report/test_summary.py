"""What a command prints after a run: what it found, its warnings, where the record and the page are."""

import pytest
from reporting import record

from oneshot import report
from oneshot.report import summary, table, tables


def test_damage_and_sensitivity_are_summed_up():
    found = [f"slice {i} lost 0.{i} nats" for i in (5, 4, 3, 2)]
    rows = [{"name": f"model.layers.{i}.mlp", "loss_increase": 1 / (i + 1)} for i in range(7)]
    lines = summary.findings(record() | {"damage": {"found": found}, "sensitivity": rows})
    assert lines[:3] == found[:3] and lines[3].startswith("... and 1 more")
    assert lines[4].count("model.layers") == 5 and "model.layers.0.mlp (+1)" in lines[4]
    assert summary.findings(record()) == []


def test_what_stays_dense_stands_below_the_table():
    """Its share of the model and of the blocks, with the reasons, once for all runs of a model."""
    skipped = [{"name": "e", "reason": "embedding", "weights": 30}, {"name": "h", "reason": "router", "weights": 6},
               {"name": "i", "reason": "router", "weights": 4}]
    own = {"name": "m", "parameters": 200, "prunable": 144, "in_blocks": 160, "fingerprint": "f"}
    runs = [record(method) | {"model": own, "skipped": skipped} for method in ("wanda", "alps", "dense")]
    assert summary.dense_lines(runs) == ["left dense: 20.00 % of the model's weights, 10.00 % of the blocks' "
                                         "(15.00 % embedding, 5.00 % router)"]
    del own["in_blocks"]  # a record of before
    assert summary.dense_lines(runs) == ["left dense: 20.00 % of the model's weights (15.00 % embedding, "
                                         "5.00 % router)"]
    assert summary.dense_lines(runs[2:]) == []


def test_warnings_that_differ_in_numbers_alone_stand_as_one():
    blocks = [f"model.layers.{b} collapsed: norm ratio {b + 2}.5" for b in range(8)]
    lines = summary.warnings([record("wanda", warnings=blocks), record("alps", warnings=[blocks[0], "few tokens"])])
    assert lines == [f"warning: {blocks[0]} (all; 7 more like it, in the report)",
                     "warning: few tokens (alps 2:4)"]


def test_many_kinds_of_warnings_are_cut_and_counted():
    lines = summary.warnings([record(warnings=["odd " + "x" * i for i in range(20)])])
    assert len(lines) == 13 and lines[-1].startswith("... and 8 more kinds")


@pytest.mark.parametrize("n, where", [(1, "/ID.json"), (2, "2 files in ")])
def test_says_where_the_records_and_the_page_are(tmp_path, monkeypatch, n, where):
    monkeypatch.setattr(summary, "write_html", lambda records, page: page.write_text("x"))
    runs = [record(seed=s) for s in range(n)]
    *_, records, page = summary.text(runs, tmp_path).splitlines()
    assert where.replace("ID", runs[0]["run_id"]) in records
    assert (tmp_path / page.rpartition("/")[2]).is_file()


@pytest.mark.parametrize("settings, name", [
    ({}, "alps"), ({"heal": "none", "allocate": "uniform", "dense_target": 0.0}, "alps"),
    ({"heal": "block,distil", "allocate": "owl", "dense_target": 0.5}, "alps, dense target 0.5, owl, block, distil"),
    ({"heal": "distil", "preset": "best-3"}, "best-3")])
def test_a_method_is_named_with_what_was_done_around_it(settings, name):
    assert report.method_of(record("alps", **settings)) == name
    assert report.method_of(record("dense", **settings)) == settings.get("preset", "dense")


def test_a_table_too_wide_is_continued_below_and_loses_nothing():
    wide = record()
    wide["metrics"] = {f"text{i}/ppl": 100.0 + i for i in range(20)}
    text = tables.table([wide])
    parts = [part.splitlines() for part in text.strip().split("\n\n")]
    assert len(parts) > 1 and max(map(len, text.splitlines())) <= table.WIDTH
    assert all(part[0].split()[:3] == ["model", "method", "pattern"] and "sparsegpt" in part[2] for part in parts)
    assert all(text.count(f"{100.0 + i:.1f}") == 1 for i in range(20))


def test_bytes_of_a_smaller_model_are_of_the_one_it_was_made_from():
    from oneshot.report.storage import whole_bytes
    record = {"model": {"parameters": 900, "prunable": 800}, "bytes": {"stored": 1600, "dense": 1600}}
    assert whole_bytes(record) == (1800, 1800)
    assert whole_bytes(record | {"shrunk": {"parameters": 700, "parameters_before": 1000}}) == (1800, 2400)


@pytest.mark.parametrize("asked, words", [
    ({"shrink": 0.75}, "0.75 left"), ({"shrink": 0.75, "pattern": "2:4"}, "0.75 left 2:4"),
    ({"layers": 24}, "24 layers"), ({"drop": "3,mlp:7"}, "without 3,mlp:7"),
    ({"shrink": 0.5, "experts": 6}, "0.5 left, 6 experts"), ({}, "dense")])
def test_a_smaller_model_is_not_the_dense_one(asked, words):
    """Its row says what is left, and is compared with the dense row."""
    small = record("obs") | {"run_id": "small"}
    small["settings"] = small["settings"] | {"pattern": "dense"} | asked
    assert report.pattern_of(small) == words and report.is_dense(small) == (not asked)
    assert summary.asked(small) == ("dense" if not asked else f"obs {words}")
