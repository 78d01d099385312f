"""Text from files: every kind gives the same text, what cannot be used is one clear line."""

import sys

import pytest
from characters import SEPARATE, STORIES, assert_refused, calibrate, character_tokenizer, spell, write

from oneshot import data
from oneshot.data import TextOptions, sources


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column, options", [("text", {}), ("story", {}), ("story", {"column": "story"})])
def test_every_kind_of_file_gives_the_same_text(tokenizer, tmp_path, suffix, column, options):
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(STORIES), encoding="utf-8")
    path = write(tmp_path / f"file.{suffix}", STORIES, column)
    tokens = data.evaluation(tokenizer, str(path), seqlen=10, options=TextOptions(**options))
    assert tokens.sha256 == data.evaluation(tokenizer, str(plain), seqlen=10).sha256
    assert f"file.{suffix}" in tokens.source and str(tmp_path) not in tokens.source


def test_jsonl_of_strings_nulls_and_windows_line_ends(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"abcd"\r\nnull\r\n"efgh"\r\n')
    assert spell(tokenizer, data.evaluation(tokenizer, str(path), seqlen=11).ids[0]) == "<s>abcd\n\nefgh"


def test_text_file_is_one_document_or_one_a_line(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"abc\r\nde\r\n")
    whole = data.evaluation(tokenizer, str(path), seqlen=10, options=SEPARATE)
    lines = data.evaluation(
        tokenizer, str(path), seqlen=10, options=TextOptions(documents="separate", per_line=True)
    )
    assert [spell(tokenizer, row[mask]) for row, mask in zip(whole.ids, whole.mask, strict=True)] == [
        "<s>abc\nde\n"
    ]
    assert [spell(tokenizer, row[mask]) for row, mask in zip(lines.ids, lines.mask, strict=True)] == [
        "<s>abc",
        "<s>de",
    ]


def test_builtin_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO", tmp_path)
    for name in ("calibration", "evaluation_sampled", "evaluation_prose"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 3)

    def evaluate(spec):
        return spell(tokenizer, data.evaluation(tokenizer, spec, seqlen=10).ids.flatten())

    assert spell(tokenizer, calibrate(tokenizer, "builtin", nsamples=1, seqlen=37).ids[0]).count("calib") == 3
    assert "sampled" in evaluate("builtin:sampled") and "prose" not in evaluate("builtin:sampled")
    assert "prose" in evaluate("builtin:prose") and "sampled" not in evaluate("builtin:prose")
    assert "prose" in evaluate("builtin") and "sampled" in evaluate("builtin")


@pytest.mark.parametrize(
    "name, content, options, says",
    [
        ("short.txt", "abc", {}, ["4 tokens", "window of 10", "--seqlen 4"]),
        ("empty.txt", " \n", {}, ["no text"]),
        ("empty.json", "[]", {}, ["no text"]),
        ("empty.jsonl", "\n", {}, ["no text"]),
        ("binary.txt", b"\xff\xfe\x00", {}, ["binary.txt", "UTF-8"]),
        ("bad.jsonl", '"a"\n\n{"text": \n', {}, ["line 3", "JSON"]),
        ("bad.json", '["a", ', {}, ["record 2", "JSON", "ends too early"]),
        ("comma.json", '["a" "b"]', {}, ["record 1", "JSON", "comma"]),
        ("more.json", '["a"]\n["b"]', {}, ["JSON", "more follows", ".jsonl"]),
        ("value.json", '["a", b]', {}, ["record 2", "JSON"]),
        ("lines.json", '"a"\nb', {}, ["line 2", "JSON"]),
        ("object.json", '{"text": "a"}', {}, ["dict", "list"]),
        ("numbers.json", "[1, 2]", {}, ["record 1", "int"]),
        ("column.jsonl", '{"a": "x", "b": "y"}', {"column": "c"}, ["'c'", "--column", "a, b"]),
        ("which.jsonl", '{"a": "x", "b": "y"}', {}, ["--column", "a, b"]),
        ("none.jsonl", '{"a": 1, "b": 2}', {}, ["--column", "a, b"]),
        ("missing.jsonl", '{"text": "x"}\n{"b": "y"}', {}, ["record 2", "'text'"]),
        ("type.jsonl", '{"text": "x"}\n{"text": 5}', {}, ["record 2", "int", "--column"]),
        ("which.csv", "a,b\nx,y\n", {}, ["--column", "a, b"]),
        ("fields.csv", "text,b\nx,y\nx,y,z\n", {}, ["record 2", "quote"]),
        ("bad.parquet", "no parquet", {}, ["bad.parquet", "parquet", "check"]),
        ("notes.md", "abc", {}, [".txt, .jsonl, .json, .parquet, .csv"]),
        ("letters.txt", "a" * 99, {"documents": "apart"}, ["--documents", "apart", "join or separate"]),
    ],
)
@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
def test_bad_files_give_one_clear_line(tokenizer, tmp_path, flag, name, content, options, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(tokenizer, flag, path, says, **options)


@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
def test_unknown_names_and_files(tokenizer, tmp_path, flag):
    assert_refused(
        tokenizer, flag, "wikitext3", ["unknown", "wikitext2", "c4", "ptb", "builtin", "owner/name"]
    )
    for suffix in ("txt", "parquet"):
        assert_refused(tokenizer, flag, tmp_path / f"absent.{suffix}", [f"absent.{suffix}", "No such file"])
    assert_refused(tokenizer, flag, tmp_path, [".txt"])  # a folder
    table = write(tmp_path / "table.parquet", ["x"], "a")
    assert_refused(tokenizer, flag, table, ["'c'", "--column", "n, a"], column="c")


def test_what_is_for_one_flag_only(tokenizer):
    assert_refused(tokenizer, "--evaluate", "self", ["unknown"])
    assert_refused(tokenizer, "--calibration", "builtin:prose", ["unknown", "builtin"])
    assert_refused(tokenizer, "--calibration", "self", ["model"])


def test_missing_packages_are_named(tokenizer, tmp_path, monkeypatch):
    table = write(tmp_path / "table.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(tokenizer, "--calibration", "c4", ["pip install datasets", "`self`"])
    assert_refused(tokenizer, "--evaluate", table, ["pip install pyarrow"])
