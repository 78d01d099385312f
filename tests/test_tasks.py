"""lm-eval tasks on a local file: our numbers are lm-eval's, standard errors kept, bad input refused in one line."""

import json

import pytest
import tiny

from oneshot import models
from oneshot.evaluate import tasks

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


def test_bad_input(place, capsys):
    for changed, words in (({"tasks": "nothing", "task_path": place / "yaml"}, "--tasks nothing: lm-eval knows no"),
                           ({"tasks": "letters", "task_path": place / "no"}, "--task-path")):
        assert tiny.main(*tiny.flags(place, evaluate="none", **changed)) == 2
        assert words in capsys.readouterr().err


def test_without_the_hub_it_says_so_at_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(tasks.data, "hub_away", lambda: "no route")
    with pytest.raises(ValueError, match=r"--tasks boolq,rte.*no route.*--task-path"):
        tasks.prepare(["zeroshot7"])
