"""Training text is read from its beginning as far as needed: what lies behind changes nothing and costs nothing."""

import csv
import gzip
import io
import json
import math
import random
import tracemalloc

import datasets
import numpy as np
import pytest
import tiny
from characters import SEPARATE

from oneshot.data import files, pieces, training
from oneshot.data import hub as hub_module
from oneshot.data.json_list import elements
from oneshot.data.sources import AS_IT_COMES, TextOptions
from oneshot.data.training import prepare

LINES = TextOptions(per_line=True)
SUFFIXES = ["jsonl", "json", "list.json", "csv", "txt", "parquet", "jsonl.gz", "parquet.gz"]


def stories(n, seed=0, length=(0, 60)):
    """Random documents, some of them empty."""
    draw = random.Random(seed)
    return ["".join(draw.choices("etaoin shrdlu", k=draw.randint(*length))) for _ in range(n)]


def write(path, documents, behind=""):
    """The documents as a file of the kind that its name says, one a line of a .txt. behind: what follows as it is."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        datasets.Dataset.from_dict({"n": [1] * len(documents), "text": documents}).to_parquet(path, batch_size=50)
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["n", "text"], *([1, text] for text in documents)])
            file.write(behind)
    else:
        rows = [text if name.endswith(".txt") else json.dumps({"n": 1, "text": text}) for text in documents]
        path.write_text(f"[{','.join(rows)}{behind or ']'}" if name.endswith("list.json") else
                        "\n".join(rows) + (f"\n{behind}" if behind else ""))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    return path


def made(folder, spec, tokens=600, held=64, **more):
    return prepare(spec, tiny.tokenizer(), folder, tokens=tokens, held=held, seqlen=16, seed=3,
                   **{"options": LINES, "progress": False} | more)


def same(one, other):
    """Whether two texts have the same windows."""
    return all(np.array_equal(a, b) for name in ("train", "held") for a, b in (
        (getattr(one, name).ids, getattr(other, name).ids), (getattr(one, name).starts, getattr(other, name).starts)))


def plainly(documents, size, tokens, held, seed="3/0"):
    """(train, held): token ids as they must come of all these documents: naive, all in memory, one source."""
    tokenizer, draw = tiny.tokenizer(), random.Random(seed)
    cut = [(text[at : at + size], at + size >= len(text)) for text in documents
           for at in range(0, max(len(text), 1), size)]
    known = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * last if text else [] for text, last in cut]
    gone, found, waiting = set(), [], []
    for wanted, holding in ((held, True), (tokens, False)):
        ids = []
        while len(ids) < wanted:
            if not waiting:
                waiting = list(range(len(known)))
                draw.shuffle(waiting)
            if (i := waiting.pop(0)) in gone:
                continue
            gone |= {i} if holding else set()
            ids += known[i]
        found.append(ids[:wanted])
    return found[1], found[0]


def taken(documents, size, wanted):
    """So many of the documents as hold the tokens that are wanted, and of either part's last piece all."""
    total = longest = 0
    for number, text in enumerate(documents, 1):
        total, longest = total + len(text) + bool(text), max(longest, min(len(text) + 1, size + 1))
        if total >= wanted + 2 * (longest + 1):
            return documents[:number]
    return documents


@pytest.mark.parametrize("n", [12, 200])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_windows_are_those_of_the_documents_that_are_needed(tmp_path, suffix, n):
    """Of a short text all, again and again; of a long one its beginning: as an algorithm says that holds all of it."""
    documents = stories(n)
    text = made(tmp_path / "out", str(write(tmp_path / f"t.{suffix}", documents)))
    size = pieces.piece_size(n, sum(map(len, documents)))
    train, held = plainly(taken(documents, size, 608 + 64), size, 608, 64)
    assert np.asarray(text.train.ids).tolist() == train and np.asarray(text.held.ids).tolist() == held
    said = text.about["sources"][0]
    assert said["source"] == f"t.{suffix}, " + ("12 documents" if n == 12 else
                                                f"the first {len(taken(documents, size, 672))} documents")
    assert (said["passes"] > 1) == (n == 12) == bool(text.about["warnings"])


@pytest.mark.parametrize("suffix", ["jsonl", "json", "list.json", "csv", "txt", "jsonl.gz"])
def test_what_lies_behind_the_needed_part_is_never_looked_at(tmp_path, suffix, monkeypatch):
    documents = stories(300) + stories(2000, seed=1, length=(60, 60))
    whole = made(tmp_path / "whole", str(write(tmp_path / f"a.{suffix}", documents[:300])))
    broken = write(tmp_path / f"b.{suffix}", documents, behind="no,JSON,at all")
    seen, checked = [], files.columns.checked
    monkeypatch.setattr(files.columns, "checked", lambda *args: seen.append(args[1]) or checked(*args))
    assert same(made(tmp_path / "broken", str(broken)), whole)
    assert suffix == "txt" or 0 < max(seen) < 60, "records that were looked at"
    if suffix != "txt":
        with pytest.raises(ValueError, match=r"^--heal-data .*(JSON|fields)"):
            made(tmp_path / "all", str(broken), tokens=10**6)


