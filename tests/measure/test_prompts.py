"""A suite of prompts: greedy continuations as computed plainly, shares as counted, bad lines refused by number."""

import json

import pytest
import tiny
import torch
from plainly import written_plainly
from tiny import place, plain_pages  # noqa: F401

from oneshot import models
from oneshot.measure import prompts


def save(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_shares_are_counted_on_plain_continuations(place, tmp_path):  # noqa: F811
    model, tokenizer = models.load(place / "model")
    texts = {p: written_plainly(model, tokenizer, p, prompts.NEW_TOKENS) for p in ("the sea ", "rain", "hot sand")}
    assert all(len(t.strip()) > 8 for t in texts.values())
    first, second, _ = texts.values()
    rows = [{"prompt": "the sea ", "expected": first.strip()[:4]}, {"prompt": "rain", "expected": second.strip()[3:8]},
            {"prompt": "hot sand", "expected": "zzzzzz"}]
    values, how, answers = prompts.evaluate(model, tokenizer, save(tmp_path / "suite.jsonl", *rows))
    assert [a["answer"] for a in answers] == list(texts.values())
    begins = 1 + second.strip().startswith(second.strip()[3:8])
    assert values == {"suite/starts_with": begins / 3, "suite/contains": 2 / 3}
    assert how["suite/contains"] == {"samples": 3, "new_tokens": prompts.NEW_TOKENS}
    assert [a["line"] for a in answers] == [1, 2, 3] and answers[0]["right"] and not answers[2]["right"]


def test_choices_as_computed_plainly(place, tmp_path):  # noqa: F811
    model, tokenizer = models.load(place / "model")

    def plainly(prompt, choice):
        ids = tokenizer(f"{prompt} {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            return -model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)).loss * (
                len(choice) + 1)

    rows = [{"prompt": p, "expected": e, "choices": ["tea", "rainy day", "on"]}
            for p in ("the", "a hot", "she said") for e in ("tea", "on")]
    values, how, answers = prompts.evaluate(model, tokenizer, save(tmp_path / "c.jsonl", *rows))
    want = [max(r["choices"], key=lambda c: plainly(r["prompt"], c)) for r in rows]
    assert [a["answer"] for a in answers] == want
    assert values == {"c/chosen": sum(w == r["expected"] for w, r in zip(want, rows, strict=True)) / 6}
    assert how == {"c/chosen": {"samples": 6}}


@pytest.mark.usefixtures("plain_pages")
def test_a_run_records_dense_and_pruned(place, tmp_path, capfd):  # noqa: F811
    suite = save(tmp_path / "mine.jsonl", {"prompt": "the", "expected": "a"}, "",
                 {"prompt": "on", "expected": "b", "choices": ["b", "c"]})
    argv = tiny.flags(place, prompts=suite, evaluate="none", results=tmp_path / "runs")
    assert tiny.main(*argv) == 0
    before = tiny.records(tmp_path / "runs")
    for record in before.values():
        assert set(record["metrics"]) == {"mine/starts_with", "mine/contains", "mine/chosen"}
        assert [a["line"] for a in record["prompts"]] == [1, 3]
    assert "mine chosen" in capfd.readouterr().out
    save(suite, {"prompt": "the", "expected": "c"})
    assert tiny.main(*argv) == 0, "another suite under the same name is another run"
    assert {r["run_id"] for r in tiny.records(tmp_path / "runs").values()} and \
        len(list((tmp_path / "runs").glob("model-*.json"))) == 4


@pytest.mark.parametrize(("line", "words"), [
    ("{", "not JSON"), ("[1]", "object"), ('{"prompt": "a"}', '"expected" must'),
    ('{"prompt": 1, "expected": "b"}', '"prompt" must'), ('{"prompt": "a", "expected": " "}', '"expected" must'),
    ('{"prompt": "a", "expected": "b", "choice": []}', '"choice" is not known'),
    ('{"prompt": "a", "expected": "b", "choices": "ab"}', '"choices" must be a list'),
    ('{"prompt": "a", "expected": "b", "choices": ["c"]}', 'one of the "choices"'),
    (json.dumps({"prompt": "a" * 60, "expected": "b"}), "64 positions")])
def test_bad_lines(place, tmp_path, capfd, line, words):  # noqa: F811
    suite = save(tmp_path / "s.jsonl", {"prompt": "a", "expected": "b"}, line)
    assert tiny.main(*tiny.flags(place, prompts=suite, results=tmp_path / "runs")) == 2
    [told] = tiny.said(capfd.readouterr().err)
    assert "--prompts" in told and "line 2" in told and words in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (b"", "no prompt"), (b"\xff\xfe", "read")])
def test_bad_files(tmp_path, content, words):
    if content is not None:
        (tmp_path / "s.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"^--prompts .*{words}"):
        prompts.read(tmp_path / "s.jsonl")
