"""BOS tokens: where each mode puts them, that they are never doubled, and that perplexity is the plain model's."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from characters import calibrate, character_tokenizer
from families import tiny as family
from tiny import plain_pages  # noqa: F401

from oneshot import data
from oneshot.data import TextOptions, choose
from oneshot.data.encode import MODES
from oneshot.measure.perplexity import perplexity
from oneshot.settings import RunConfig

TEXT = "once upon a time there was a dog and it ran over the hill to the sea "
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
            "{% endif %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}")
SEQLEN, BOS = 8, 0


@pytest.fixture(params=[True, False], ids=["adds", "does not add"])
def tokenizer(request):
    """One token a letter; by default with a BOS token, or without."""
    return character_tokenizer(bos=request.param, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def stories(tmp_path):
    """Three documents, one shorter than a window."""
    file = tmp_path / "stories.json"
    file.write_text(json.dumps([TEXT, "a dog", TEXT[::-1]]))
    return str(file)


def by_hand(tokenizer, mode, documents):
    """Windows as the mode is described, from letters: [(ids, how many of them are text)]."""
    adds = tokenizer("")["input_ids"] == [BOS]
    texts = json.loads(Path(documents[1]).read_text())
    found = []
    for piece in texts if documents[0] == "separate" else ["\n\n".join(texts)]:
        ids = tokenizer.convert_tokens_to_ids(list(piece))
        if mode == "each":
            parts = [[BOS, *ids[i : i + SEQLEN - 1]] for i in range(0, len(ids), SEQLEN - 1)]
        else:
            ids = [BOS] * (mode == "first" or (mode == "auto" and adds)) + ids
            parts = [ids[i : i + SEQLEN] for i in range(0, len(ids), SEQLEN)]
        found += parts[:1] if documents[0] == "separate" else [part for part in parts if len(part) == SEQLEN]
    return found


@pytest.mark.parametrize("documents", ["join", "separate"])
@pytest.mark.parametrize("mode", MODES)
def test_windows_and_their_perplexity(tokenizer, stories, mode, documents):
    """The windows are those made by hand; their perplexity is that of transformers' own loss, window by window."""
    options = TextOptions(documents=documents, bos=mode)
    tokens = data.evaluation(tokenizer, stories, seqlen=SEQLEN, options=options)
    want = by_hand(tokenizer, mode, (documents, stories))
    masks = tokens.mask if tokens.mask is not None else torch.ones_like(tokens.ids, dtype=torch.bool)
    assert [ids[mask].tolist() for ids, mask in zip(tokens.ids, masks, strict=True)] == want
    assert ("<s>" in tokens.source) == (mode != "auto")

    model, loss, count = family("llama"), 0.0, 0
    ids = tokens.ids % 64  # of as many tokens as the model knows
    for window, row in zip(want, ids, strict=True):
        plain = row[: len(window)][None]
        loss += model(plain, labels=plain).loss.item() * (len(window) - 1)
        count += len(window) - 1
    value, n = perplexity(model, ids, tokens.mask, batch_size=3)
    assert n == count and value == pytest.approx(math.exp(loss / count), rel=1e-5)


def test_calibration_windows_are_pieces_of_the_same(tokenizer, stories):
    for mode in MODES:
        want = by_hand(tokenizer, mode, ("join", stories))
        tokens = calibrate(tokenizer, stories, nsamples=99, seqlen=SEQLEN, options=TextOptions(bos=mode))
        assert sorted(tokens.ids.tolist()) == sorted(want)


def test_a_bos_token_in_the_text_itself_is_not_doubled(tokenizer, tmp_path):
    tokenizer.add_tokens(["<s>"], special_tokens=True)
    (tmp_path / "t.json").write_text(json.dumps(["<s>abcdefg", "<s>hijklmn"]))
    for mode, count in (("each", 1), ("first", 1), ("none", 0)):
        options = TextOptions(documents="separate", bos=mode)
        tokens = data.evaluation(tokenizer, str(tmp_path / "t.json"), seqlen=7, options=options)
        assert [row.tolist().count(BOS) for row in tokens.ids] == [count] * 2


