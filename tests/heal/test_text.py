"""Healing on text: zeros stay, the merge is exact, a killed run ends with the same bits, harm is undone."""


import families
import numpy as np
import pytest
import torch
from families import VOCAB
from healing_on_text import WAYS, Killed, T, families_text, healed, lesson, pruned, windows

from oneshot import heal, models
from oneshot.heal import full, lora, text
from oneshot.heal.options import HealOptions, count
from oneshot.heal.text import memory, trainer
from oneshot.heal.text.student import keeps_apart
from oneshot.prune.patterns import parse
from oneshot.runtime.proof import ProofError

DROPOUT = {"lora": {"dropout": 0.1}}


@pytest.mark.parametrize("name, dtype", [("llama", torch.float32), ("gpt2", torch.bfloat16), ("gemma3", torch.float16),
                                         ("mixtral", torch.bfloat16), ("bloom", torch.float32)])
@pytest.mark.parametrize("way", WAYS)
def test_it_helps_and_loses_no_zero(way, name, dtype, tmp_path):
    before = pruned(name, dtype=dtype)
    model, said = healed(way, tmp_path, name, dtype)
    assert said["held_out_after"] < said["held_out_before"] and 0 < said["tokens"] <= 40 * T
    changed = {n for (n, p), q in zip(before.named_parameters(), model.parameters(), strict=True)
               if not torch.equal(p, q)}
    assert changed and all(p.dtype == dtype and not p.requires_grad for p in model.parameters())
    assert not [n for n in changed if models.left_alone(n.rpartition(".")[0])]
    for old, new in zip(models.all_weights(before), models.all_weights(model), strict=True):
        assert parse("2:4").holds(new.get()) and not new.get()[old.get() == 0].any(), new.name
    assert not [m for m in model.modules() if hasattr(m, "parametrizations")]
    if way == "lora" and name == "mixtral":
        assert any("experts" in w for w in said["warnings"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """{way: (model, what was said)}, with dropout where there is one."""
    return {way: healed(way, tmp_path_factory.mktemp(way), cfg=DROPOUT.get(way)) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", [3, 4, 9, "saving", "between"])
def test_killed_at_any_moment_it_ends_with_the_same_bits(way, moment, tmp_path, monkeypatch, uninterrupted):
    """A look, and so a checkpoint, comes every two of the twenty steps."""
    whole, said = uninterrupted[way]
    with monkeypatch.context() as patch:
        if moment == "saving":  # the third checkpoint lacks its last file
            real, calls = trainer.TextTrainer._save_rng_state, []

            def dying(self, place):
                calls.append(place)
                real(self, place)
                if len(calls) == 3:
                    raise Killed
            patch.setattr(trainer.TextTrainer, "_save_rng_state", dying)
        elif moment == "between":
            patch.setattr(text.Course, "ended", lambda self: (_ for _ in ()).throw(Killed))
        else:
            real = trainer.TextTrainer.training_step

            def step(self, *args, **kwargs):
                if self.state.global_step == moment:
                    raise Killed
                return real(self, *args, **kwargs)
            patch.setattr(trainer.TextTrainer, "training_step", step)
        with pytest.raises(Killed):
            healed(way, tmp_path / "broken", cfg=DROPOUT.get(way))
    again, told = healed(way, tmp_path / "broken", cfg=DROPOUT.get(way))
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert told["attempts"] == said["attempts"] and told["held_out_after"] == said["held_out_after"]
    spent = said["tokens"] / said["tokens_per_second"], told["tokens"] / told["tokens_per_second"]
    assert said["earlier"] == 0 and told["earlier"] > 0 and min(spent) > 0
    if moment == "between":  # nothing was trained again
        assert told["earlier"] > spent[1]


def test_killed_in_a_later_attempt_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    steep = {"cfg": {"lr": 0.9}}
    whole, said = healed("full", tmp_path / "whole", **steep)
    assert len(said["attempts"]) > 2 and said["attempts"][0]["ended"] == "harm" and said["lr"] < 0.9
    real, calls = text.Course.train, []

    def train(self, attempt):
        calls.append(attempt)
        if len(calls) == 2:
            raise Killed
        return real(self, attempt)
    with monkeypatch.context() as patch:
        patch.setattr(text.Course, "train", train)
        with pytest.raises(Killed):
            healed("full", tmp_path / "broken", **steep)
    again, told = healed("full", tmp_path / "broken", **steep)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    assert told["attempts"] == said["attempts"] and "learning rate lowered" in told["warnings"][0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_merged_is_what_was_trained(name):
    model = pruned(name)
    adapters = lora.Adapters(lora.targets(model, lora.Config()), lora.Config(r=4), seed=0)
    ids = torch.randint(3, VOCAB, (2, T))
    with torch.no_grad(), adapters:
        for p in adapters.parameters.values():
            p.normal_(std=0.1)
        trained = model(ids).logits
    with torch.no_grad():
        merged = model(ids).logits
        assert not torch.allclose(merged, pruned(name)(ids).logits, atol=1e-2)
    torch.testing.assert_close(merged, trained, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_merged_is_what_was_trained_but_for_rounding_and_the_record_says_by_how_much(name, dtype):
    model = pruned(name, dtype=dtype)
    weights = lora.targets(model, lora.Config())
    with torch.no_grad(), models.resident(model, "cpu", write_back=True, dtype=torch.float32), \
            lora.Adapters(weights, lora.Config(r=4)) as adapters:
        for p in adapters.parameters.values():
            p.normal_(std=0.1)
        trained = [w.owner.weight.clone() for w in weights]
    errors = [((w.parameter.float() - W).abs() / W.abs())[W.abs() > 1e-4].max() for w, W in zip(
        weights, trained, strict=True)]
    assert max(map(float, errors)) <= adapters.merge_error <= (torch.finfo(dtype).eps / 2) * (dtype.itemsize < 4)
    assert (adapters.merge_error > 0) == (dtype.itemsize < 4)


def test_a_weight_that_is_not_what_was_trained_is_proved_wrong(monkeypatch):
    model, real = pruned(dtype=torch.bfloat16), lora.Adapters.round

    def round_(self):
        real(self)
        self.weights[3].parameter.data.mul_(1 + 2**-6)
    monkeypatch.setattr(lora.Adapters, "round", round_)
    weights = lora.targets(model, lora.Config())
    with pytest.raises(ProofError, match=rf"^{weights[3].name}: is not what was trained, but off by 0\.0"), \
            models.resident(model, "cpu", write_back=True, dtype=torch.float32), \
            lora.Adapters(weights, lora.Config(r=4)) as adapters:
        torch.nn.init.normal_(adapters.changes[3].B, std=0.1)


@pytest.mark.parametrize("way", WAYS)
def test_text_that_does_harm_is_stopped_and_undone(way, tmp_path):
    """It teaches the next token on text that is nothing but one token; the held-out text is the dense model's kind."""
    bad, before = windows(40, ids=np.full(40 * T, 7, np.uint32)), pruned()
    held = windows(8, ids=families_text(8))
    model, said = healed(way, tmp_path, train=bad, held=held, heal_loss="next")
    assert said["held_out_after"] == said["held_out_before"] and "left as it was" in said["warnings"][-1]
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), model.parameters(), strict=True))
    assert sum(a["steps"] for a in said["attempts"]) < 20 and all(a["ended"] == "harm" for a in said["attempts"])


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_same_step(parts, tmp_path, monkeypatch):
    found = []
    for n in (parts, 1):
        monkeypatch.setattr(memory, "fit", lambda *_, n=n: memory.Fit(4 // n, n, False, 0))
        found.append(healed("full", tmp_path / str(n), heal_batch=4 * T)[0])
    for p, q in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_activations_computed_twice_change_nothing(tmp_path, monkeypatch):
    once, _ = healed("full", tmp_path / "once")
    monkeypatch.setattr(memory, "fit", lambda *_: memory.Fit(2, 1, True, 0))
    twice, _ = healed("full", tmp_path / "twice")
    for p, q in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("given, want", [("500k", 500_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("7", 7)])
def test_numbers_of_tokens(given, want):
    assert count(given) == want


@pytest.mark.parametrize("flag, value", [("heal_tokens", "5x"), ("heal_tokens", "0"), ("heal_tokens", "9" * 400),
                                         ("heal_loss", "kl,l2"), ("heal_temperature", 0.0),
                                         ("heal_temperature", 1e30), ("heal_top_k", 0), ("heal_batch", 0),
                                         ("heal_seqlen", 1), ("heal_data", ""), ("heal_data", "a.txt,a.txt")])
def test_useless_settings_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')}"):
        HealOptions(**{flag: value}).check()


@pytest.mark.parametrize("name, apart", [("llama", True), ("gpt2", True), ("opt", False), ("bloom", False)])
def test_families_whose_tokens_see_other_documents_are_found(name, apart):
    assert keeps_apart(families.tiny(name)) is apart


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    want = torch.rand(3), np.random.rand(3)
    model, found = pruned(), lesson(tmp_path)
    torch.manual_seed(5)
    np.random.seed(5)
    full.Heal(full.Config()).on_text(model, found)
    assert torch.equal(torch.rand(3), want[0]) and (np.random.rand(3) == want[1]).all()


def test_methods_on_text_come_last_and_are_known():
    assert {name for name in heal.names() if heal.trains_on_text(name)} == {"full", "lora"}
    with pytest.raises(ValueError, match="--heal block,full"):
        heal.check_order([full, heal.module("block")], "full,block")


@pytest.mark.parametrize("losses, want", [
    ([], None), ([2.1], "harm"), ([float("nan")], "harm"), ([2.0], None), ([1.5, 1.6], None), ([1.5, 2.1], "harm"),
    ([1.5, 1.6, 1.6, 1.6], "no gain"), ([1.5, 1.6, 1.6, 1.4], None)])
def test_when_an_attempt_ends(losses, want):
    assert text.verdict(losses, 2.0) == want


def test_where_looks_gain_nothing_any_more_the_rate_is_halved_and_the_best_state_goes_on(tmp_path, monkeypatch):
    """Looks that are told to be flat from the second on, at the first rate only."""
    real, told = text.verdict, []

    def flat(losses, before):
        told.append(len(losses))
        return "no gain" if len(losses) == 3 and not flat.over else real(losses, before)
    flat.over = False
    kept = text.Course.train

    def train(self, attempt):
        flat.over = len(self.attempts) > 1
        return kept(self, attempt)
    monkeypatch.setattr(text, "verdict", flat)
    monkeypatch.setattr(trainer, "verdict", flat)
    monkeypatch.setattr(text.Course, "train", train)
    _, said = healed("full", tmp_path)
    first, second = said["attempts"][:2]
    assert first["ended"] == "no gain" and second["lr"] == first["lr"] / 2 and second["state"] == first["kept"]
    assert second["begins"] == first["steps"] * 2 and said["held_out_after"] < min(loss for _, loss in first["looks"])
