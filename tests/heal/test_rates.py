"""The learning rate of healing on text: found on the first steps, unless it is given; the same after a kill."""

import pytest
import torch
from healing_on_text import Killed, healed

from oneshot.heal import full, lora
from oneshot.heal.text import rates, trainer


@pytest.fixture
def short(monkeypatch):
    """Twenty steps are worth five at each rate; the highest rates do harm, the next ones help."""
    monkeypatch.setattr(rates, "SHARE", 4)
    monkeypatch.setattr(rates, "LEAST", 5)
    monkeypatch.setattr(full, "RATES", (0.9, 0.01, 0.00001))
    monkeypatch.setattr(lora, "RATES", (5.0, 0.01, 0.00001))


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.usefixtures("short")
def test_a_rate_that_is_too_high_is_not_chosen(way, tmp_path):
    _, said = healed(way, tmp_path, cfg={"lr": None})
    assert [rate for rate, _ in said["tried"]][1:] == [0.01, 0.00001]
    assert said["attempts"][0]["lr"] == 0.01
    assert said["tried"][0][1] > said["held_out_before"] > said["tried"][1][1]
    assert said["held_out_after"] < said["held_out_before"]


@pytest.mark.usefixtures("short")
def test_a_rate_that_is_given_is_taken_as_it_is(tmp_path):
    _, said = healed("full", tmp_path, cfg={"lr": 0.02})
    assert said["tried"] == [] and said["attempts"][0]["lr"] == 0.02


def test_a_short_text_is_not_worth_it(tmp_path):
    _, said = healed("full", tmp_path, cfg={"lr": None})
    assert said["tried"] == [] and said["attempts"][0]["lr"] == full.RATES[0]


@pytest.mark.usefixtures("short")
def test_killed_while_rates_are_tried_or_later_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    """The steps of three rates are 15; then come those of the attempt."""
    whole, said = healed("full", tmp_path / "whole", cfg={"lr": None})
    real = trainer.TextTrainer.training_step
    for moment, left in ((7, 30), (19, 18)):  # in the second rate; after a checkpoint of the attempt
        done = []

        def step(self, *args, done=done, moment=moment, **kwargs):
            done.append(1)
            if len(done) == moment:
                raise Killed
            return real(self, *args, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(trainer.TextTrainer, "training_step", step)
            with pytest.raises(Killed):
                healed("full", tmp_path / str(moment), cfg={"lr": None})
            done.append(moment)  # it is not killed again
            before = len(done)
            again, told = healed("full", tmp_path / str(moment), cfg={"lr": None})
        assert len(done) - before == left
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
        assert told["attempts"] == said["attempts"] and told["tried"] == said["tried"]


@pytest.mark.parametrize("losses, over", [([], False), ([3.0], False), ([3.0, 2.5], False), ([3.0, 1.5], False),
                                          ([1.5], False), ([1.5, 1.6], True), ([1.5, float("nan")], True),
                                          ([3.0, 1.5, 1.4], False), ([3.0, 1.5, 1.7], True),
                                          ([float("nan"), float("nan")], False)])
def test_lower_rates_are_tried_until_one_gains_less(losses, over):
    assert rates.over([[0.1, loss] for loss in losses], before=2.0) is over
