"""`oneshot fit`: steps, floors, rollback, targets, kills; the decisions on made-up measurements, one run for real."""

import json
from pathlib import Path

import pytest
import tiny
from tiny import plain_pages  # noqa: F401

from oneshot.pipeline import fit

pytestmark = pytest.mark.usefixtures("plain_pages")


class World:
    """Stands in for the runs: perplexity and time follow from the share of parameters that is left."""

    rounded = 21.0  # perplexity of the dense model in int8

    def __init__(self, monkeypatch, ppl, time=lambda share: share):
        self.ppl, self.time, self.shares, self.runs, self.timed = ppl, time, {"model": 1.0}, [], []
        monkeypatch.setattr(fit.run, "run", self.run)
        monkeypatch.setattr(fit.Fit, "latency", lambda own, folder: self.timed.append(folder) or time(
            self.shares[str(folder)]))

    def run(self, cfg):
        if cfg.quantise:
            return {"metrics": {"text/ppl": self.rounded, "task/acc": 0.5},
                    "bytes": {"stored": 53, "dense": 100}}
        share = self.shares[cfg.model] * (cfg.shrink or 1)
        if cfg.save:
            self.shares[cfg.save] = share
            self.runs.append((Path(cfg.model).name, Path(cfg.save).name, round(share, 4)))
        return {"metrics": {"text/ppl": self.ppl(share), "task/acc": 0.5 * share}, "shrunk": {"share": cfg.shrink or 1}}


def go(tmp_path, *words):
    return fit.main(["--model", "model", "--save", str(tmp_path / "out"), *words, "--no-progress", "--device", "cpu"])


def test_it_steps_down_to_the_target_and_not_beyond(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20 / share)
    assert go(tmp_path, "--target", "parameters=0.75", "--floor", "text/ppl<=2x") == 0
    assert world.runs == [("model", "round-1", 0.9), ("round-1", "round-2", 0.8), ("round-2", "round-3", 0.75)]
    out = capsys.readouterr().out
    assert "plain int8 rounding of the dense model keeps all floors at 53% of" in out
    assert "plain rounding, 53% of the linears' bytes" in out
    assert "target met" in out and out.rstrip().endswith("round-3") and not world.timed


def test_a_round_that_breaks_a_floor_is_undone_and_tried_with_half_the_step(tmp_path, monkeypatch, capsys):
    """The floor lies at a share of 0.82: 0.9, then 0.8 breaks it, 0.85 holds, 0.8 breaks it again, 0.825 holds ..."""
    world = World(monkeypatch, lambda share: 20 if share >= 0.82 else 100)
    assert go(tmp_path, "--target", "parameters=0.5", "--floor", "text/ppl<=1.1x") == 3
    assert [share for *_, share in world.runs] == pytest.approx([0.9, 0.8, 0.85, 0.8, 0.825, 0.8, 0.8125, 0.81875],
                                                                abs=1e-4)
    assert world.runs[2][0] == "round-1" and world.runs[-1][0] == "round-5"
    out = capsys.readouterr().out
    assert "a floor stands in the way: text/ppl 100, asked <= 22" in out and out.rstrip().endswith("round-5")
    kept = [r["kept"] for r in json.loads((tmp_path / "out" / "fit.json").read_text())["rounds"]]
    assert kept == [True, False, True, False, True, False, False, False]


def test_a_floor_that_cannot_be_met_leaves_the_model_as_it_was(tmp_path, monkeypatch, capsys):
    World(monkeypatch, lambda share: 20 / share**9)  # and rounding breaks it, too
    assert go(tmp_path, "--target", "parameters=0.5", "--floor", "text/ppl<=19") == 3
    out = capsys.readouterr().out
    assert out.rstrip().endswith("result: model") and "keeps all floors" not in out


def test_a_damaged_round_is_rolled_back(tmp_path, monkeypatch):
    """A bug that destroys the second round only."""
    calls = []

    def ppl(share):
        calls.append(share)
        return 9999.0 if len(calls) == 3 else 20.0
    world = World(monkeypatch, ppl)
    assert go(tmp_path, "--target", "parameters=0.8", "--floor", "text/ppl<=1.5x") == 0
    assert [share for *_, share in world.runs] == [0.9, 0.8, 0.85, 0.8] and world.runs[2][0] == "round-1"


def test_latency_is_measured_and_the_target_is_its_own(tmp_path, monkeypatch):
    """Time falls half as fast as parameters."""
    world = World(monkeypatch, lambda share: 20, time=lambda share: 0.5 + 0.5 * share)
    assert go(tmp_path, "--target", "latency=0.86x") == 0
    assert [share for *_, share in world.runs] == [0.9, 0.8, 0.7] and len(world.timed) == 3


