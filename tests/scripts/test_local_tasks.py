"""scripts/reproduce/local_tasks.py: its YAMLs ask what they say, against log-probabilities taken by hand."""

import json

import local_tasks
import pytest
import tiny
import torch

from oneshot import models
from oneshot.measure import tasks

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
QUERIES = ["the cat", "a dog sat", "we go", "on it", "he is", "no one", "old men", "an ant"]
WORDS = [("abe", "ib"), ("so", "sad"), ("en", "to"), ("u", "ten"), ("on", "no"), ("ha", "oh"), ("e", "st"), ("t", "aa")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tiny.make(tmp_path_factory.mktemp("local"))
    rows = {
        "tasks/foundry_piqa.jsonl": [{"query": f"{q}\n", "choices": list(w), "gold": 0}
                                     for q, w in zip(QUERIES, WORDS, strict=True)],
        "tasks/foundry_copa.jsonl": [{"query": q, "choices": [*w, "x" * 40], "gold": 1}
                                     for q, w in zip(QUERIES, WORDS, strict=True)],
        "tasks/foundry_winogrande.jsonl": [{"context_options": [f"{q} {x}" for x in w], "continuation": "was it.",
                                            "gold": 1} for q, w in zip(QUERIES, WORDS, strict=True)],
        "lambada_test.jsonl": [{"text": f"{q} {a}"} for q in QUERIES[:2] for a in tiny.ALPHABET[:26]]}
    for name, lines in rows.items():
        file = place / "shared" / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, lines)))
    return place


@pytest.fixture(scope="module")
def measured(place):
    """({metric: value}, function(context, continuation) -> (log-probability, whether greedy))."""
    assert local_tasks.main(["--shared", str(place / "shared"), "--out", str(place / "yaml")]) == 0
    model, tokenizer = models.load(place / "model")
    names = ["foundry_piqa", "foundry_copa", "foundry_winogrande", "lambada"]
    metrics, _, _ = tasks.evaluate(model, tokenizer, names, task_path=str(place / "yaml"))

    @torch.no_grad()
    def scored(context, continuation):
        n, ids = (len(tokenizer(context).input_ids), tokenizer(context + continuation, return_tensors="pt").input_ids)
        log_p = model(ids).logits[0].double().log_softmax(-1)[n - 1 : -1]
        return log_p.gather(1, ids[0, n:, None]).sum().item(), bool((log_p.argmax(-1) == ids[0, n:]).all())

    return metrics, scored


def share(found, gold):
    return sum(max(range(len(x)), key=x.__getitem__) == gold for x in found) / len(found)


def test_queries_and_choices(measured):
    metrics, scored = measured
    asked = [[scored(f"{q}\nAnswer:", f" {x}")[0] for x in w] for q, w in zip(QUERIES, WORDS, strict=True)]
    assert metrics["foundry_piqa/acc"] == share(asked, 0)
    asked = [[scored(q, f" {x}")[0] for x in (*w, "x" * 40)] for q, w in zip(QUERIES, WORDS, strict=True)]
    assert metrics["foundry_copa/acc"] == share(asked, 1)
    lengths = [[len(x) for x in (*w, "x" * 40)] for w in WORDS]
    by_length = [[p / n for p, n in zip(*both, strict=True)] for both in zip(asked, lengths, strict=True)]
    assert metrics["foundry_copa/acc_norm"] == share(by_length, 1) and by_length != asked


def test_winogrande_scores_one_continuation_in_two_contexts(measured):
    metrics, scored = measured
    asked = [[scored(f"{q} {x}", " was it.")[0] for x in w] for q, w in zip(QUERIES, WORDS, strict=True)]
    assert metrics["foundry_winogrande/acc"] == share(asked, 1)


def test_lambada_asks_for_the_last_word(measured):
    metrics, scored = measured
    right = [scored(q, f" {a}")[1] for q in QUERIES[:2] for a in tiny.ALPHABET[:26]]
    assert metrics["lambada/acc"] == sum(right) / len(right)


def test_long_choices_are_left_out_and_counted(place, capsys):
    out = place / "short"
    assert local_tasks.main(["--shared", str(place / "shared"), "--out", str(out), "--longest", "39"]) == 0
    err = capsys.readouterr().err
    assert err == "foundry_copa.jsonl: 8 of 8 documents left out, a choice is longer than 39 characters\n"
    assert sorted(f.name for f in out.glob("*.jsonl")) == ["foundry_copa.jsonl"]


def test_without_data_it_says_so(tmp_path, capsys):
    assert local_tasks.main(["--shared", str(tmp_path)]) == 2
    assert "holds neither" in capsys.readouterr().err
