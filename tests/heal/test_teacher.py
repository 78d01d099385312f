"""Losses of healing on text against float64, and the teacher's cache: built once, continued, never another's."""

import errno
import os
import shutil

import pytest
import tiny
import torch
from families import VOCAB
from healing_on_text import Killed, argv, families_text, healed, lesson, pruned, windows
from tiny import place, plain_pages  # noqa: F401

from oneshot.heal.text import losses, teacher
from oneshot.heal.text.student import Lesson, Student


def reference_kl(logits, dense, labels, temperature):
    """In float64, position by position."""
    found = []
    for b, t in (labels[:, 1:] != -100).nonzero().tolist():
        p, q = ((x[b, t].double() / temperature).softmax(-1) for x in (dense, logits))
        found.append((p * (p / q).log()).sum())
    return temperature**2 * torch.stack(found).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_its_formula_and_all_tokens_of_a_top_k_are_all_tokens(temperature):
    logits, dense = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    labels = torch.randint(0, 9, (2, 5)).index_put((torch.tensor([0, 1]), torch.tensor([3, 1])), torch.tensor(-100))
    want = reference_kl(logits, dense, labels, temperature)
    torch.testing.assert_close(losses.kl(logits, dense, labels, temperature).double(), want, rtol=1e-5, atol=1e-6)
    top = losses.TopK.of(dense, 9, temperature)
    torch.testing.assert_close(losses.kl(logits, top, labels, temperature).double(), want, rtol=1e-5, atol=1e-6)


def test_top_k_counts_all_other_tokens_as_one():
    logits, dense, labels = torch.randn(1, 2, 6), torch.randn(1, 2, 6), torch.zeros(1, 2, dtype=torch.long)
    p, q = dense[0, 0].double().softmax(-1), logits[0, 0].double().softmax(-1)
    best = p.topk(2).indices
    rest = [1 - x[best].sum() for x in (p, q)]
    want = (p[best] * (p[best] / q[best]).log()).sum() + rest[0] * (rest[0] / rest[1]).log()
    torch.testing.assert_close(losses.kl(logits, losses.TopK.of(dense, 2), labels).double(), want, rtol=1e-5, atol=1e-6)


def test_hidden_is_its_formula_and_refuses_another_number_of_blocks():
    ours, dense = [tuple(torch.randn(2, 3, 4) for _ in range(3)) for _ in range(2)]
    want = torch.stack([((h - d) ** 2).sum(-1) / (d ** 2).sum(-1) for h, d in zip(ours[1:], dense[1:], strict=True)])
    torch.testing.assert_close(losses.hidden(ours, dense), want.mean())
    with pytest.raises(ValueError, match="--heal-loss hidden"):
        losses.hidden(ours[:-1], dense)


def test_every_loss_alone_helps_its_own_measure(tmp_path):
    for name in ("next,kl", "hidden", "next", "kl,hidden"):
        _, said = healed("full", tmp_path / name, heal_loss=name, train=windows(40, ids=families_text(40)),
                         held=windows(8, ids=families_text(8)))
        assert said["held_out_after"] < said["held_out_before"], name


@pytest.mark.parametrize("k, temperature", [(VOCAB, 1.0), (5, 1.0), (1, 2.0)])
def test_a_cache_is_the_teacher_within_its_top_k(k, temperature, tmp_path):
    """Up to float16: the loss in training, its gradient, and the held-out loss."""
    live = lesson(tmp_path / "live", heal_top_k=k, heal_temperature=temperature)
    cached = {part: teacher.cache(tmp_path / part, lambda: live.teacher, w, {"part": part}, k=k, progress=False,
                                  temperature=temperature) for part, w in (("train", live.text.train),
                                                                           ("held", live.text.held))}
    model, said = pruned(), []
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    for way in (live.teacher, cached):
        student = Student(model, {}, Lesson(live.text, way, tmp_path, live.options, live.device), torch.float32)
        batch = {k: v[None] for k, v in live.text.train[3].items()}
        loss = student(**batch)["loss"]
        with torch.no_grad():
            held = student(**{k: v[None] for k, v in live.text.held[3].items()})["loss"]
        said.append((loss.item(), held.item(), *torch.autograd.grad(loss, weight)[0].flatten().tolist()))
    torch.testing.assert_close(*map(torch.tensor, said), rtol=5e-3, atol=1e-5)


