"""Windows of tokens: distinct, in order, padded and masked; the seed decides, nothing else."""

import json
import random
import string
from pathlib import Path

import pytest
import torch
import transformers
from characters import SEPARATE, STORIES, assert_refused, calibrate, character_tokenizer, spell, write

from oneshot import data
from oneshot.data import TextOptions, encode, windows
from oneshot.data.text import Text

MODEL = str(Path(__file__).resolve().parent / "stories260k")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def text(tmp_path):
    """A file of 1999 random letters: no window of ten comes twice."""
    letters = random.Random(7).choices(string.ascii_letters, k=1999)
    path = tmp_path / "letters.txt"
    path.write_text("".join(letters))
    return path


# ---------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_is_cut_off_only_where_there_is_more(tokenizer, chat):
    """Of a text of exactly as many characters as are taken, nothing is lost, and so no warning says so."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    parts = ["abcde", "fghijklm"]
    documents = [[{"role": "user", "content": part}] for part in parts] if chat else ["".join(parts)]
    encoder = encode.Encoder(tokenizer, "none", chat)
    found = {limit: encoder.together(Text(documents, "x", chat=chat), limit) for limit in (13, 5, None)}
    assert [(spell(tokenizer, ids), cut) for ids, cut in found.values()] == [
        ("abcdefghijklm", False), ("abcde", True), ("abcdefghijklm", False)]


def test_calibration_windows_are_distinct_pieces_of_the_stream(tokenizer, text):
    tokens = calibrate(tokenizer, text, nsamples=50)
    stream = ["<s>", *text.read_text()]
    pieces = [stream[i : i + 10] for i in range(0, 2000, 10)]
    found = [pieces.index(tokenizer.convert_ids_to_tokens(row)) for row in tokens.ids]
    assert tokens.ids.shape == (50, 10) and tokens.ids.dtype == torch.int64 and tokens.mask is None
    assert len(set(found)) == 50
    assert tokens.n_tokens == 500 and tokens.warnings == ()


def test_seed_decides(tokenizer, text):
    first, again, other = (calibrate(tokenizer, text, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256 and first.source == again.source
    assert not torch.equal(first.ids, other.ids) and first.sha256 != other.sha256


def test_global_random_state_decides_nothing_and_is_left_alone(tokenizer, text):
    random.seed(3)
    first = calibrate(tokenizer, text)
    state = random.getstate()
    second = calibrate(tokenizer, text)
    assert first.sha256 == second.sha256 and random.getstate() == state


def test_all_windows_and_a_warning_when_there_are_too_few(tokenizer, text):
    tokens = calibrate(tokenizer, text, nsamples=500)
    assert len(tokens.ids) == 200 == len(set(map(tuple, tokens.ids.tolist())))
    [warning] = tokens.warnings
    assert "200" in warning and "500" in warning


def test_calibration_reads_no_more_text_than_it_may(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", ["a" * 90, "b" * 90, "c" * 90, "d" * 90])
    monkeypatch.setattr(windows, "MAX_CHARACTERS", 149)  # of "a..a", blank line, "b..b" without its end
    tokens = calibrate(tokenizer, path, nsamples=5, seqlen=50, seed=0)
    assert len(tokens.ids) == 5 and tokens.warnings == ()  # as much as may be needed is read in any case
    tokens = calibrate(tokenizer, path, nsamples=3, seqlen=3, seed=0)
    assert "3 random of 50 windows" in tokens.source and "149" in tokens.warnings[0]


def test_evaluation_is_the_stream_in_order_without_its_tail(tokenizer, text):
    tokens = data.evaluation(tokenizer, str(text), seqlen=30)
    assert tokens.ids.shape == (66, 30)  # 2000 tokens
    assert spell(tokenizer, tokens.ids.flatten()) == "<s>" + text.read_text()[:1979]
    first = data.evaluation(tokenizer, str(text), seqlen=30, max_windows=4)
    assert torch.equal(first.ids, tokens.ids[:4])


def test_join_glues_documents_with_a_blank_line_and_one_bos(tokenizer, tmp_path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(STORIES))
    tokens = data.evaluation(tokenizer, str(path), seqlen=10)
    joined = "<s>" + "\n\n".join(STORIES)
    assert joined.startswith(spell(tokenizer, tokens.ids.flatten()))


def test_separate_pads_cuts_and_masks(tokenizer, tmp_path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(STORIES))
    tokens = data.evaluation(tokenizer, str(path), seqlen=10, options=SEPARATE)
    kept = [story for story in STORIES if story]  # the empty one has but its bos
    assert [spell(tokenizer, row[mask]) for row, mask in zip(tokens.ids, tokens.mask, strict=True)] == [
        ("<s>" + story)[: len("<s>") + 9] for story in kept
    ]
    assert (tokens.ids[~tokens.mask] == tokenizer.eos_token_id).all()  # there is no pad token
    assert not (tokens.mask[:, 1:] & ~tokens.mask[:, :-1]).any()  # padding is on the right
    assert tokens.n_tokens == sum(min(len(story) + 1, 10) for story in kept)
    assert "3 of them cut" in tokens.source


def test_separate_needs_no_mask_when_nothing_is_padded(tokenizer, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("a line of more than ten\nanother of more than ten")
    options = TextOptions(documents="separate", per_line=True)
    assert data.evaluation(tokenizer, str(path), seqlen=10, options=options).mask is None


def test_separate_draws_documents_once_each(tokenizer, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i}\n" for i in range(30)))
    options = TextOptions(documents="separate", per_line=True)
    seen = set()
    for seed in (0, 1):
        tokens = calibrate(tokenizer, path, nsamples=20, seqlen=12, seed=seed, options=options)
        lines = [spell(tokenizer, row[m]) for row, m in zip(tokens.ids, tokens.mask, strict=True)]
        assert len(set(lines)) == 20 and all(line.startswith("<s>line ") for line in lines)
        seen.add(tuple(lines))
    assert len(seen) == 2
    assert "30" in calibrate(tokenizer, path, nsamples=31, seqlen=12, options=options).warnings[0]


@pytest.mark.parametrize("special, pad", [({"pad_token": "<unk>", "eos_token": "</s>"}, 2), ({}, 0)])
def test_pad_token(special, pad, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abc")
    tokens = data.evaluation(character_tokenizer(bos=False, **special), str(path), seqlen=5, options=SEPARATE)
    assert tokens.ids[0, 3:].tolist() == [pad, pad]


def test_hash_tells_ids_mask_and_shape_apart():
    ids = torch.arange(12).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 3] = False
    variants = [(ids, None), (ids + 1, None), (ids.view(4, 3), None), (ids, mask), (ids, ~mask)]
    assert len({windows._tokens(*variant, "").sha256 for variant in variants}) == 5


def test_token_warning_counts_real_tokens_only():
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :5] = True
    tokens = windows._tokens(torch.zeros(2, 8, dtype=torch.int64), mask, "")
    assert data.token_warning(tokens, 10) is None
    warning = data.token_warning(tokens, 11)
    assert "10" in warning and "11" in warning and "--nsamples" in warning


def test_no_warning_about_the_models_length(tokenizer, text, capfd):
    calibrate(tokenizer, text)
    assert "longer" not in capfd.readouterr().err


def test_sizes(tokenizer, text):
    assert_refused(tokenizer, "--evaluate", text, ["--seqlen"], seqlen=1)
    with pytest.raises(ValueError, match="--nsamples is 0"):
        calibrate(tokenizer, text, nsamples=0)


def test_separate_without_a_usable_document(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('"a"')
    no_bos = character_tokenizer(bos=False)
    with pytest.raises(ValueError, match="two tokens"):
        data.evaluation(no_bos, str(path), seqlen=10, options=SEPARATE)


# -------------------------------------------------------------------------------------- real models and texts


def test_tinystories_with_a_real_tokenizer(shared, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    stories = json.loads(shared("data", "tinystories_1000.json").read_text())[:200]
    path = str(tmp_path / "stories.json")
    Path(path).write_text(json.dumps(stories))
    tokens = calibrate(tokenizer, path, nsamples=16, seqlen=256)
    stream = tokenizer("\n\n".join(stories))["input_ids"]
    stream = torch.tensor(stream[: len(stream) // 256 * 256]).view(-1, 256)
    assert all((row == stream).all(1).sum() == 1 for row in tokens.ids)
    assert torch.equal(data.evaluation(tokenizer, path, seqlen=256).ids, stream)


def test_craftgpt_dialogues_each_in_a_window(shared):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(shared("models", "craftgpt-5m")))
    path = str(shared("data", "craftgpt_selfgen.txt"))
    options = TextOptions(documents="separate", per_line=True)
    tokens = calibrate(tokenizer, path, nsamples=32, seqlen=64, options=options)
    lines = {tuple(tokenizer(line)["input_ids"][:64]) for line in Path(path).read_text().split("\n")}
    mask = torch.ones_like(tokens.ids, dtype=torch.bool) if tokens.mask is None else tokens.mask
    assert all(tuple(row[m].tolist()) in lines for row, m in zip(tokens.ids, mask, strict=True))
