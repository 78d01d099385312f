"""`oneshot fit`: steps, floors, taking back, targets, kills; the decisions, on made-up measurements (fitting.World)."""

import json
from pathlib import Path

import pytest
from fitting import World

from oneshot.pipeline.fit import ledger
from oneshot.runtime import environment

EIGHTH = "12.5%"  # of the whole way


def rounds_of(tmp_path):
    return json.loads((tmp_path / "out" / "fit.json").read_text())["rounds"]


def test_it_steps_down_to_the_target_and_not_beyond(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20 / share)
    assert world.go(tmp_path, "--target", "parameters=0.5", "--step", "25%", "--floor", "text/ppl<=2.1x") == 0
    assert world.runs == [("model", "round-1", 0.875), ("round-1", "round-2", 0.75), ("round-2", "round-3", 0.625),
                          ("round-3", "round-4", 0.5)]
    out, err = capsys.readouterr()
    assert "target met" in out and out.rstrip().endswith("round-4") and not world.timed
    assert err.splitlines()[:2] == ["round-1: without block 0", "round-1: parameters 0.88; all floors hold"]
    assert [r["told"] for r in rounds_of(tmp_path)] == ["without block 0"] * 4


def test_one_shot_is_a_step_of_the_whole_way(tmp_path, monkeypatch):
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, "--target", "parameters=0.5", "--step", "100%") == 0
    assert world.runs == [("model", "round-1", 0.5)]


def test_a_round_that_breaks_a_floor_is_taken_back_and_tried_another_way(tmp_path, monkeypatch, capsys):
    """The second block breaks the floor. Half the step without blocks is neurons, which break it as well."""
    world = World(monkeypatch, lambda share: 20 if share > 0.87 else 100)
    assert world.go(tmp_path, "--target", "parameters=0.5", "--floor", "text/ppl<=1.1x", "--step", "25%") == 3
    names = [(model, name) for model, name, _ in world.runs]
    assert names == [("model", "round-1"), ("round-1", "round-2"), ("round-1", "round-3")]
    kept = rounds_of(tmp_path)
    assert [r["kept"] for r in kept] == [True, False, False, False]
    assert kept[1]["told"] == "without block 0" and "neurons in each" in kept[2]["told"]
    assert kept[2]["step"] == kept[1]["step"] / 2 and kept[3]["failed"] == "no other way to take the next step"
    out = capsys.readouterr().out
    assert "target not met: text/ppl 100, asked <= 22; no other way to take the next step" in out
    assert "next would be: " in out and out.rstrip().endswith("round-1")


def test_what_was_measured_before_a_round_was_taken_back_is_not_measured_again(tmp_path, monkeypatch):
    """Nor after a kill, so that the plans are the same."""
    world = World(monkeypatch, lambda share: 20 if share > 0.87 else 100)
    words = ["--target", "parameters=0.5", "--floor", "text/ppl<=1.1x", "--step", "25%"]
    assert world.go(tmp_path, *words) == 3
    whole = rounds_of(tmp_path)
    assert len(world.asked) == 2 < len(whole)  # the dense model and what the first round kept
    assert all(r["candidates"]["drops"] == whole[1]["candidates"]["drops"] for r in whole[2:])
    world = World(monkeypatch, lambda share: 20 if share > 0.87 else 100)
    real, ended = ledger.Ledger.write, []

    def dying(self, now=None):
        real(self, now)
        ended.append(now)
        if ended.count(None) == 2:  # the second round was taken back
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "write", dying)
        assert world.go(tmp_path / "killed", *words) == 130
    assert world.go(tmp_path / "killed", *words) == 3 and len(world.asked) == 2
    assert [r | {"seconds": 0} for r in rounds_of(tmp_path / "killed")] == [r | {"seconds": 0} for r in whole]


def test_half_of_a_last_step_is_half_of_what_was_left(tmp_path, monkeypatch):
    """The last step is shorter than --step, of which half would still be all of it."""
    world = World(monkeypatch, lambda share: 20 if share > 0.87 else 100)
    assert world.go(tmp_path, "--target", "parameters=0.86", "--floor", "text/ppl<=1.1x", "--step", "70%") == 3
    first, broken, again = rounds_of(tmp_path)[:3]
    assert first["shares"]["parameters"] == 0.875 and not broken["kept"]
    assert [r["aims"]["parameters"] for r in (broken, again)] == [0.86, pytest.approx((0.86 + 0.875) / 2)]


