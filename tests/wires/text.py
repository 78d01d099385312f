"""Flags of the text, and of what is measured on it."""

import json

import datasets
import pytest

from oneshot import heal
from oneshot.data import hub as hub_module
from oneshot.data import training
from oneshot.heal.text import Course
from oneshot.pipeline import plan, shrink
from wires import SMALLER, text_healing, wire


def text_of(b, kind="calibration", **changed):
    """What the record says of a run's text."""
    return b.record(method="wanda", **changed)["data"][kind]


@wire("calibration")
def _(b):
    found = text_of(b, calibration=b.place / "evaluation.txt")
    assert "evaluation.txt" in found["source"] and found["sha256"] != text_of(b)["sha256"]


@wire("nsamples", "seqlen")
def _(b):
    found = text_of(b, nsamples=3, seqlen=20)
    assert (found["windows"], found["seqlen"]) == (3, 20)


@wire("seed")
def _(b):
    """The windows drawn, those held out, and every method's own."""
    assert text_of(b, seed=5)["sha256"] != text_of(b)["sha256"]
    for place, given in ((plan, {"heal": "block,distil", "block.steps": 1, "distil.steps": 1}),
                         (shrink, {"heal": "fold", **SMALLER})):
        with b.seen(place, "held_out_windows", lambda args, *_: args[2]) as drawn, \
                b.seen(heal.Heal, "__init__", lambda args, *_: args[0].seed) as seeds:
            b.record(seed=5, **given)
        assert (set(drawn), set(seeds)) == ({5}, {5})
    with b.seen(training, "prepare", lambda args, kwargs, _: kwargs["seed"]) as read, \
            b.seen(Course, "__init__", lambda args, *_: args[2].seed) as trained:
        b.record(seed=5, **text_healing(b))
    assert read == trained == [5]


@wire("documents", "per_line")
def _(b):
    """Twelve letters a document; forty a line."""
    rows, lines = {"calibration": b.place / "rows.jsonl", "column": "a"}, {"calibration": b.place / "lines.txt"}
    assert [text_of(b, documents=how, **rows)["tokens"] for how in ("join", "separate")] == [4 * 16, 4 * 12]
    assert [text_of(b, documents="separate", per_line=each, **lines)["windows"] for each in (False, True)] == [1, 4]


@wire("bos")
def _(b):
    found = {mode: text_of(b, bos=mode) for mode in ("auto", "each", "first", "none")}
    assert len({found[mode]["sha256"] for mode in ("auto", "each", "first")}) == 3
    assert found["none"]["sha256"] == found["auto"]["sha256"], "this tokenizer adds none by default"
    assert "each after <s>" in found["each"]["source"]


@wire("column")
def _(b):
    assert text_of(b, calibration=b.place / "rows.jsonl", column="a")["sha256"] != \
        text_of(b, calibration=b.place / "rows.jsonl", column="b")["sha256"]


@wire("data_config")
def _(b):
    hub(b, "data_config", "small", lambda args, kwargs: args[1])


@wire("split", "revision")
def _(b):
    hub(b, "split", "train[:9]")
    hub(b, "revision", "v2")


def hub(b, name, value, get=None):
    """The data set of a hub that is not there is asked for with the flag's value."""
    asked, letters = [], (b.place / "calibration.txt").read_text()

    def load_dataset(*args, **kwargs):
        asked.append(get(args, kwargs) if get else kwargs[name])
        return datasets.Dataset.from_dict({"text": [letters]})
    with b.monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        patch.setattr(hub_module, "hub_away", lambda: None)
        b.record(calibration="owner/name", **{name: value})
    assert asked == [value]


def metrics(b, *more, **changed):
    """(metrics, how they were measured) of a run on the evaluation text."""
    record = b.record(*more, **{"evaluate": b.place / "evaluation.txt", "eval_windows": 4} | changed)
    return record["metrics"], record["metric_info"]


@wire("evaluate")
def _(b):
    assert set(metrics(b, evaluate=f"x={b.place / 'evaluation.txt'}")[0]) == {"x/ppl"}


@wire("eval_seqlen", "eval_windows")
def _(b):
    how = metrics(b, eval_seqlen=20, eval_windows=3)[1]["evaluation/ppl"]
    assert (how["window"], how["windows"], how["tokens"]) == (20, 3, 3 * 19)


@wire("robustness", "divergence")
def _(b):
    assert {"evaluation+typos/ppl"} <= set(metrics(b, "--robustness")[0]) > {"evaluation/ppl"}
    assert {"evaluation/kl"} <= set(metrics(b, "--divergence")[0])
    assert set(metrics(b)[0]) == {"evaluation/ppl"}


@wire("damage", "prompts", "sensitivity")
def _(b):
    text = {"evaluate": b.place / "evaluation.txt", "eval_windows": 2}
    found = b.record("--damage", prompts=suite(b), sensitivity="kind", **text)
    assert found["damage"]["overall"]["tokens"] == 2 * 15 and len(found["prompts"]) == 1
    assert {row["name"] for row in found["sensitivity"]} > {"mlp.up_proj"}
    assert not {"damage", "prompts", "sensitivity"} & set(b.record(**text))
    assert {row["block"] for row in b.record(sensitivity="linear", **text)["sensitivity"]} == {0, 1, 2}


@wire("say")
def _(b):
    found = b.record("--say", "the", "--say", "on")
    assert [entry["prompt"] for entry in found["say"]] == ["the", "on"] and "say" not in b.record()


def suite(b):
    """A suite of one prompt."""
    (b.tmp / "suite.jsonl").write_text(json.dumps({"prompt": "the", "expected": "a"}))
    return b.tmp / "suite.jsonl"


@wire("tasks", "task_path", "task_limit", "trust_task_code")
def _(b):
    pytest.importorskip("lm_eval")
    record = b.record(tasks="letters", task_path=task(b), task_limit=2)
    assert {name: how["samples"] for name, how in record["metric_info"].items()} == {"letters/acc": 2}


def task(b):
    """A folder with the task `letters` of three documents."""
    folder = b.tmp / "yaml"
    folder.mkdir()
    (folder / "letters.jsonl").write_text("".join(json.dumps({"query": q, "choices": ["ab", "cd"], "gold": 1}) + "\n"
                                                  for q in ("the", "on", "a")))
    (folder / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'letters.jsonl'}}}}}\nmetric_list: [{{metric: acc}}]\n"
        'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n')
    return folder
