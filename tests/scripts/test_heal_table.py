"""scripts/bench/heal.py and scripts/tables/heal_table.py: every way is a command line, and the table's arithmetic."""

import json
import lzma
import math
import re
from argparse import Namespace

import heal as bench
import heal_picture
import heal_rows
import heal_table
import pytest

from oneshot import report
from oneshot.pipeline import checks

TASKS = tuple(f"{task}/acc" for task in bench.TASKS.split(","))


@pytest.mark.parametrize("way", bench.WAYS)
def test_every_way_is_a_command_line_that_passes_the_checks(way, tmp_path, monkeypatch):
    asked = []
    def attempt(cfg):
        asked.append(cfg)
        text = "c4" if len(asked) == 1 else "wikitext2_test"
        return {"status": "finished", "run_id": "x", "metrics": {f"{text}/ppl": len(asked)}, "metric_info": {}}
    monkeypatch.setattr(bench, "attempt", attempt)
    begun = {"method": "obs", "pattern": "dense", "shrink": 0.75}
    monkeypatch.setattr(bench.checkpoint, "read_manifest", lambda folder: {"record": {"settings": begun | {"seed": 0}}})
    args = Namespace(work=tmp_path, out=tmp_path / "out", shared=tmp_path, tasks=None)
    bench.one(args, "demo", "0", way, ["--calibration", "builtin", "--evaluate", "builtin"])
    cfg, evaluation = asked
    checks.check([cfg])
    assert evaluation.model == cfg.save and evaluation.method == "dense"
    written = json.loads((tmp_path / "out" / "demo" / "x.json").read_text())
    assert written["metrics"] == {"c4/ppl": 1, "wikitext2_test/ppl": 2}
    assert bool(cfg.text_heals) == any(part in way for part in ("full", "lora", "next", "shuffled"))
    assert not cfg.text_heals or cfg.heal_data.startswith("0.7*") != cfg.heal_data.endswith("shuffled.txt")
    assert bool(cfg.heal_held_out) == ("held out" in way)
    begins = bench.WAYS[way].get("MODEL")
    assert written.get("begun") == (begun if begins else None)
    folder = begins and str(tmp_path / bench.folder_of("demo", "0", begins))
    assert (cfg.model, cfg.heal_teacher) == ((folder, "demo") if begins else ("demo", None))


@pytest.mark.parametrize("way", ["dense", "full 500k"])
def test_the_tasks_are_measured_once_of_what_was_saved(way, tmp_path, monkeypatch):
    asked, kept = [], {"status": "finished", "run_id": "x", "metrics": {bench.WIKITEXT: 9.0}, "metric_info": {}}
    def attempt(cfg):
        asked.append(cfg)
        found = {"metrics": {"lambada/acc": 0.5}, "metric_info": {"lambada/acc": {"stderr": 0.1}}}
        return kept if cfg.tasks in (None, "none") else kept | found
    monkeypatch.setattr(bench, "attempt", attempt)
    args = Namespace(work=tmp_path, out=tmp_path / "out", shared=tmp_path, tasks=tmp_path / "own")
    for _ in range(2):
        bench.one(args, "demo", "0", way, ["--calibration", "builtin", "--evaluate", "builtin"])
        kept = json.loads((tmp_path / "out" / "demo" / "x.json").read_text())
    run, tasks, again = asked
    assert (tasks.method, tasks.model) == ("dense", "demo" if way == "dense" else run.save) and run.save == again.save
    assert (tasks.tasks, tasks.task_path, tasks.task_limit) == (bench.TASKS, str(tmp_path / "own"), bench.DOCUMENTS)
    assert tasks.trust_task_code and kept["metrics"] == {bench.WIKITEXT: 9.0, "lambada/acc": 0.5}