def test_what_would_be_next_and_by_how_much_a_floor_is_missed(tmp_path, monkeypatch, capsys):
    """Several plans are tried, none twice."""
    world = World(monkeypatch, lambda share: 20 / share**9)
    assert world.go(tmp_path, "--target", "parameters=0.25,bytes=0.2", "--floor", "text/ppl<=19.5",
                    "--allow", "shrink,int8,int4") == 3
    out = capsys.readouterr().out
    assert "target not met: " in out and "asked <= 19.5" in out and out.rstrip().endswith("result: model")
    assert "next would be: " in out and not any(r["kept"] for r in rounds_of(tmp_path))
    assert len({r["told"] for r in rounds_of(tmp_path) if r["plan"]}) == len([
        r for r in rounds_of(tmp_path) if r["plan"]]) > 1


def test_a_damaged_round_is_taken_back(tmp_path, monkeypatch):
    """A bug that destroys the second round only."""
    calls = []

    def ppl(share):
        calls.append(share)
        return 9999.0 if len(calls) == 3 else 20.0
    world = World(monkeypatch, ppl)
    assert world.go(tmp_path, "--target", "parameters=0.7", "--floor", "text/ppl<=1.5x", "--step", "40%") == 0
    assert [(model, name) for model, name, _ in world.runs][:3] == [("model", "round-1"), ("round-1", "round-2"),
                                                                    ("round-1", "round-3")]


def test_latency_is_measured_and_the_aims_follow_what_was_measured(tmp_path, monkeypatch):
    """Time falls half as fast as the table says, so the limits are tightened by what was measured."""
    world = World(monkeypatch, lambda share: 20, time=lambda share: 0.5 + 0.5 * share)
    assert world.go(tmp_path, "--target", "latency=0.8x", "--step", "50%") == 0
    found = rounds_of(tmp_path)
    assert [r["shares"]["latency"] for r in found] == [0.9375, 0.875, 0.8125, 0.75] and len(world.timed) == 4 + 2
    assert [r["aims"]["latency"] for r in found] == pytest.approx([0.9, 0.8375, 0.8, 0.8])
    assert world.limits[0]["latency"] == pytest.approx(0.8 * 8)  # the first round looks at the whole way
    assert world.limits[1]["latency"] == pytest.approx(0.8375 * 7 / 0.9375)


def test_times_of_a_busy_machine_are_noted(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    monkeypatch.setattr(environment, "others", lambda: 2.0)
    assert world.go(tmp_path, "--target", "latency=0.8x", "--step", "100%") == 0
    [now] = rounds_of(tmp_path)
    said = "round-1: timed while other processes took 2.0 cores, so its latency is uncertain"
    assert said in now["notes"] and f"note: {said}" in capsys.readouterr().out


def test_several_targets_are_all_met_and_integers_serve_the_bytes(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20 / share)
    assert world.go(tmp_path, "--target", "bytes=0.5x,parameters=0.75", "--step", "100%", "--floor",
                    "text/ppl<=2x") == 0
    [now] = rounds_of(tmp_path)
    assert now["plan"]["drop"] == [0, 1] and now["told"] == "without blocks 0, 1, int8 in 3 blocks"
    assert world.runs == [("model", "round-1-cut", 0.75), ("round-1-cut", "round-1", 0.75)]
    assert now["shares"]["bytes"] == 0.75 * (3 + 3 / 4) / 6 and capsys.readouterr().out.startswith("round ")


def test_a_model_that_was_only_rounded_is_not_measured_again(tmp_path, monkeypatch):
    """Each round rounds the same model; what cuts it, as the last one does here, makes another."""
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, "--target", "bytes=0.3", "--step", "40%", "--allow", "int8,int4") == 0
    assert len(rounds_of(tmp_path)) == 2 and len(world.asked) == 1
    cuts = World(monkeypatch, lambda share: 20)
    assert cuts.go(tmp_path / "other", "--target", "parameters=0.7", "--step", "40%") == 0
    assert len(cuts.asked) == len(rounds_of(tmp_path / "other")) > 1