def test_the_rows_of_a_parquet_behind_the_needed_part_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROWS", 20)
    seen, checked = [], files.columns.checked
    monkeypatch.setattr(files.columns, "checked", lambda *args: seen.append(args[1]) or checked(*args))
    path = write(tmp_path / "a.parquet", stories(5000))
    damaged = bytearray(path.read_bytes())
    at = len(damaged) // 2
    damaged[at : at + 2000] = bytes(2000)
    (tmp_path / "b.parquet").write_bytes(damaged)
    one, other = (made(tmp_path / name, str(tmp_path / f"{name}.parquet")) for name in "ab")
    assert same(one, other) and max(seen) < 60


@pytest.mark.parametrize("behind", [b"", b"e" * 10**6 + b"\xff"])
def test_one_long_document_is_read_in_parts(tmp_path, behind, monkeypatch):
    """A .txt is one document; also where a line end or a letter lies on the border of two parts."""
    monkeypatch.setattr(pieces, "PIECE", 50)
    monkeypatch.setattr(files, "BLOCK", 7)
    document = "\r\n".join(stories(120, length=(1, 60))) + "\r" + "é"
    path = tmp_path / "a.txt"
    path.write_bytes(document.encode() + behind)
    text = made(tmp_path / "out", str(path), options=AS_IT_COMES)
    document = document.replace("\r\n", "\n")
    needed = next(n for n in range(50, len(document), 50) if n >= 608 + 64 + 2 * 51)
    train, held = plainly([document[:needed] + "?"], 50, 608, 64)
    assert train == np.asarray(text.train.ids).tolist() and held == np.asarray(text.held.ids).tolist()
    assert text.about["sources"][0]["source"] == "a.txt, the first 1 documents"
    assert "".join(files.blocks(tmp_path / "a.txt")) == document if not behind else True


@pytest.mark.parametrize("suffix", ["jsonl", "list.json", "csv", "txt", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """Nor with the part of it that is read."""
    documents = stories(50, length=(3000, 3000)) * 30  # 4.5 MB
    path, options = write(tmp_path / f"a.{suffix}", documents), AS_IT_COMES
    made(tmp_path / "warm", str(path), options=options)
    for tokens in (2000, 100_000):
        tracemalloc.start()
        made(tmp_path / f"{tokens}", str(path), tokens=tokens, options=options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < sum(map(len, documents)) / 2, f"{tokens} tokens: {peak / 1e6:.1f} MB"


def test_nothing_of_the_pieces_is_left_behind(tmp_path):
    made(tmp_path / "out", str(write(tmp_path / "a.txt", stories(99))))
    (tmp_path / "out" / "pieces").mkdir()  # of a process that was killed
    (tmp_path / "out" / "pieces" / "x").touch()
    made(tmp_path / "out", str(write(tmp_path / "a.txt", stories(98))))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        ["held.npy", "held_starts.npy", "text.json", "train.npy", "train_starts.npy"])


def test_a_damaged_beginning_is_told_before_anything_is_pruned(tmp_path):
    for name, content, says in (("a.jsonl", '{"text": "eta"}\n{"text": 5}\n', "record 2 is of type int"),
                                ("a.txt", " \n ", "holds no text"), ("b.jsonl", "\n", "holds no text")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"^--heal-data .*{name}: {says}"):
            training.check(str(tmp_path / name), tiny.tokenizer(), AS_IT_COMES)
    training.check(f"{write(tmp_path / 'c.txt', ['eta'])},self", tiny.tokenizer(), AS_IT_COMES)


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
def test_a_json_list_comes_one_element_at_a_time(block, monkeypatch):
    monkeypatch.setattr("oneshot.data.json_list.BLOCK", block)
    for found in ([], [1], [12, -3.5e2, None, True], ["a]\"b,", {"a": [1, {"b": "c"}]}, [], "é😀"]):
        for text in (json.dumps(found), json.dumps(found, indent=2) + " \n"):
            assert list(elements("", io.StringIO(text[1:]))) == found


# ------------------------------------------------------------------------------------------------ from the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with `rows`; `asked` records what was asked of it, `seen` how many rows were taken."""
    class Hub:
        rows, features, asked, seen = [], None, [], []

    def load_dataset(*args, streaming=False, **kwargs):
        Hub.asked.append((args, kwargs, streaming))
        if not streaming:
            return datasets.Dataset.from_list(Hub.rows)

        def rows():
            for number, row in enumerate(Hub.rows):
                Hub.seen.append(number)
                yield row
        return datasets.IterableDataset.from_generator(rows, features=Hub.features)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_module, "hub_away", lambda: None)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    Hub.asked, Hub.seen = [], []
    return Hub


@pytest.mark.parametrize("typed", [True, False])
def test_a_hub_data_set_is_streamed_in_its_order(tmp_path, hub, typed):
    """The same windows as of a file with the same documents; only the rows that are needed are taken."""
    documents = [text or None for text in stories(3000)]
    hub.rows = [{"text": text, "url": "u"} for text in documents]
    hub.features = datasets.Features(text=datasets.Value("string"), url=datasets.Value("string")) if typed else None
    text = made(tmp_path / "hub", "owner/name", options=TextOptions(revision="v2", config="small"))
    assert hub.asked == [(("owner/name", "small"), {"split": "train", "revision": "v2", "cache_dir": None}, True)]
    assert max(hub.seen) < 100
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in hub.rows))
    assert same(text, made(tmp_path / "file", str(file)))
    number = text.about["sources"][0]["source"].split()[-2]
    assert text.about["sources"][0]["source"] == ("owner/name (owner/name, v2, small, split train, column text), the "
                                                  f"first {number} documents") and not text.about["warnings"]


