"""Training text: the mixture's weights, what is held out, windows that keep documents apart, text that is the same."""

import errno
import inspect
import json
import os

import families
import numpy as np
import pytest
import tiny
import torch

from oneshot.data import choose, pieces, training
from oneshot.data.sources import AS_IT_COMES, TextOptions
from oneshot.data.training import IGNORED, Windows, mixture, overlap, prepare
from oneshot.heal.options import HealOptions
from oneshot.pipeline import lesson
from oneshot.settings import RunConfig

LINES = TextOptions(per_line=True)


def write(path, letter, documents=200, length=30):
    """A file of documents of one letter each; the path."""
    path.write_text("\n".join(letter * length for _ in range(documents)))
    return path


def made(folder, spec, tokens=1000, held=64, seqlen=16, seed=0, **more):
    return prepare(spec, tiny.tokenizer(), folder, tokens=tokens, held=held, seqlen=seqlen, seed=seed,
                   **{"options": LINES, "progress": False} | more)


def test_the_tokens_come_from_each_text_by_its_weight(tmp_path):
    a, b = write(tmp_path / "a.txt", "a"), write(tmp_path / "b.txt", "b")
    text = made(tmp_path / "out", f"3*{a},1*{b}")
    known = tiny.tokenizer().convert_tokens_to_ids(["a", "b"])
    shares = [(np.asarray(text.train.ids) == token).mean() for token in known]
    assert shares[0] / sum(shares) == pytest.approx(0.75, abs=0.03)
    assert [s["share"] for s in text.about["sources"]] == [0.75, 0.25] and not text.about["warnings"]


def test_what_is_held_out_is_never_trained_on_even_in_later_passes(tmp_path):
    lines = ["".join(np.random.default_rng(k).choice(list("etaoin"), 20)) for k in range(30)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    text = made(tmp_path / "out", str(tmp_path / "a.txt"), tokens=3000, held=100)
    train, held = ({bytes(part.tobytes()) for part in np.split(w.ids, w.starts)[1:-1]} for w in (text.train, text.held))
    assert held and not train & held and len(train) > 20
    assert text.about["sources"][0]["passes"] > 3 and "lower --heal-tokens" in text.about["warnings"][0]


def test_where_a_text_lies_changes_nothing(tmp_path):
    words = ["".join(np.random.default_rng(k).choice(list("etaoin"), 20)) for k in range(30)]
    found = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{place}.txt").write_text("\n".join(words))
        found.append(made(tmp_path / place / "out", str(tmp_path / place / f"{place}.txt")))
    assert np.array_equal(found[0].train.ids, found[1].train.ids)
    assert np.array_equal(found[0].held.ids, found[1].held.ids)


def test_a_text_too_small_to_hold_some_out_is_refused_and_another_can_be_given(tmp_path):
    (tmp_path / "a.txt").write_text("eta oin")
    with pytest.raises(ValueError, match=r"^--heal-data .*a\.txt: holds too little"):
        made(tmp_path / "out", str(tmp_path / "a.txt"))
    text = made(tmp_path / "other", str(tmp_path / "a.txt"), held_out=str(write(tmp_path / "b.txt", "b")))
    assert len(text.held) == 4 and (np.asarray(text.train.ids) != tiny.tokenizer().convert_tokens_to_ids("b")).all()


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path):
    text = str(write(tmp_path / "a.txt", "a"))
    with pytest.raises(ValueError, match=r"^--heal-tokens 1000000000000000000: takes 7\.45e\+09 GiB in .*the disk has"):
        made(tmp_path / "out", text, tokens=10**18)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room")
