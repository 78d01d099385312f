"""What a model says: greedy, through the chat template where there is one, shown run by run."""

import json

import pytest
import tiny
from plainly import written_plainly
from tiny import place, plain_pages  # noqa: F401

from oneshot import models
from oneshot.measure import say
from oneshot.report import compare

TEMPLATE = ("{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}a {% endif %}")


@pytest.mark.usefixtures("plain_pages")
def test_each_run_answers_every_prompt(place, tmp_path, capfd):  # noqa: F811
    argv = tiny.flags(place, "--say", "the sea", "--say", " rain  ", evaluate="none", results=tmp_path / "runs")
    assert tiny.main(*argv) == 0
    told, records = capfd.readouterr().out, tiny.records(tmp_path / "runs").values()
    model, tokenizer = models.load(place / "model")
    plainly = [{"prompt": p, "answer": written_plainly(model, tokenizer, p, say.NEW_TOKENS)}
               for p in ("the sea", "rain")]
    assert [r["say"] for r in records if r["settings"]["method"] == "dense"] == [plainly]
    assert len(records) == 2 and all([e["prompt"] for e in r["say"]] == ["the sea", "rain"] for r in records)
    assert told.index("> the sea") < told.index("\ndense ") < told.index("\nwanda 2:4 ") < told.index("> rain")
    page = tmp_path / "page.html"
    assert compare.main([str(tmp_path / "runs"), "--page", str(page), "--format", "markdown"]) == 0
    assert "```\n> the sea\n" in capfd.readouterr().out
    assert "What the models say" in page.read_text() and "<h3>the sea</h3>" in page.read_text()


def test_a_chat_template_is_used(place):  # noqa: F811
    model, tokenizer = models.load(place / "model")
    tokenizer.chat_template = TEMPLATE
    [(prompt, ids)] = say.encoded("the sea", model, tokenizer)
    assert prompt == "the sea" and tokenizer.decode(ids).replace(" ", "") == "<s>userthesea\na"
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("text", "words"), [
    (" ", "--say: is empty"), ("a" * 60, "64 positions"), ("\x00", "--say"), ("half \ud83d", "--say")])
def test_refused(place, tmp_path, capfd, text, words):  # noqa: F811
    assert tiny.main(*tiny.flags(place, f"--say={text}", results=tmp_path / "runs")) == 2
    [told] = tiny.said(capfd.readouterr().err)
    assert words in told and not (tmp_path / "runs").exists()


def test_other_prompts_are_another_run(place, tmp_path):  # noqa: F811
    for text in ("a", "b", "a"):
        assert tiny.main(*tiny.flags(place, "--no-dense", "--say", text, results=tmp_path / "runs")) == 0
    found = [json.loads(f.read_text())["say"][0]["prompt"] for f in (tmp_path / "runs").glob("*.json")]
    assert sorted(found) == ["a", "b"]