def test_tasks_stand_beside_the_dense_models_document_by_document(tmp_path):
    def on_tasks(found, correct):
        info = {"stderr": 0.25, "samples": 4, "correct": correct, "documents": "d", "chance": 0.25}
        accuracy = bin(int(correct, 16)).count("1") / 4
        return found | {"metrics": found["metrics"] | dict.fromkeys(TASKS, accuracy),
                        "metric_info": dict.fromkeys(TASKS, info)}
    folder = tmp_path / "demo"
    folder.mkdir()
    assert heal_table.tasks_of(tmp_path) == ""
    (folder / "plain.json").write_text(json.dumps(made(ppl=(40.0, 80.0))))
    (folder / "healed.json").write_text(json.dumps(on_tasks(made(heal="full"), "8")))
    assert "0.25 ± 0.25 |" in heal_table.tasks_of(tmp_path)  # nothing to compare with
    (folder / "dense.json").write_text(json.dumps(on_tasks(made("dense", (10.0, 20.0)), "e")))
    told, _, heads, _, dense, healed = heal_table.tasks_of(tmp_path).rstrip().splitlines()
    assert told.startswith("Tasks, 4 documents") and heads.count("chance 0.25") == len(TASKS)
    assert dense.count("0.75 ± 0.25 |") == healed.count("0.25 ± 0.25 (-0.50 ± 0.29 ~)") == len(TASKS)
    others = on_tasks(made(heal="full"), "8")
    others["metric_info"] = {task: info | {"documents": "others"} for task, info in others["metric_info"].items()}
    (folder / "healed.json").write_text(json.dumps(others))
    assert heal_table.tasks_of(tmp_path).count("(-0.50 ± 0.35 unpaired ~)") == len(TASKS)


@pytest.mark.parametrize("name, data", [("stories260k", "tinystories_calibration.json"), ("craftgpt-5m", "self")])
def test_a_toy_is_trained_and_measured_on_texts_of_its_own(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tinystories_1000.json").write_text(json.dumps(["one", "two", "three", "four"]))
    (tmp_path / "data" / "craftgpt_selfgen.txt").write_text("a\nb\nc\nd\n")
    asked = []
    def attempt(cfg):
        asked.append(cfg)
        return {"status": "finished", "run_id": "x", "metrics": {heal_rows.OWN: 1.0}, "metric_info": {}}
    monkeypatch.setattr(bench, "attempt", attempt)
    args = Namespace(work=tmp_path, out=tmp_path / "out", shared=tmp_path, tasks=None)
    bench.one(args, name, "1", "lora 500k", ["--calibration", "not this", "--evaluate", "nor this"])
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "build").rglob("*.json")}
    bench.one(args, name, "1", "lora 500k", [])
    assert before and before == {file: file.stat().st_mtime_ns for file in before}  # else it would begin anew
    cfg, _ = asked
    assert cfg.heal_data.endswith(data) and cfg.evaluate.startswith("own=") and cfg.evaluate.endswith("_test.json")
    assert cfg.calibration.endswith("_calibration.json") and cfg.heal_seqlen == (256 if data != "self" else 64)
    assert (cfg.seed, cfg.pattern, cfg.model) == (1, "2:4", str(tmp_path / "models" / name))