def test_each_block_gets_its_form(tmp_path, monkeypatch):
    """int8 for all is too large, int4 for all loses more: the run has an entry for each block that differs."""
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, "--target", "bytes=0.2", "--step", "100%", "--allow", "int8,int4") == 0
    [now] = rounds_of(tmp_path)
    grids, [cfg] = dict(now["plan"]["grids"]), [cfg for cfg in world.configs if cfg.save and "plain" not in cfg.save]
    assert set(grids.values()) == {"int8", "int4"} and len(grids) == 8 and cfg.method == "keep"
    for b in range(8):
        assert str(cfg.grids.of(f"model.layers.{b}.mlp.up_proj")) == {"int8": "int8:row", "int4": "int4:64"}[grids[b]]
    counts = [list(grids.values()).count(key) for key in ("int8", "int4")]
    assert min(counts) > 1 and now["told"] == "int8 in {} blocks, int4 in {} blocks".format(*counts)


def test_rounds_of_an_older_version_are_refused_in_a_line(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, "--target", "parameters=0.8") == 0
    file = tmp_path / "out" / "fit.json"
    data = json.loads(file.read_text())
    for old in ({k: v for k, v in data.items() if k != "schema"}, data | {"schema": 2}):
        file.write_text(json.dumps(old))
        assert world.go(tmp_path, "--target", "parameters=0.8") == 2
        assert "its fit.json is of another version of oneshot" in capsys.readouterr().err


def test_allow_says_what_may_be_done(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, "--target", "bytes=0.5", "--allow", "int4", "--step", "100%") == 0
    assert world.asked == [{"int4"}] and rounds_of(tmp_path)[0]["told"] == "int4 in 5 blocks"
    world.go(tmp_path / "none", "--target", "parameters=0.5", "--allow", "int4")
    assert "nothing that --allow names is small enough" in capsys.readouterr().out


def test_flags_of_healing_and_the_solver_arrive_in_the_rounds(tmp_path, monkeypatch):
    """The last step before rounding heals, towards the dense model; the long heal has its own tokens and comes last."""
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, "--target", "bytes=0.2,parameters=0.8", "--step", "100%", "--data", "x.txt", "--tokens",
                    "3k", "--final", "9k", "--method", "flap", "--heal-batch", "64") == 0
    found = {Path(cfg.save).name: cfg for cfg in world.configs if cfg.save}
    assert [name for name in found if "plain" not in name] == ["round-1-cut", "round-1", "final-heal", "final"]
    cut, last = found["round-1-cut"], found["final-heal"]
    assert (cut.shrink_method, cut.heal, cut.heal_tokens, cut.heal_teacher) == ("flap", "full", "3k", "model")
    assert (last.heal, last.heal_tokens, last.heal_batch, last.method) == ("full", "9000", 64, "keep")
    assert found["round-1"].heal == "none" and found["round-1"].evaluate != "none" == cut.evaluate
    assert last.model == cut.save and found["final"].model == last.save


def test_plain_rounding_that_is_the_better_answer_is_the_first_line(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20 / share)
    words = ["--target", "bytes=0.6", "--step", "100%", "--allow", "shrink"]
    assert world.go(tmp_path, *words, "--floor", "text/ppl<=2x") == 0
    out = capsys.readouterr().out
    assert out.startswith("plain int8 rounding of the dense model is the better answer: it keeps all floors at bytes "
                          "0.25")
    world.rounded = 60.0
    assert world.go(tmp_path / "worse", *words, "--floor", "text/ppl<=2x") == 0
    assert capsys.readouterr().out.startswith("round ")