def test_a_cache_is_built_once_continues_and_is_not_another_models(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "EVERY", 16)
    live, calls = lesson(tmp_path / "live"), []

    def build(key="a", stop=None):
        def once():
            calls.append(key)
            real = live.teacher.__class__.__call__

            def limited(self, *args):
                calls.append("window")
                if stop and calls.count("window") > stop:
                    raise Killed
                return real(self, *args)
            return type("Limited", (), {"model": live.teacher.model, "device": live.device,
                                        "__call__": lambda self, *args: limited(live.teacher, *args)})()
        return teacher.cache(tmp_path / "cache", once, windows(40, 1), {"of": key}, k=4, temperature=1.0,
                             progress=False)
    with pytest.raises(Killed):
        build(stop=35)
    calls.clear()
    whole = build()
    assert calls.count("window") == 40 - 2 * 16
    calls.clear()
    assert build().ids[39].tolist() == whole.ids[39].tolist() and not calls
    with pytest.raises(ValueError, match=r"--heal-cache .*another"):
        build("b")


@pytest.mark.usefixtures("plain_pages")
def test_a_cache_of_another_held_out_text_is_not_used(place, tmp_path, capfd):  # noqa: F811
    """Also where the text to train on is the same: by the held-out loss the best state is kept."""
    given = {"heal_tokens": "160", "heal_cache": tmp_path / "cache"}
    texts = [tiny.save_text(tmp_path / f"{seed}.txt", seed) for seed in (3, 4)]
    assert tiny.main(*argv(place, tmp_path / "first", heal_held_out=texts[0], **given)) == 0
    assert tiny.main(*argv(place, tmp_path / "same", heal_held_out=texts[0], **given)) == 0
    assert tiny.main(*argv(place, tmp_path / "other", heal_held_out=texts[1], **given)) == 2
    assert f"--heal-cache {tmp_path / 'cache' / 'held'}: holds the predictions" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["cache.json", "log_p.npy", "ids.npy"])
def test_a_cache_that_was_cut_short_is_named(name, tmp_path):
    live = lesson(tmp_path / "live")
    given = (tmp_path / "cache", lambda: live.teacher, windows(4), {})
    teacher.cache(*given, k=4, temperature=1.0, progress=False)
    file = tmp_path / "cache" / name
    for size in (file.stat().st_size // 2, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"^--heal-cache .* is damaged"):
            teacher.cache(*given, k=4, temperature=1.0, progress=False)


@pytest.mark.parametrize("name", ["log_p.npy", "ids.npy"])
def test_one_flipped_bit_of_a_cache_is_noticed(name, tmp_path):
    live = lesson(tmp_path / "live")
    given = (tmp_path / "cache", lambda: live.teacher, windows(4), {})
    teacher.cache(*given, k=4, temperature=1.0, progress=False)
    file = tmp_path / "cache" / name
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"^--heal-cache .* is damaged"):
        teacher.cache(*given, k=4, temperature=1.0, progress=False)


def test_two_processes_do_not_fill_one_cache(tmp_path):
    live = lesson(tmp_path / "live")
    given = (tmp_path / "cache", lambda: live.teacher, windows(4), {})
    with teacher.locked(tmp_path / "cache"), pytest.raises(ValueError, match=r"^--heal-cache .* another process"):
        teacher.cache(*given, k=4, temperature=1.0, progress=False)
    teacher.cache(*given, k=4, temperature=1.0, progress=False)
    with teacher.locked(tmp_path / "cache"):  # to read a whole one needs no lock
        teacher.cache(*given, k=4, temperature=1.0, progress=False)


@pytest.mark.parametrize("name", teacher.ARRAYS)
def test_arrays_that_are_not_a_caches_are_left_alone(name, tmp_path):
    file = tmp_path / "cache" / name
    file.parent.mkdir()
    file.write_text("precious")
    with pytest.raises(ValueError, match=f"^--heal-cache .*: holds {name}, which is not of a cache"):
        teacher.cache(tmp_path / "cache", None, windows(4), {}, k=4, temperature=1.0)
    assert file.read_text() == "precious" and [f.name for f in file.parent.iterdir()] == [name]


def test_a_disk_that_is_too_small_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"^--heal-cache .* GiB"):
        teacher.cache(tmp_path / "cache", None, windows(40), {}, k=4, temperature=1.0)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room")
def test_a_disk_that_fills_up_is_one_line_and_the_same_call_goes_on(tmp_path, monkeypatch):
    """Its room is taken before anything is computed: a mapped file without it would end the process by SIGBUS."""
    live, real = lesson(tmp_path / "live"), os.posix_fallocate
    given = (tmp_path / "cache", lambda: live.teacher, windows(4), {})

    def full(handle, offset, size):
        if size > 16 * 4 * 4 * 4:  # the second of the two arrays
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, offset, size)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ValueError, match=r"^--heal-cache .*cannot be written .No space left"):
            teacher.cache(*given, k=4, temperature=1.0, progress=False)
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {"cache.json", "log_p.npy"}
    found = teacher.cache(*given, k=4, temperature=1.0, progress=False)
    files = [(tmp_path / "cache" / f"{name}.npy").stat() for name in ("log_p", "ids")]
    assert len(found.ids) == 4 and all(file.st_blocks * 512 >= file.st_size for file in files)