@pytest.mark.parametrize("bos", MODES)
@pytest.mark.parametrize("documents", ["join", "separate"])
def test_conversations(tokenizer, tmp_path, bos, documents):
    """As the template writes them, special tokens and all, and none beside; the modes as for text."""
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<s>"], special_tokens=True)
    rows = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
            [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"id": "x", "messages": row}) + "\n" for row in rows))
    said = ["[user]hello~[assistant]good day~", "[user]who~[assistant]me~"]
    letters = [tokenizer.convert_tokens_to_ids(list(text)) for text in said]
    plain = tokenizer.apply_chat_template(rows[0], tokenize=True, return_dict=False)
    assert plain == [BOS, *letters[0]], "what transformers itself makes of it"
    start = [] if bos in ("none", "each") else [BOS]
    if documents == "separate":
        want = [([BOS] * (bos != "none") + ids)[:SEQLEN] for ids in letters]
    else:
        whole = start + letters[0] + ([BOS] if bos == "auto" else []) + letters[1]
        length = SEQLEN - (bos == "each")
        want = [[BOS] * (bos == "each") + whole[i : i + length] for i in range(0, len(whole) - length + 1, length)]
    tokens = data.evaluation(tokenizer, str(file), seqlen=SEQLEN, options=TextOptions(documents=documents, bos=bos))
    assert tokens.ids.tolist() == want
    assert "2 conversations" in tokens.source and tokens.ids[:, 1:].eq(BOS).sum() <= (bos == "auto")


def test_gemma_has_one_in_every_window_and_others_are_as_before(tokenizer):
    cfg = RunConfig(pattern="0.5")
    for name, mode in (("gemma2", "each"), ("gemma3", "each"), ("gemma3n", "each"), ("gemma4", "each"),
                       ("llama", "auto"), ("mistral", "auto"), ("qwen3", "auto")):
        assert choose.text_options(cfg, family(name), tokenizer).bos == mode, name
    assert choose.text_options(RunConfig(pattern="0.5", bos="none"), family("gemma2"), tokenizer).bos == "none"
    without = character_tokenizer(bos=False, eos_token="</s>")
    assert choose.text_options(cfg, family("gemma2"), without).bos == "auto"


def test_without_a_bos_token_it_is_refused(stories):
    without = character_tokenizer(bos=False, eos_token="</s>")
    for mode in ("each", "first"):
        with pytest.raises(ValueError, match=rf"^--evaluate .*: --bos {mode}: the tokenizer has no BOS token"):
            data.evaluation(without, stories, seqlen=SEQLEN, options=TextOptions(bos=mode))
    ids = [data.evaluation(without, stories, seqlen=SEQLEN, options=TextOptions(bos=mode)).sha256
           for mode in ("auto", "none")]
    assert ids[0] == ids[1]


@pytest.mark.usefixtures("plain_pages")
def test_a_run_records_it_and_only_where_it_is_given(tmp_path):
    """The identity of a run without the flag is what it was before there was one."""
    place = tiny.make(tmp_path / "place")
    for mode in ("auto", "each"):
        assert tiny.main(*tiny.flags(place, "--no-dense", "--bos", mode, results=tmp_path / mode)) == 0
    [plain], [each] = (tiny.records(tmp_path / mode).values() for mode in ("auto", "each"))
    assert "bos" not in plain["settings"] and each["settings"]["bos"] == "each"
    assert plain["run_id"] != each["run_id"]
    for text in (each["data"]["calibration"], each["data"]["evaluation"]["evaluation"]):
        assert text["source"].count("each after <s>") == 1
    assert "<s>" not in plain["data"]["calibration"]["source"]
