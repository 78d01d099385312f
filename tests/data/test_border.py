"""What comes from outside as text: packed files, conversations, and all that cannot be used, in one clear line each."""

import gzip
import json
import os
import random
import sys
import threading
import types
import zlib

import pytest
import torch
from characters import STORIES, assert_refused, calibrate, character_tokenizer, write
from families import tiny as family

from oneshot import data
from oneshot.data import TextOptions, choose, embedding, files
from oneshot.settings import RunConfig


@pytest.fixture
def tokenizer():
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------ packed files

@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "txt"])
@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_packed_files_give_the_same_text(tokenizer, tmp_path, suffix, packing):
    plain, packed = tmp_path / f"t.{suffix}", tmp_path / f"t.{suffix}.{packing}"
    plain.write_text("\n\n".join(STORIES)) if suffix == "txt" else write(plain, STORIES, "story")
    if packing == "gz":
        packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    else:
        zstandard = pytest.importorskip("zstandard")
        packed.write_bytes(zstandard.compress(plain.read_bytes()))
    one, other = (data.evaluation(tokenizer, str(file), seqlen=10) for file in (plain, packed))
    assert one.sha256 == other.sha256 and f"t.{suffix}.{packing} (" in other.source


def test_c4s_own_shards(tokenizer, tmp_path):
    """Named .json.gz, one object a line; also after gunzip."""
    lines = "".join(json.dumps({"text": text, "url": "u", "timestamp": "t"}) + "\n" for text in STORIES)
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (tmp_path / "c4-train.00000.json").write_text(lines)
    found = {data.evaluation(tokenizer, str(file), seqlen=10).sha256 for file in tmp_path.iterdir()}
    assert found == {data.evaluation(tokenizer, str(write(tmp_path / "t.json", STORIES)), seqlen=10).sha256}
    cfg = RunConfig(pattern="0.5", evaluate=f"{tmp_path}/c4-train.00000.json.gz")
    assert list(choose.named(cfg)) == ["c4-train.00000"]


def test_zst_without_the_package_says_what_to_install(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / "t.jsonl.zst").write_bytes(b"x")
    for flag in ("--calibration", "--evaluate"):
        assert_refused(tokenizer, flag, tmp_path / "t.jsonl.zst", ["pip install zstandard"])


def standing_in(monkeypatch):
    """zlib in the place of zstandard: its objects have the same methods, so that this is tested without the package."""
    module = types.ModuleType("zstandard")
    module.ZstdDecompressor = lambda: types.SimpleNamespace(decompressobj=lambda: zlib.decompressobj(31))
    monkeypatch.setitem(sys.modules, "zstandard", module)
    return gzip.compress


@pytest.mark.parametrize("package", ["zlib", "zstandard"])
@pytest.mark.parametrize("lines", [3, 40_000])
def test_zst_files_are_read_whole_or_not_at_all(tokenizer, tmp_path, monkeypatch, package, lines):
    """Several frames, as parallel compressors write them, are one file; one that is cut off anywhere is refused."""
    monkeypatch.setitem(sys.modules, "compression", None)
    compress = standing_in(monkeypatch) if package == "zlib" else pytest.importorskip("zstandard").compress
    draw = random.Random(0)
    text = "".join(json.dumps({"text": f"{draw.random()}"}) + "\n" for _ in range(lines)).encode()
    whole, cut = compress(text) + compress(text), tmp_path / "cut.jsonl.zst"
    (tmp_path / "t.jsonl.zst").write_bytes(whole)
    assert len(files.read(tmp_path / "t.jsonl.zst", TextOptions()).documents) == 2 * lines
    for end in (3, len(whole) // 4, len(whole) // 2 + 30, len(whole) - 1):
        cut.write_bytes(whole[:end])
        assert_refused(tokenizer, "--calibration", cut, ["cannot read cut.jsonl.zst", "ends"])
    cut.write_bytes(whole + b"more")
    assert_refused(tokenizer, "--calibration", cut, ["cannot read cut.jsonl.zst"])


# ------------------------------------------------------------------------------------------- what cannot be used

HALF = r'{"text": "hello \ud83d"}'
DEEP = "[" * 100_000
WORDS = json.dumps("a" * 50)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("deep.json", DEEP, ["nested too deeply"]),
    ("deep.jsonl", f"{WORDS}\n{DEEP}\n", ["line 2", "nested too deeply"]),
    ("deep.json.gz", gzip.compress(DEEP.encode(), mtime=0), ["nested too deeply"]),
    ("closed.jsonl", DEEP + "]" * 100_000, ["line 1", "nested too deeply"]),
    ("digits.jsonl", "9" * 5000, ["line 1", "not JSON"]),
    ("half.jsonl", f'{{"text": "whole"}}\n{HALF}\n', ["record 2", "surrogate"]),
    ("half.json", f"[{HALF}]", ["record 1", "surrogate"]),
    ("half.jsonl", r'{"messages": [{"role": "user", "content": "\udc00"}]}', ["record 1", "surrogate"]),
    ("list.jsonl", '{"text": ["a", "b"]}\n', ["--column", "text"]),
    ("list.jsonl", '{"text": "a"}\n{"text": {"a": 1}}\n', ["record 2", "dict"]),
    ("utf16.txt", "some text".encode("utf-16"), ["utf16.txt", "UTF-8"]),
    ("latin.jsonl", '{"text": "é"}'.encode("latin-1"), ["latin.jsonl", "UTF-8"]),
    ("latin.csv", "text\né\n".encode("latin-1"), ["latin.csv", "UTF-8"]),
    ("cut.txt.gz", gzip.compress(b"a" * 10_000, mtime=0)[:-20], ["cut.txt.gz", "read"]),
    ("no.jsonl.gz", b"no gzip at all", ["no.jsonl.gz", "read"]),
    ("empty.txt.gz", b"", ["no text"]),
    ("empty.csv", "", ["no text"]),
    ("header.csv", "text,other\n", ["no text"]),
    ("empty.parquet", b"", ["empty.parquet"]),
    ("file.tar.gz", b"x", [".txt, .jsonl, .json, .parquet, .csv", ".gz"]),
])
@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
def test_bad_files(tokenizer, tmp_path, flag, name, content, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(tokenizer, flag, path, says)


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv", "parquet", "txt.gz"])
def test_what_is_no_regular_file_is_not_read(tokenizer, tmp_path, suffix):
    """A pipe would block for ever, a device never end."""
    pipe, folder, device = (tmp_path / f"{kind}.{suffix}" for kind in ("pipe", "folder", "device"))
    os.mkfifo(pipe)
    folder.mkdir()
    device.symlink_to("/dev/zero")
    for path, words in ((pipe, "pipe or a device"), (folder, "folder"), (device, "pipe or a device")):
        done = threading.Event()
        threading.Thread(target=lambda path=path, words=words, done=done: (
            assert_refused(tokenizer, "--calibration", path, [words]), done.set()), daemon=True).start()
        assert done.wait(20), path


@pytest.mark.parametrize("spec", ["a" * 5000, "a" * 5000 + ".txt", "~nobody-of-that-name/a.txt", "", " ", "a\nb"])
def test_odd_names(tokenizer, spec):
    with pytest.raises(ValueError, match=r"^--calibration "):
        calibrate(tokenizer, spec)


def test_unreadable(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("text")

    def denied(*args):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("oneshot.data.files.open_plain", denied)  # root may read everything
    assert_refused(tokenizer, "--calibration", tmp_path / "t.txt", ["Permission denied", "check the path"])


def test_text_of_any_content(tokenizer, tmp_path):
    """NUL characters, one line of a megabyte, whole emojis written as pairs of escapes."""
    (tmp_path / "nul.txt").write_text("a\0b" * 20)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "ab " * 300_000}))
    (tmp_path / "emoji.jsonl").write_text(r'{"text": "a whole one: \ud83d\ude00 and more text"}')
    for name in ("nul.txt", "long.jsonl", "emoji.jsonl"):
        assert data.evaluation(tokenizer, str(tmp_path / name), seqlen=10, max_windows=3).ids.shape[1] == 10


