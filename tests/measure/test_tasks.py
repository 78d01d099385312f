"""lm-eval tasks on a local file: our numbers are lm-eval's, standard errors kept, bad input refused in one line."""

import functools
import json
import re
import sys

import pytest
import tiny

from oneshot import models
from oneshot.measure import task_list, tasks
from oneshot.report import accuracy

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
YAML = """task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tiny.make(tmp_path_factory.mktemp("tasks"))
    rows = [{"query": f"the {a}", "choices": [f"{a}{b}", f"{b}{a}"], "gold": i % 2}
            for i, (a, b) in enumerate(zip("abcdefghij", "klmnopqrst", strict=True))]
    (place / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "yaml").mkdir()
    (place / "yaml" / "letters.yaml").write_text(YAML.format(file=place / "letters.jsonl"))
    return place


def test_a_run_records_value_and_standard_error(place, capsys):
    assert tiny.main(*tiny.flags(place, method="magnitude", evaluate="none", tasks="letters",
                                 task_path=place / "yaml")) == 0, capsys.readouterr().err
    found = tiny.records(place / "runs")
    for record in found.values():
        value, how = record["metrics"]["letters/acc"], record["metric_info"]["letters/acc"]
        assert 0 <= value <= 1 and how["samples"] == 10
        assert how["stderr"] == pytest.approx((value * (1 - value) / 9) ** 0.5)  # of a mean of ten zeros and ones
        assert how["chance"] == 0.5 and sum(accuracy.right(how)) == pytest.approx(10 * value)
    assert len(found) == 2 and "letters acc" in capsys.readouterr().out


def test_the_number_is_the_models_own_choice(place):
    import torch

    model, tokenizer = models.load(place / "model")
    metrics, _, _ = tasks.evaluate(model, tokenizer, ["letters"], task_path=str(place / "yaml"))

    def loss(query, choice):
        ids = tokenizer(query + " " + choice, return_tensors="pt").input_ids  # lm-eval's delimiter is a space
        n = len(tokenizer(query).input_ids)
        log_p = model(ids).logits[0].log_softmax(-1)
        return -sum(log_p[i - 1, ids[0, i]] for i in range(n, ids.shape[1]))

    right = 0
    for line in (place / "letters.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            right += min(range(2), key=lambda i: loss(row["query"], row["choices"][i])) == row["gold"]
    assert metrics["letters/acc"] == right / 10


def write(folder, name, rows, **changed):
    """A task `name` in the folder on rows of its own; `changed` replaces keys of the YAML."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    lines = YAML.format(file=file).replace("task: letters", f"task: {name}").splitlines()
    given = dict(line.split(": ", 1) for line in lines) | {k: json.dumps(v) for k, v in changed.items()}
    (folder / f"{name}.yaml").write_text("".join(f"{k}: {v}\n" for k, v in given.items()))
    return str(folder)


ROW = {"query": "the", "choices": ["ab", "cd"], "gold": 1}


@pytest.fixture(scope="module")
def loaded(place):
    return models.load(place / "model")


