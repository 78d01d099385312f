"""Conversations and instructions go through the model's chat template, in any form in which they come."""

import json

import datasets
import pytest
from characters import assert_refused, calibrate, character_tokenizer, spell

from oneshot import data
from oneshot.data import TextOptions
from oneshot.data import hub as hub_module

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day to you"}]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}"
SAID = "[user]hi~[assistant]good day to you~"


@pytest.fixture
def tokenizer():
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def talking(tokenizer):
    """A tokenizer with a chat template that refuses system messages, as Gemma's does."""
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + TEMPLATE
    return tokenizer


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["messages", "dialogue"])
def test_conversations_go_through_the_chat_template(talking, tmp_path, suffix, column):
    path, rows = tmp_path / f"chat.{suffix}", [{"id": "a", "prompt": "hi", column: CHAT}] * 2
    if suffix == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    options = TextOptions(documents="separate", column=None if column == "messages" else column)
    tokens = data.evaluation(talking, str(path), seqlen=50, options=options)
    assert [spell(talking, row[mask]) for row, mask in zip(tokens.ids, tokens.mask, strict=True)] == [SAID] * 2
    assert f"chat.{suffix} (2 conversations)" in tokens.source
    joined = calibrate(talking, path, nsamples=9, seqlen=len(SAID), options=TextOptions(column=options.column))
    assert spell(talking, joined.ids.flatten()) == SAID * 2


def test_conversations_on_the_hub(talking, monkeypatch):
    rows = datasets.Dataset.from_list([{"prompt": "a", "prompt_id": "b", "messages": CHAT}] * 3)
    monkeypatch.setattr(hub_module, "hub_away", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    tokens = calibrate(talking, "owner/chat", nsamples=3, seqlen=len(SAID))
    assert spell(talking, tokens.ids.flatten()) == SAID * 3 and "3 conversations" in tokens.source


def test_content_in_parts_and_what_a_table_has_filled_up(talking, tmp_path):
    """Nulls of a table are no entries; content may come in parts, if all are text."""
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    rows = [{"messages": [{"role": "user", "content": parts, "tool_calls": None}]},
            {"messages": [{"role": "user", "content": "x", "tool_calls": None}]}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    tokens = data.evaluation(talking, str(tmp_path / "chat.json"), seqlen=20, options=TextOptions(documents="separate"))
    assert spell(talking, tokens.ids[0][tokens.mask[0]]) == "[user]hello~"


@pytest.mark.parametrize(("row", "says"), [
    ({"messages": [{"role": "system", "content": "be kind"}, *CHAT]}, ["template refuses", "System role not"]),
    ({"messages": [{"role": "user", "content": 5}]}, ["record 1", "int"]),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, ["record 1", "more than text"]),
    ({"messages": [{"role": "user", "content": " "}]}, ["no text"]),
    ({"messages": CHAT, "n": 1, "text": 3}, ["record 1", "int", "--column"]),
    ({"conversations": [{"from": "human", "value": "hi"}]}, ["conversations", "from and value", "role", "content"]),
    ({"instruction": "a", "input": "b", "output": "c"}, ["instruction, input, output", "messages", "--column", "role"]),
    ({"instruction": "a", "context": "", "response": "c", "category": "d"}, ["messages", "instruction"]),
    ({"prompt": "a", "completion": "b"}, ["prompt, completion", "messages", "--column"]),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, ["prompt, completion", "messages"]),
    ({"prompt": "a", "chosen": CHAT, "rejected": CHAT, "score": "b"}, ["chosen", "messages"]),
])
@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
def test_instructions_and_conversations_of_other_forms(talking, tmp_path, flag, row, says):
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert_refused(talking, flag, tmp_path / "t.jsonl", says)
    path = tmp_path / "t.parquet"
    if "input" in row or "completion" in row or "conversations" in row:
        datasets.Dataset.from_list([row]).to_parquet(path)
        assert_refused(talking, flag, path, says)


def test_a_second_record_that_is_no_conversation(talking, tmp_path):
    for bad in ("text", [], [{"role": "user"}], None):
        (tmp_path / "t.json").write_text(json.dumps([{"messages": CHAT}, {"messages": bad}]))
        if bad is None:
            assert "1 conversations" in calibrate(talking, tmp_path / "t.json", nsamples=1, seqlen=9).source
        else:
            assert_refused(talking, "--calibration", tmp_path / "t.json", ["record 2 is not a conversation"])


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_the_column_is_chosen_by_what_later_records_hold_where_the_first_are_empty(talking, tmp_path, suffix):
    """Not an identifier that stands beside an empty conversation, or beside a text that is missing."""
    def written(*rows):
        lines = [json.dumps(row) for row in rows]
        (tmp_path / f"t.{suffix}").write_text("[" + ",".join(lines) + "]" if suffix == "json" else "\n".join(lines))
        return tmp_path / f"t.{suffix}"
    full = {"id": "b", "messages": CHAT}
    path = written({"id": "a", "messages": None}, {"id": "a", "messages": None}, full, full)
    assert "2 conversations" in calibrate(talking, path, nsamples=1, seqlen=9).source
    path = written({"id": "a", "messages": []}, full)
    assert_refused(talking, "--calibration", path, ["record 1 is not a conversation"])
    path = written({"n": 1, "story": None, "tags": []}, {"n": 1, "story": "once upon a time", "tags": []})
    assert "(1 documents)" in calibrate(talking, path, nsamples=1, seqlen=9).source
    path = written({"id": "a", "story": None}, {"id": "b", "story": "once upon a time"})
    assert_refused(talking, "--calibration", path, ["which column", "id, story"])


@pytest.mark.parametrize("empty", [[], None])
def test_the_type_of_a_column_on_the_hub_says_what_it_holds(talking, monkeypatch, empty):
    rows = datasets.Dataset.from_list([{"id": "b", "messages": CHAT}, {"id": "a", "messages": empty}]).select([1, 0])
    monkeypatch.setattr(hub_module, "hub_away", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    if empty is None:
        tokens = calibrate(talking, "owner/chat", nsamples=1, seqlen=len(SAID))
        assert spell(talking, tokens.ids.flatten()) == SAID and "1 conversations" in tokens.source
    else:
        assert_refused(talking, "--calibration", "owner/chat", ["record 1 is not a conversation"])


def test_one_column_of_instructions_may_be_named(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"instruction": "a" * 9, "input": "", "output": "b" * 30}))
    tokens = data.evaluation(tokenizer, str(tmp_path / "t.jsonl"), seqlen=10, options=TextOptions(column="output"))
    assert spell(tokenizer, tokens.ids[0]) == "<s>" + "b" * 9
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "a", "output": "b", "text": "c" * 30}))
    assert spell(tokenizer, data.evaluation(tokenizer, str(tmp_path / "a.jsonl"), seqlen=3).ids[1]) == "ccc"


def test_without_a_chat_template(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": CHAT}))
    for flag in ("--calibration", "--evaluate"):
        assert_refused(tokenizer, flag, tmp_path / "t.jsonl", ["no chat template"])


def test_typos_change_what_is_said_and_not_the_template(talking, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "something " * 40}]}] * 2))
    options = TextOptions(documents="separate")
    plain, changed = (data.evaluation(talking, str(tmp_path / "t.json"), seqlen=500, options=options, perturbation=kind)
                      for kind in (None, "typos"))
    assert plain.sha256 != changed.sha256
    assert all(spell(talking, row[mask]).startswith("[user]") for row, mask in zip(changed.ids, changed.mask,
                                                                                    strict=True))