def test_c4_is_streamed_from_all_its_files(tmp_path, hub):
    hub.rows = [{"text": text, "timestamp": "t", "url": "u"} for text in stories(200)]
    made(tmp_path / "out", "c4", options=SEPARATE)
    assert hub.asked == [(("allenai/c4", "en"), {"split": "train", "revision": None, "cache_dir": None}, True)]


def test_conversations_are_streamed(tmp_path, hub):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}.{{ m['content'] }}{% endfor %}"
    hub.rows = [{"messages": [{"role": "user", "content": text}]} for text in stories(200, length=(9, 9))]
    text = prepare("owner/chat", tokenizer, tmp_path / "out", tokens=160, held=32, seqlen=16, seed=0,
                   options=AS_IT_COMES, progress=False)
    assert "conversations" in text.about["sources"][0]["source"]
    assert set(np.diff(text.train.starts)) == {14}, "user. and nine letters"


def test_where_the_hub_is_away_the_cached_copy_is_taken_and_said(tmp_path, hub, monkeypatch):
    """Its windows are the same as far as it goes, so it does not matter which of both a run began with."""
    hub.rows = [{"text": text} for text in stories(3000)]
    there = made(tmp_path / "there", "owner/name")
    monkeypatch.setattr(hub_module, "hub_away", lambda: "nobody listens")
    away = made(tmp_path / "away", "owner/name")
    assert same(there, away) and [streams for *_, streams in hub.asked] == [True, False]
    assert away.about["warnings"] == [
        "--heal-data owner/name: the hub does not answer (nobody listens); used the cached copy, revision unchecked"]


@pytest.mark.parametrize("options, offline", [({"split": "train[:50%]"}, "0"), ({}, "1")])
def test_what_datasets_cannot_stream_is_read_from_its_cache(tmp_path, hub, monkeypatch, options, offline):
    """A part of a split; and anything where `datasets` has been told to ask nobody."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", offline)
    hub.rows = [{"text": text} for text in stories(200)]
    made(tmp_path / "out", "owner/name", options=TextOptions(**options))
    assert [streams for *_, streams in hub.asked] == [False]


@pytest.mark.parametrize("typed", [True, False])
def test_what_goes_wrong_on_the_way_is_one_line(tmp_path, hub, typed):
    class Broken:
        def __iter__(self):
            yield {"text": "eta oin " * 9}
            raise OSError("reset\nby peer")
    hub.features = datasets.Features(text=datasets.Value("string")) if typed else None
    hub.rows = Broken()
    with pytest.raises(ValueError, match=r"^--heal-data owner/name: cannot be read on \(OSError: reset by peer\); .*$"):
        made(tmp_path / "out", "owner/name")
    hub.rows = [{"a": "x", "b": "y"}]
    hub.features = datasets.Features(a=datasets.Value("string"), b=datasets.Value("string")) if typed else None
    with pytest.raises(ValueError, match=r"^--heal-data owner/name: which column .*--column: one of a, b$"):
        made(tmp_path / "out", "owner/name")


def test_each_text_of_a_mixture_gives_its_share_and_is_read_as_far(tmp_path, hub, monkeypatch):
    hub.rows = [{"text": text} for text in stories(3000, length=(50, 50))]
    path = write(tmp_path / "a.jsonl", stories(3000, seed=1, length=(50, 50)))
    seen, value = [], files.value
    monkeypatch.setattr(files, "value", lambda line, number: seen.append(number) or value(line, number))
    made(tmp_path / "out", f"3*owner/name,1*{path}", tokens=4000)
    for rows, share in ((max(hub.seen), 0.75), (max(seen), 0.25)):
        need = math.ceil((4000 + 64) * share / 51)
        assert need <= rows <= max(need + 4, pieces.PIECES)