def test_its_room_is_taken_before_it_is_written(tmp_path, monkeypatch):
    """A mapped file without it would end the process by SIGBUS."""
    def full(handle, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        made(tmp_path / "out", str(write(tmp_path / "a.txt", "a")))
    assert not list((tmp_path / "out").iterdir())


def test_it_is_read_once_and_again_when_anything_changes(tmp_path):
    a = write(tmp_path / "a.txt", "a")
    first = made(tmp_path / "out", str(a))
    when = (tmp_path / "out" / "train.npy").stat().st_mtime_ns
    assert made(tmp_path / "out", str(a)).about == first.about
    assert (tmp_path / "out" / "train.npy").stat().st_mtime_ns == when
    write(a, "e")
    assert made(tmp_path / "out", str(a)).about["sha256"] != first.about["sha256"]
    other = made(tmp_path / "out", str(a), seed=1)
    assert (tmp_path / "out" / "text.json").is_file() and len(other.train) == len(first.train)


def test_a_file_below_the_home_is_a_file_as_well(tmp_path, monkeypatch):
    """A shell leaves the ~ in 0.7*~/a.txt alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    first = made(tmp_path / "out", f"0.7*~/{write(tmp_path / 'a.txt', 'a').name}")
    write(tmp_path / "a.txt", "e")
    assert made(tmp_path / "out", "0.7*~/a.txt").about["sha256"] != first.about["sha256"]
    assert training.files_of("0.7*~/a.txt,c4", "b.txt") == [tmp_path / "a.txt"] and not training.files_of("a" * 5000)


def test_split_and_revision_of_the_calibration_set_are_not_those_of_others():
    given = {"pattern": "2:4", "calibration": "owner/name", "split": "train[:9]", "revision": "v2"}
    for heal, wanted in (("owner/name", ("train[:9]", "v2")), ("c4", (None, None))):
        cfg = RunConfig(**given, heal="full", heal_data=heal)
        options = choose.training_options(cfg, families.tiny("llama"), tiny.tokenizer())
        assert (options.split, options.revision) == wanted


def test_a_kill_while_it_is_written_leaves_no_text_that_counts(tmp_path, monkeypatch):
    a, real = write(tmp_path / "a.txt", "a"), training._write

    def dying(path, *args):
        real(path, *args)
        if path.name == "train":
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_write", dying)
        made(tmp_path / "out", str(a))
    assert not (tmp_path / "out" / "text.json").exists()
    assert made(tmp_path / "out", str(a)).about == made(tmp_path / "fresh", str(a)).about


def test_long_documents_are_parted_and_end_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 50)
    (tmp_path / "a.txt").write_text("eta oin " * 300)
    text = made(tmp_path / "out", str(tmp_path / "a.txt"), options=AS_IT_COMES, tokens=400, held=50)
    eos = tiny.tokenizer().eos_token_id
    assert (np.asarray(text.train.ids) == eos).sum() <= 1 and len(text.train.starts) >= 7


@pytest.mark.parametrize("mode, documents, windows", [("each", True, True), ("first", True, False),
                                                      ("none", False, False)])
def test_a_bos_token_begins_each_document_and_each_window_as_the_mode_says(tmp_path, mode, documents, windows):
    """Some models break down where one is missing at position 0, where both begin."""
    a, bos = write(tmp_path / "a.txt", "a"), tiny.tokenizer().bos_token_id
    text = made(tmp_path / "out", str(a), options=TextOptions(per_line=True, bos=mode))
    for part in (text.train, text.held):
        ids = np.asarray(part.ids)
        assert (ids[part.starts] == bos).all() == documents == (ids == bos).any()
        assert (ids[:: part.seqlen] == bos).all() == windows
        assert {int(ids[i]) for i in range(len(ids)) if i % part.seqlen and i not in part.starts}.isdisjoint({bos})


def test_a_file_in_the_home_folder_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "a")
    first, cfg = made(tmp_path / "out", "1*~/a.txt"), HealOptions(heal_data="1*~/a.txt", heal_held_out="~/a.txt")
    marks = lesson.mark(cfg, None)
    assert len(marks) == 2
    write(tmp_path / "a.txt", "e")
    assert made(tmp_path / "out", "1*~/a.txt").about["sha256"] != first.about["sha256"]
    assert not set(lesson.mark(cfg, None)) & set(marks)


def test_windows_number_positions_by_document_and_predict_no_first_token():
    windows = Windows(np.arange(10, 26, dtype=np.uint32), np.array([0, 3, 9]), 8)
    one, two = windows[0], windows[1]
    assert len(windows) == 2 and one["input_ids"].tolist() == list(range(10, 18))
    assert one["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4] and two["position_ids"].tolist() == [
        0, 0, 1, 2, 3, 4, 5, 6]
    assert one["labels"].tolist() == [IGNORED, 11, 12, IGNORED, 14, 15, 16, 17]
    assert two["labels"].tolist() == [18, IGNORED, 20, 21, 22, 23, 24, 25] and two["index"] == 1
    with pytest.raises(IndexError):
        windows[2]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3", "gpt2", "mixtral"])
def test_packed_documents_do_not_see_each_other(name):
    """Logits of a document behind another are those of the document alone."""
    model, T = families.tiny(name), families.T
    assert "position_ids" in inspect.signature(model.forward).parameters
    ids = np.random.default_rng(0).integers(3, families.VOCAB, T).astype(np.uint32)
    batch = Windows(ids, np.array([0, 10]), T)[0]
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"][None], position_ids=batch["position_ids"][None], use_cache=False
                       ).logits[0, 10:]
        alone = model(input_ids=batch["input_ids"][None, 10:]).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_overlap_is_the_share_of_runs_of_thirteen_tokens():
    gen = np.random.default_rng(0)
    train, other = gen.integers(0, 1000, 5000), gen.integers(0, 1000, (2, 112))
    assert overlap(train, other) == 0
    train[300:412] = other[1]
    assert overlap(train, other) == pytest.approx(0.5)
    assert overlap(train, other, chunk=350) == pytest.approx(0.5)  # also over the border of two chunks
    assert overlap(train[:5], other) == 0 and overlap(train, other[:, :5]) == 0


@pytest.mark.parametrize("text, want", [("c4", [(1.0, "c4")]), ("0.7*c4, .3*a.txt", [(0.7, "c4"), (0.3, "a.txt")]),
                                        ("2*owner/name", [(2.0, "owner/name")])])
def test_mixtures(text, want):
    assert mixture(text) == want


@pytest.mark.parametrize("text", ["", " , ", "0*c4", "c4,c4", "9" * 400 + "*c4"])
def test_mixtures_that_say_nothing(text):
    with pytest.raises(ValueError, match=r"^--heal-data"):
        mixture(text)


def test_unknown_texts_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^--heal-data nowhere\.txt"):
        made(tmp_path / "out", "nowhere.txt")
    with pytest.raises(ValueError, match=r"^--heal-held-out nowhere\.txt"):
        made(tmp_path / "out", str(write(tmp_path / "a.txt", "a")), held_out="nowhere.txt")
    assert not (tmp_path / "out" / "text.json").exists() or json.loads((tmp_path / "out" / "text.json").read_text())