def test_shuffled_words_are_those_of_the_text(tmp_path):
    (tmp_path / "data").mkdir()
    texts = [f"{i} one two three four five" for i in range(100)]
    (tmp_path / "data" / "c4_sample.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "data" / "books_public_domain.txt.xz").write_bytes(lzma.compress(b"a book"))
    bench.make_texts(tmp_path / "data", tmp_path / "work")
    found = (tmp_path / "work" / "shuffled.txt").read_text().split()
    assert sorted(found) == sorted(" ".join(texts[:85]).split()) != found


def made(method="sparsegpt", ppl=(40.0, 50.0), heal=None, **settings):
    """A record with what the table reads."""
    info = {"attempts": [{"looks": [[5, 0.5]], "steps": 10, "lr": 0.002}], "tokens": 5000, "steps": 10,
            "held_out_before": 1.25, "held_out_after": 0.5, "tokens_per_second": 123.4}
    return {"schema": report.SCHEMA, "run_id": "x", "status": "finished", "model": {"name": "demo"},
            "settings": {"method": method, "seqlen": 8, "pattern": "dense" if method == "dense" else "2:4",
                         **({} if method == "dense" else {"seed": 0}), **settings},
            "metrics": dict(zip(heal_rows.METRICS, ppl, strict=True)), "heal": {heal: info} if heal else {},
            "blocks": [], "seconds": {"prune": 120.0}, "peak_memory_bytes": 2**31,
            "environment": {"commit": "abc", "dirty": False, "device": "cpu", "threads": 1, "torch": "2",
                            "transformers": "5"}}


def test_the_share_is_of_the_excess_without_healing(tmp_path):
    records = [made("dense", (10.0, 20.0)), made(ppl=(40.0, 80.0)),
               made(ppl=(20.0, 40.0), heal="full", heal_loss="next")]
    records[2]["settings"]["heal"] = "full"
    folder = tmp_path / "demo"
    folder.mkdir()
    for i, found in enumerate(records):
        (folder / f"{i}.json").write_text(json.dumps(found))
    assert heal_rows.share(records[2], records[1], records[0], "c4/ppl") == 1 - math.log(2) / math.log(4)
    lines = heal_table.lines_of(heal_rows.in_order(tmp_path)).splitlines()
    assert len(lines) == 5 and "dense" in lines[2] and lines[3].count("0.50") == 0
    assert "sparsegpt 2:4, full (next)" in lines[4] and lines[4].count(" 0.50 |") == 2 and "1.250 to 0.500" in lines[4]
    assert "| 500 | 0.002 |" in re.sub(" +", " ", lines[4])  # tokens a step, learning rate
    cut = made("obs", (20.0, 40.0), pattern="dense", shrink=0.75)
    begun = made("keep", (15.0, 25.0), heal="full", pattern="dense") | {"begun": {"method": "obs", "shrink": 0.75}}
    assert heal_rows.of(cut) == heal_rows.of(begun) and heal_rows.way_of(begun) == "shrink 0.75"
    assert heal_table.main(["--out", str(tmp_path), "--check"]) == 1
    assert heal_table.main(["--out", str(tmp_path)]) == heal_table.main(["--out", str(tmp_path), "--check"]) == 0
    assert "<svg" in (tmp_path / "heal.svg").read_text()
    above, _, kl, next_token = heal_picture.picture(heal_rows.in_order(tmp_path)).axes
    [dotted] = [line for line in above.lines if line.get_linestyle() == ":"]
    assert list(dotted.get_xdata()) == [512, 5512] and not kl.lines and len(next_token.lines) == 1
    assert list(dotted.get_ydata()) == pytest.approx([math.log(4), math.log(2)])


def test_seeds_of_a_way_share_a_line_and_toys_have_a_table_of_their_own(tmp_path):
    def own(record, ppl):
        return record | {"metrics": {heal_rows.OWN: ppl}}
    for model, kind in (("demo", lambda record, ppl: record), ("stories260k", own)):
        (tmp_path / model).mkdir()
        rows = [kind(made("dense", (10.0, 20.0), nsamples=512), 10.0)]
        for seed, healed in ((0, 20.0), (1, 10.0 * 2**0.5)):
            rows += [kind(made(ppl=(40.0, 80.0), seed=seed, nsamples=512), 40.0),
                     kind(made(ppl=(healed, 2 * healed), seed=seed, nsamples=512) | made(heal="full"), healed)]
            rows[-1] |= {"settings": rows[-2]["settings"] | {"heal": "full"}, "metrics": {
                heal_rows.OWN: healed} if kind is own else dict.fromkeys(heal_rows.METRICS, 2 * healed)}
        for i, found in enumerate(rows):
            (tmp_path / model / f"{i}.json").write_text(json.dumps(found))
    demo, toys = heal_table.lines_of(heal_rows.in_order(tmp_path)).split("\n\n")
    assert [len(part.splitlines()) for part in (demo, toys)] == [5, 5] and "c4 ppl" in demo and "own ppl" in toys
    plain, healed = toys.splitlines()[3:]
    assert "| 0, 1  | sparsegpt 2:4 " in plain and "40.00 ± 0.00" in plain and "windows" not in toys
    assert "17.07 ± 4.14" in healed and "0.62 ± 0.18" in healed and "0, 1" in healed  # shares 1/2 and 3/4


def test_widths_by_layer_stand_beside_even_ones(tmp_path):
    cut = {"pattern": "dense", "shrink": 0.75}
    records = [made("dense", (10.0, 20.0)), made("obs", (40.0, 80.0), **cut),
               made("obs", (20.0, 40.0), **cut, uneven=True, nsamples=256),
               made("obs", (20.0, 40.0), heal="full", **cut, nsamples=256)]
    records[3]["settings"]["heal"] = "full"
    (tmp_path / "demo").mkdir()
    for i, found in enumerate(records):
        (tmp_path / "demo" / f"{i}.json").write_text(json.dumps(found))
    lines = heal_table.lines_of(heal_rows.in_order(tmp_path)).splitlines()
    assert [line.count(" 0.50 |") for line in lines[2:]] == [0, 0, 2, 2]
    assert "shrink 0.75 (widths by layer, 256 windows)" in lines[4] and "shrink 0.75, full (256 windows)" in lines[5]


def test_a_way_that_begins_with_another_has_its_minutes_and_its_share_too(tmp_path):
    cut = {"pattern": "dense", "shrink": 0.75}
    uneven = {**cut, "uneven": True}
    healed = made("keep", (10.0 * 2**0.5, 20.0 * 2**0.5), heal="full", pattern="dense")
    healed |= {"begun": {"method": "obs", **uneven}, "seconds": {"prune": 60.0}}
    healed["settings"]["heal"] = "full"
    records = [made("dense", (10.0, 20.0)), made("obs", (40.0, 80.0), **cut), made("obs", (20.0, 40.0), **uneven),
               healed]
    assert heal_rows.begun_with(healed, records) is records[2] and heal_rows.begun_with(records[2], records) is None
    assert heal_rows.minutes_of(healed, records) == 3.0 and heal_rows.minutes_of(records[2], records) == 2.0
    (tmp_path / "demo").mkdir()
    for i, found in enumerate(records):
        (tmp_path / "demo" / f"{i}.json").write_text(json.dumps(found))
    [line] = [line for line in heal_table.lines_of(heal_rows.in_order(tmp_path)).splitlines() if ", full (" in line]
    assert line.count("0.75 (0.50)") == 2 and "| 1.0 | 3.0 |" in re.sub(" +", " ", line)
    assert heal_table.shares([healed], records[:2], records[0], "c4/ppl") == "0.75"  # its start is not there


def test_ways_stand_by_the_time_they_took(tmp_path):
    """A way that is measured later needs nothing here."""
    def taking(minutes, record):
        return record | {"seconds": {"prune": 60.0 * minutes}}
    full, lora, windows = (made(ppl=ppl, heal=heal) for ppl, heal in (((20.0, 40.0), "full"), ((30.0, 60.0), "lora"),
                                                                      ((25.0, 50.0), None)))
    looks = [[5, 0.75], [10, 0.5]]
    for record, heal in ((full, "full"), (lora, "lora"), (windows, "block,distil")):
        record["settings"]["heal"] = heal
        for info in record["heal"].values():
            info |= {"tokens_per_second": 5000 / (30 * 60), "attempts": [{"looks": looks, "steps": 10, "lr": 0.001}]}
    folder = tmp_path / heal_picture.MODEL
    folder.mkdir()
    records = [made("dense", (10.0, 20.0)), taking(1, made()), taking(50, full), taking(60, lora), taking(40, windows),
               made("obs", pattern="dense", shrink=0.75)]
    assert heal_table.by_time(tmp_path) == ""
    for i, found in enumerate(records):
        (folder / f"{i}.json").write_text(json.dumps(found))
    lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in heal_table.by_time(tmp_path).splitlines()[4:]]
    assert [(line[0], line[1]) for line in lines] == [
        ("nothing", "1.0"), ("calibration windows", "40.0"), ("text, all kept weights", "50.0"), ("text, LoRA", "60.0")]
    assert lines[2][6:9] == ["0.750", "-", "-"] and lines[1][6:9] == ["", "", ""]  # looks after 15 and 30 minutes