def test_a_tokenizer_that_cannot_take_the_text(tmp_path):
    """A vocabulary without a token for the unknown raises a bare Exception."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    (tmp_path / "t.txt").write_text("some text")
    assert_refused(PreTrainedTokenizerFast(tokenizer_object=core), "--evaluate", tmp_path / "t.txt", ["tokenizer"])


# ------------------------------------------------------------------------------- tokens beyond the embedding

def test_padding_beyond_the_embedding_is_put_inside(tmp_path):
    """The Alpaca recipe: [PAD] added to the tokenizer, the embedding as it was. What is masked may be any token."""
    model, (vocab, short) = family("llama"), (64, ["a" * 9, "b" * 5])
    small = character_tokenizer(bos_token="<s>", eos_token="</s>")
    small.add_special_tokens({"pad_token": "[PAD]"})
    assert small.pad_token_id > vocab
    (tmp_path / "t.json").write_text(json.dumps(short))
    options = TextOptions(documents="separate")
    tokens = data.evaluation(small, str(tmp_path / "t.json"), seqlen=12, options=options)
    assert (tokens.ids[~tokens.mask] == small.pad_token_id).all()
    fitted = embedding.fitting(tokens, model, small, "--evaluate t.json")
    assert (fitted.ids[~fitted.mask] == small.eos_token_id).all() and fitted.sha256 != tokens.sha256
    assert torch.equal(fitted.ids[fitted.mask], tokens.ids[tokens.mask]) and torch.equal(fitted.mask, tokens.mask)
    inside = data.evaluation(character_tokenizer(bos_token="<s>", eos_token="</s>"), str(tmp_path / "t.json"),
                             seqlen=12, options=options)
    assert embedding.fitting(inside, model, small, "") is inside, "what fits stays as it is"


def test_text_beyond_the_embedding_is_refused_by_name(tokenizer):
    model = family("llama")
    tokenizer.add_tokens(["<|im_start|>"])
    beyond = len(tokenizer) - 1
    tokens = data.given(torch.tensor([[1, 2, beyond], [1, 2, 3]]))
    with pytest.raises(ValueError, match=rf"^--evaluate x: token {beyond} \('<\|im_start\|>'\) is beyond the 64"):
        embedding.fitting(tokens, model, tokenizer, "--evaluate x")
    for bad in ([[1, 2, 64]], [[-1, 2, 3]]):
        with pytest.raises(ValueError, match=r"^calibration: token (64|-1) .*64 rows"):
            choose.given(torch.tensor(bad), model)
    assert choose.given(torch.tensor([[0, 63]]), model).ids.shape == (1, 2)


def test_text_sampled_from_the_model_starts_within_the_embedding():
    """A BOS token that was added without a row of its own cannot start a text; the next candidate does."""
    model = family("llama")
    tokenizer = character_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"bos_token": "[BOS]"})
    tokens = calibrate(tokenizer, "self", nsamples=2, seqlen=5, model=model)
    assert tokens.ids[:, 0].tolist() == [tokenizer.eos_token_id] * 2 and int(tokens.ids.max()) < 64
