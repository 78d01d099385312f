"""Which windows are held out: the same for all that heals, in batches of their own, seen by the solvers."""

import math

import families
import jobs
import pytest
import tiny
import torch
from families import VOCAB, T
from healing import heal_pruned, tokens
from tiny import plain_pages  # noqa: F401

from oneshot import calibrate, models
from oneshot.heal import distil
from oneshot.heal.train import held_out_windows, windows_per_step
from oneshot.pipeline import api


@pytest.mark.parametrize("n, size", [(128, 8), (16, 8), (8, 8), (2, 8), (11, 1), (37, 5)])
def test_a_tenth_of_the_windows_is_held_out_in_batches_of_their_own(n, size):
    held = held_out_windows(n, 16, 0)
    assert len(set(held)) == math.ceil(n / 10) and held == held_out_windows(n, 16, 0)
    parts = calibrate.batches(n, size, held)
    assert sorted(torch.cat([part for part, _ in parts]).tolist()) == list(range(n))
    for kind in (False, True):
        sizes = [len(part) for part, apart in parts if apart == kind]
        assert {w in held for part, apart in parts if apart == kind for w in part.tolist()} == {kind}
        assert 1 <= max(sizes) <= size and max(sizes) - min(sizes) <= 1
    if n > 20:
        assert held != held_out_windows(n, 16, 1)


@pytest.mark.parametrize("n, seqlen, held", [(128, 512, 8), (128, 2048, 2), (128, 8192, 1), (30, 512, 3), (2, 9999, 1)])
def test_long_windows_are_held_out_up_to_a_number_of_tokens(n, seqlen, held):
    assert len(held_out_windows(n, seqlen, 0)) == held


@pytest.mark.parametrize("most, seqlen, windows", [(8, 64, 8), (8, 128, 4), (8, 512, 1), (8, 2048, 1), (1, 16, 1)])
def test_a_step_trains_on_few_tokens(most, seqlen, windows):
    assert windows_per_step(most, seqlen) == windows


def test_without_healing_the_batches_are_the_windows_in_order():
    assert held_out_windows(1, 16, 0) == ()
    assert [part.tolist() for part, held in calibrate.batches(5, 2) if not held] == [[0, 1], [2, 3], [4]]


def test_block_and_distil_hold_out_the_same_windows_and_train_on_all_others(monkeypatch):
    """Who trains on which windows is seen in the forwards that gradients flow through."""
    model, ids, trained, forward = families.tiny("llama"), tokens(13), {}, calibrate.forward

    def see(who, batch):
        if torch.is_grad_enabled():
            trained.setdefault(who, set()).update(ids.tolist().index(row) for row in batch.tolist())

    def spy(block, activations, b, i):
        see(b, activations.inputs[i]["input_ids"])
        return forward(block, activations, b, i)
    monkeypatch.setattr(calibrate, "forward", spy)
    model.register_forward_pre_hook(lambda _, args, kwargs: see("distil", kwargs["input_ids"]), with_kwargs=True)
    api.prune(model, method="wanda", pattern="2:4", calibration=ids, heal="block,distil", batch_size=4, seed=5,
              progress=False, parts={"block.steps": 20, "distil.steps": 20, "block.lr": 1e-3, "distil.lr": 1e-3})
    want = set(range(13)) - set(held_out_windows(*ids.shape, 5))
    assert len(want) == 11 and trained == {0: want, 1: want, "distil": want}


def test_solvers_see_all_windows_and_padding_follows_its_window():
    model, ids, mask = families.tiny("llama"), tokens(), torch.ones(16, T, dtype=torch.bool)
    mask[::3, 15:] = False
    held = held_out_windows(16, T, 0)
    both = [calibrate.capture(model, ids, mask, batch_size=4, held_out=h) for h in ((), held)]
    activations, rows = both[1], ids.tolist()
    for i, inputs in enumerate(activations.inputs):
        at = [rows.index(row) for row in inputs["input_ids"].tolist()]
        assert {w in held for w in at} == {activations.held[i]}
        assert torch.equal(inputs["attention_mask"].bool(), mask[at])
        real = activations.rows[i]
        assert torch.equal(real.view(len(at), T) if real is not None else mask[at], mask[at])
    block = models.blocks(model)[1][0]
    plain, apart = (calibrate.collect(block, a, 0, jobs.weights_in(block), {"outer"})[0] for a in both)
    for name, statistics in plain.items():
        assert statistics.n == apart[name].n == int(mask.sum())
        torch.testing.assert_close(statistics.G, apart[name].G)


def test_held_out_positions_are_always_the_same_and_hold_a_token(monkeypatch):
    model, mask = families.tiny("llama"), torch.ones(8, T, dtype=torch.bool)
    mask[:, 10:] = False
    monkeypatch.setattr(distil, "LOGITS", VOCAB * 8)  # the held-out window's: 8; batches of 3 and 4 windows: 2 each
    looked, real = {True: {}, False: {}}, distil.positions

    def positions(model, activations, i, gen):
        at = real(model, activations, i, gen)
        looked[torch.is_grad_enabled()].setdefault(i, []).append(at.tolist())
        return at
    monkeypatch.setattr(distil, "positions", positions)
    heal_pruned(model, "distil", ids=tokens(8), mask=mask, **{"distil.steps": 16})
    (held,), trained = looked[False].values(), [at for found in looked[True].values() for at in found]
    assert len(held) > 3 and all(at == held[0] for at in held)
    assert len(trained) > 4 and any(at != trained[0] for at in trained)
    assert {len(at) for at in held} == {8} and {len(at) for at in trained} == {2}
    assert all(max(at) < 10 for at in (*held, *trained))


@pytest.mark.usefixtures("plain_pages")
def test_one_window_only_is_said(tmp_path, capsys):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", heal="block,distil", nsamples=1,
                                 **{"block.steps": 2, "distil.steps": 2})) == 0
    assert "nothing held out" in capsys.readouterr().out