def test_no_second_copy_of_the_model(place, loaded, monkeypatch):
    from lm_eval import evaluator

    seen, real = [], evaluator.evaluate
    monkeypatch.setattr(evaluator, "evaluate", lambda lm, *args, **how: seen.append(lm.model) or real(lm, *args, **how))
    model, tokenizer = loaded
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    tasks.evaluate(model, tokenizer, ["letters"], task_path=str(place / "yaml"))
    assert seen[0] is model and {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_the_command_line_of_lm_eval_says_the_same_of_the_checkpoint(place, monkeypatch):
    """Value, standard error, and which documents were right."""
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate

    only_ours = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # its ten thousand take 15 s
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", only_ours)
    assert tiny.main(*tiny.flags(place, "--no-dense", evaluate="none", tasks="letters", task_path=place / "yaml",
                                 task_limit=8, save=place / "pruned", results=place / "cli")) == 0
    [record] = tiny.records(place / "cli").values()
    assert record["settings"]["task_limit"] == 8
    out = place / "lm_eval"
    monkeypatch.setattr(sys, "argv", [
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={place / 'pruned'},dtype=float32", "--device", "cpu",
        "--tasks", "letters", "--include_path", str(place / "yaml"), "--limit", "8", "--batch_size", "4",
        "--log_samples", "--output_path", str(out)])
    cli_evaluate()
    theirs = json.loads(next(out.rglob("results_*.json")).read_text())["results"]["letters"]
    how = record["metric_info"]["letters/acc"]
    assert (record["metrics"]["letters/acc"], how["stderr"]) == (theirs["acc,none"], theirs["acc_stderr,none"])
    samples = [json.loads(line) for line in next(out.rglob("samples_*.jsonl")).read_text().splitlines()]
    assert accuracy.right(how) == [int(s["acc"]) for s in sorted(samples, key=lambda s: s["doc_id"])]


def test_chance_is_the_mean_over_documents(tmp_path, loaded):
    path = write(tmp_path, "odd", [ROW, ROW | {"choices": ["a", "b", "c", "d"]}, ROW | {"choices": ["a", "b", "c"]}])
    _, info, _ = tasks.evaluate(*loaded, ["odd"], task_path=path)
    assert info["odd/acc"]["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 3) / 3)


def test_a_group_keeps_its_documents_where_its_value_is_their_mean(tmp_path, loaded):
    write(tmp_path, "one", [ROW | {"query": q} for q in "abcde"])
    path = write(tmp_path, "two", [ROW | {"choices": ["xy", "zz", "e"]}])
    for name, weighted in (("sized", "true"), ("equal", "false")):
        (tmp_path / f"{name}.yaml").write_text(
            f"group: {name}\ntask: [one, two]\naggregate_metric_list: [{{metric: acc, weight_by_size: {weighted}}}]\n")
    metrics, info, _ = tasks.evaluate(*loaded, ["sized"], task_path=path)
    right = accuracy.right(info["sized/acc"])
    assert right == accuracy.right(info["one/acc"]) + accuracy.right(info["two/acc"]) and len(right) == 6
    assert info["one/acc"]["group"] == info["two/acc"]["group"] == "sized" and info["sized/acc"]["group"] is None
    assert info["sized/acc"]["chance"] == pytest.approx((5 / 2 + 1 / 3) / 6)
    metrics, info, _ = tasks.evaluate(*loaded, ["equal"], task_path=path)
    assert metrics["equal/acc"] == (metrics["one/acc"] + metrics["two/acc"]) / 2
    assert (info["equal/acc"]["correct"] is None) == (metrics["equal/acc"] != pytest.approx(sum(right) / 6))


def test_zeroshot7_has_the_papers_mean(tmp_path, loaded):
    for i, name in enumerate(task_list.ZEROSHOT7):
        path = write(tmp_path, name, [ROW | {"gold": (i + j) % 2, "query": "e" * i} for j in range(i + 2)])
    metrics, info, _ = tasks.evaluate(*loaded, ["zeroshot7"], task_path=path)
    parts = [f"{name}/acc" for name in task_list.ZEROSHOT7]
    assert metrics["zeroshot7/acc"] == pytest.approx(sum(metrics[p] for p in parts) / 7)
    assert info["zeroshot7/acc"]["stderr"] == pytest.approx(sum(info[p]["stderr"] ** 2 for p in parts) ** 0.5 / 7)
    assert info["zeroshot7/acc"]["chance"] == 0.5 and info["zeroshot7/acc"]["samples"] == sum(range(2, 9))


def test_other_documents_are_another_run(tmp_path):
    digests = [task_list.digest(["one"], write(tmp_path / folder, "one", rows)) for folder, rows in
               (("a", [ROW]), ("b", [ROW]), ("c", [ROW | {"gold": 0}]))]
    digests.append(task_list.digest(["one"], write(tmp_path / "d", "one", [ROW], doc_to_text="{{query}}!")))
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_what_does_not_fit_the_window_is_warned_of_or_refused(tmp_path, loaded):
    path = write(tmp_path, "long", [ROW, ROW | {"query": "e" * tiny.POSITIONS}])
    [warning] = tasks.evaluate(*loaded, ["long"], task_path=path)[2]
    assert warning.startswith(f"--tasks long: 1 of 2 documents are longer than the model's {tiny.POSITIONS} positions")
    path = write(tmp_path, "longer", [ROW, ROW | {"choices": ["a", "e" * tiny.POSITIONS]}])
    with pytest.raises(ValueError, match=rf"--tasks longer: document 2 .* {tiny.POSITIONS + 1} tokens"):
        tasks.evaluate(*loaded, ["longer"], task_path=path)


GOOD = json.dumps(ROW)


@pytest.mark.parametrize("rows, words", [
    (f"{GOOD}\n\n{GOOD[:-3]}\n", "t.jsonl: line 3: not JSON"), (f"{GOOD}\n[1]\n", "t.jsonl: line 2: must be a JSON"),
    ("\n", "t.jsonl: holds no document"), ([ROW, {k: v for k, v in ROW.items() if k != "query"}], "document 2 .*query"),
    ([ROW, ROW | {"gold": 2}], "document 2: its answer 2 is none of its choices, which are 0 to 1"),
    ([ROW | {"gold": g} for g in ("ab", "ba")], "document 2: its answer 'ba' is none"),
    ([ROW, ROW | {"choices": []}], "document 2: its choices"),
    ([ROW, ROW | {"gold": [[1]]}], "document 2: its answer .* is none"),
    ([ROW | {"choices": 5}], "lm-eval cannot load them")])
def test_bad_documents(tmp_path, place, capsys, rows, words):
    path = write(tmp_path / "t", "t", rows)
    assert tiny.main(*tiny.flags(place, evaluate="none", tasks="t", task_path=path)) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: --tasks t: ") and re.search(words, err), err


def test_bad_input(tmp_path, place, capsys):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    path = write(tmp_path / "broken", "fine", [ROW])
    (tmp_path / "broken" / "bad.yaml").write_text("task: [")
    (tmp_path / "broken" / "away.yaml").write_text(YAML.format(file=tmp_path / "none.jsonl").replace("letters", "away"))
    for changed, words in (
            ({"tasks": "nothing", "task_path": place / "yaml"}, "--tasks nothing: no such task in --task-path"),
            ({"tasks": "letters", "task_path": place / "no"}, "--task-path"),
            ({"tasks": "letters", "task_path": tmp_path / "empty"}, "holds no task YAML"),
            ({"tasks": "bad", "task_path": path}, "which has away, fine; lm-eval cannot read bad.yaml"),
            ({"tasks": "away", "task_path": path}, "none.jsonl: cannot be read (No such file"),
            ({"tasks": "fine", "task_path": path, "task_limit": 0}, "--task-limit 0: must be at least 1")):
        assert tiny.main(*tiny.flags(place, evaluate="none", **changed)) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err


def test_without_the_hub_it_says_so_at_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(task_list, "hub_away", lambda: "no route")
    with pytest.raises(ValueError, match=r"--tasks boolq,rte.*no route.*--task-path"):
        task_list.prepare(["zeroshot7"])


def test_nothing_of_a_yaml_runs_before_the_user_trusts_it(place, tmp_path, capsys):
    """A template and a function that leave a mark: neither runs without --trust-task-code."""
    folder = tmp_path / "yaml"
    folder.mkdir()
    (tmp_path / "d.jsonl").write_text('{"q": "a", "c": ["x", "y"], "a": 0}\n')
    (folder / "utils.py").write_text(f"open({str(tmp_path / 'FUNCTION')!r}, 'w')\n\n\ndef f(doc):\n    return 0\n")
    touch = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "JINJA") + "') }}"
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        f"test_split: test\noutput_type: multiple_choice\ndoc_to_text: \"{touch}\"\ndoc_to_choice: '{{{{c}}}}'\n"
        "doc_to_target: !function utils.f\nmetric_list: [{metric: acc}]\n")
    argv = [a for a in tiny.flags(place, "--no-dense", evaluate="none", tasks="mine", task_path=folder)
            if a != "--trust-task-code"]
    assert tiny.main(*argv) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "--trust-task-code" in err and err.startswith(f"error: --task-path {folder}: ")
    assert not (tmp_path / "FUNCTION").exists() and not (tmp_path / "JINJA").exists()