def test_the_budget_ends_the_rounds(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    ticks = iter(range(0, 10**6, 100))
    monkeypatch.setattr("oneshot.pipeline.fit.rounds.time.perf_counter", lambda: next(ticks))
    assert world.go(tmp_path, "--target", "parameters=0.5", "--step", "25%", "--budget", "350s") == 3
    assert len(world.runs) == 2 and "target not met: the budget of time is used up" in capsys.readouterr().out
    world = World(monkeypatch, lambda share: 20 if share == 1 else 100)
    assert world.go(tmp_path / "broken", "--target", "parameters=0.5", "--floor", "text/ppl<=2x", "--step", "25%",
                    "--budget", "150s") == 3
    assert "target not met: text/ppl 100, asked <= 40; the budget of time is used up" in capsys.readouterr().out


@pytest.mark.parametrize("error, code, said", [
    ("--shrink: leaves less than one unit", 3, "target not met: "), ("--data x: no such file", 2, "--data x")])
def test_a_round_that_cannot_be_cut_is_tried_otherwise_and_other_errors_end_the_command(error, code, said, tmp_path,
                                                                                       monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    real = world.run

    def failing(cfg):
        if cfg.save and "plain" not in cfg.save and world.share(cfg.model) < 0.8:
            raise ValueError(error)
        return real(cfg)
    monkeypatch.setattr("oneshot.pipeline.run.run", failing)
    assert world.go(tmp_path, "--target", "parameters=0.3") == code
    out, err = capsys.readouterr()
    assert said in out + err and (code == 2 or Path(out.split()[-1]).name.startswith("round-"))


def test_what_is_no_number_keeps_no_floor(tmp_path, monkeypatch, capsys):
    """Records hold null for NaN."""
    world = World(monkeypatch, lambda share: 20 if share > 0.88 else None)
    assert world.go(tmp_path, "--target", "parameters=0.5", "--floor", "text/ppl<=2x") == 3
    assert "text/ppl nan, asked <= 40" in capsys.readouterr().out
    world = World(monkeypatch, lambda share: None)
    assert world.go(tmp_path / "dense", "--target", "parameters=0.5", "--floor", "text/ppl<=2x") == 2
    assert "--floor text/ppl: is nan for --model" in capsys.readouterr().err


def test_a_damaged_file_of_rounds_is_one_line(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, "--target", "parameters=0.8") == 0
    file = tmp_path / "out" / "fit.json"
    file.write_text(file.read_text()[:-9])
    assert world.go(tmp_path, "--target", "parameters=0.8") == 2 and "fit.json is damaged" in capsys.readouterr().err


def test_a_killed_command_continues_with_its_plans_and_times_and_another_one_is_refused(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    words = ["--target", "latency=0.5", "--floor", "text/ppl<=2x", "--step", "25%"]
    real, calls = ledger.Ledger.write, []

    def dying(self, now=None):
        real(self, now)
        calls.append(1)
        if len(calls) == 5:  # planned the third round
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "write", dying)
        assert world.go(tmp_path, *words) == 130
    assert len(world.timed) == 2 and len(world.asked) == 3
    assert world.go(tmp_path, *words) == 0
    assert len(world.timed) == 4 + 2 and len(world.asked) == 4  # nothing was timed or planned twice
    assert world.go(tmp_path, *words) == 0 and len(world.timed) == 6
    assert world.go(tmp_path, "--target", "latency=0.6") == 2
    assert "holds the rounds of another command" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--target", "speed=2"], "--target speed=2"), (["--target", "parameters=1.5"], "--target parameters=1.5"),
    (["--target", "bytes=0.5,bytes=0.4"], "--target bytes=0.5,bytes=0.4"),
    (["--target", "parameters=0.5", "--floor", "ppl"], "--floor ppl"),
    (["--target", "parameters=0.5", "--floor", "text/ppl>=1x"], "--floor text/ppl>=1x"),
    (["--target", "parameters=0.5", "--floor", "other/ppl<=1x"], "--floor other/ppl: not measured"),
    (["--target", "parameters=0.5", "--step", "101%"], "--step 101%"),
    (["--target", "parameters=0.5", "--budget", "2"], "--budget 2: give a time"),
    (["--target", "parameters=0.5", "--allow", "shrink,int3"], "--allow int3"),
    (["--target", "parameters=0.5", "--allow", "heal"], "--allow heal: names nothing"),
    (["--target", "parameters=0.5", "--final", "1M"], "--final 1M: heals on text"),
    (["--target", "parameters=0.5", "--tokens", "1M"], "--tokens 1M: heals on text"),
    (["--target", "parameters=0.5", "--data", "builtin", "--tokens", "x"], "--tokens x: give a number"),
    (["--target", "parameters=0.5", "--data", "builtin", "--final", "x"], "--final x: give a number"),
    (["--target", "parameters=0.5", "--data", "x", "--allow", "shrink"], "--data x: is text to heal on"),
    (["--target", "parameters=0.5", "--pattern", "2:4"], "--pattern: `oneshot fit` decides that itself"),
    (["--target", "parameters=0.5", "--sde", "1"], "--sde"),
    ([], "--target")])
def test_what_cannot_be_used_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "fit.json").exists()