def test_whole_units_are_counted_as_they_are(tmp_path, monkeypatch, capsys):
    """A model of eight units: steps of a tenth become eighths, and one that is less than an eighth ends it."""
    world = World(monkeypatch, lambda share: 20)
    real = world.run

    def whole(cfg):
        start = world.shares[cfg.model]
        record = real(cfg)
        if cfg.save:
            world.shares[cfg.save] = -(-8 * round(world.shares[cfg.save], 6) // 1) / 8
            record["shrunk"]["share"] = world.shares[cfg.save] / start
        return record
    monkeypatch.setattr(fit.run, "run", whole)
    assert go(tmp_path, "--target", "parameters=0.5", "--step", "0.2") == 0
    assert list(world.shares.values()) == [1.0, 0.875, 0.625, 0.5] and "62.5%" in capsys.readouterr().out
    assert go(tmp_path / "small", "--target", "parameters=0.62", "--step", "0.01") == 3
    assert "cannot get smaller: a step of 0.0025 is less than one unit" in capsys.readouterr().out


@pytest.mark.parametrize("error, code, said", [
    ("--shrink: leaves less than one unit", 3, "the model cannot get smaller: --shrink: leaves less"),
    ("--data x: no such file", 2, "--data x")])
def test_a_round_that_cannot_be_cut_ends_the_rounds_and_other_errors_end_the_command(error, code, said, tmp_path,
                                                                                   monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    real = world.run

    def failing(cfg):
        if cfg.save and world.shares[cfg.model] * cfg.shrink < 0.85:
            raise ValueError(error)
        return real(cfg)
    monkeypatch.setattr(fit.run, "run", failing)
    assert go(tmp_path, "--target", "parameters=0.3") == code
    out, err = capsys.readouterr()
    assert said in out + err and (code == 2 or Path(out.split()[-1]).name.startswith("round-"))


def test_latency_rounds_end_where_nothing_would_be_left(tmp_path, monkeypatch, capsys):
    World(monkeypatch, lambda share: 20, time=lambda share: 0.9)
    assert go(tmp_path, "--target", "latency=0.5", "--step", "0.5") == 3
    assert "nothing would be left" in capsys.readouterr().out


def test_what_is_no_number_keeps_no_floor(tmp_path, monkeypatch, capsys):
    """Records hold null for NaN."""
    World(monkeypatch, lambda share: 20 if share > 0.85 else None)
    assert go(tmp_path, "--target", "parameters=0.5", "--floor", "text/ppl<=2x") == 3
    assert "text/ppl nan, asked <= 40" in capsys.readouterr().out
    World(monkeypatch, lambda share: None)
    assert go(tmp_path / "dense", "--target", "parameters=0.5", "--floor", "text/ppl<=2x") == 2
    assert "--floor text/ppl: is nan for --model" in capsys.readouterr().err


def test_a_damaged_file_of_rounds_is_one_line(tmp_path, monkeypatch, capsys):
    World(monkeypatch, lambda share: 20)
    assert go(tmp_path, "--target", "parameters=0.8") == 0
    file = tmp_path / "out" / "fit.json"
    file.write_text(file.read_text()[:-9])
    assert go(tmp_path, "--target", "parameters=0.8") == 2 and "fit.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("text, holds", [
    ("task/acc>=-0.1", True), ("task/acc>=-0.01", False), ("text/ppl<=25", True), ("text/ppl<=1.2x", False)])
def test_floors(text, holds):
    own = fit.floor(text)
    assert own.holds({"task/acc": 0.45, "text/ppl": 24.5}, {"task/acc": 0.5, "text/ppl": 20.0}) is holds


def test_a_killed_command_continues_with_what_was_measured_and_another_one_is_refused(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    words = ["--target", "latency=0.75", "--floor", "text/ppl<=2x"]
    real, calls = fit.Fit.write, []

    def dying(self, rounds):
        real(self, rounds)
        calls.append(len(rounds))
        if len(calls) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(fit.Fit, "write", dying)
        assert go(tmp_path, *words) == 130
    assert len(world.timed) == 2
    assert go(tmp_path, *words) == 0 and len(world.timed) == 3  # the first two are not timed again
    assert go(tmp_path, "--target", "latency=0.5") == 2
    assert "holds the rounds of another command" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--target", "speed=2"], "--target speed=2"), (["--target", "parameters=1.5"], "--target parameters=1.5"),
    (["--target", "parameters=0.5", "--floor", "ppl"], "--floor ppl"),
    (["--target", "parameters=0.5", "--floor", "text/ppl>=1x"], "--floor text/ppl>=1x"),
    (["--target", "parameters=0.5", "--floor", "other/ppl<=1x"], "--floor other/ppl: not measured"),
    (["--target", "parameters=0.5", "--step", "1"], "--step 1"),
    (["--target", "parameters=0.5", "--sde", "1"], "--sde"),
    ([], "--target")])
def test_what_cannot_be_used_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    World(monkeypatch, lambda share: 20)
    assert go(tmp_path, *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "fit.json").exists()


def test_for_real(tmp_path, capfd):
    """Two rounds on a tiny model, healed; the result is an ordinary smaller model, and the command repeats nothing."""
    place = tiny.make(tmp_path / "place")
    words = ["--model", place / "model", "--target", "parameters=0.6", "--step", "0.25", "--floor",
             "evaluation/ppl<=9x", "--data", place / "calibration.txt", "--tokens", "200", "--heal-seqlen", "16",
             "--heal-batch", "32", "--save", tmp_path / "out", "--evaluate", place / "evaluation.txt", "--calibration",
             place / "calibration.txt", "--nsamples", "8", "--seqlen", "16", "--eval-windows", "4", "--no-progress",
             "--device", "cpu", "--tries", "1"]
    assert fit.main(list(map(str, words))) == 0
    first = capfd.readouterr()
    folder = Path(first.out.rstrip().rpartition("result: ")[2])
    record = json.loads((folder / "oneshot.json").read_text())["record"]
    assert folder == tmp_path / "out" / "round-2" and record["heal"]["full"]["text"]["sources"]
    assert record["settings"]["model"] == str(tmp_path / "out" / "round-1")
    from transformers import AutoModelForCausalLM

    sizes = [AutoModelForCausalLM.from_pretrained(p).num_parameters() for p in (place / "model", folder)]
    assert sizes[1] < 0.8 * sizes[0]
    assert fit.main(list(map(str, words))) == 0
    again = capfd.readouterr()
    assert again.out == first.out and again.err.count("finished earlier, stored result") == 2
