"""`oneshot fit`: steps, floors, taking back, targets, kills; the decisions, on made-up measurements (fitting.World)."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from fitting import World

from oneshot.pipeline.fit import ending, ledger, targets
from oneshot.pipeline.fit.ledger import Round

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


def test_several_targets_are_all_met_and_integers_serve_the_bytes(tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20 / share)
    assert world.go(tmp_path, "--target", "bytes=0.5x,parameters=0.75", "--step", "100%", "--floor",
                    "text/ppl<=2x") == 0
    [now] = rounds_of(tmp_path)
    assert now["plan"]["drop"] == [0, 1] and now["told"] == "without blocks 0, 1, int8 in 3 blocks"
    assert world.runs == [("model", "round-1-cut", 0.75), ("round-1-cut", "round-1", 0.75)]
    assert now["shares"]["bytes"] == 0.75 * (3 + 3 / 4) / 6 and capsys.readouterr().out.startswith("round ")


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
    for old in ({k: v for k, v in data.items() if k != "schema"}, data | {"schema": 3}):
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
    (["--target", "parameters=0.5", "--data", "x", "--allow", "shrink"], "--data x: is text to heal on"),
    (["--target", "parameters=0.5", "--pattern", "2:4"], "--pattern: `oneshot fit` decides that itself"),
    (["--target", "parameters=0.5", "--sde", "1"], "--sde"),
    ([], "--target")])
def test_what_cannot_be_used_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    world = World(monkeypatch, lambda share: 20)
    assert world.go(tmp_path, *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "fit.json").exists()


# ---------------------------------------------------------------- floors

DENSE = {"metrics": {"task/acc": 0.5, "text/ppl": 20.0}, "metric_info": {}}


@pytest.mark.parametrize("text, holds", [
    ("task/acc>=-0.1", True), ("task/acc>=-0.01", False), ("task/acc>=-10%", True), ("task/acc>=-1%", False),
    ("task/acc>=0.95x", False), ("text/ppl<=25", True), ("text/ppl<=1.2x", False), ("text/ppl<=+4.6", True)])
def test_floors_without_a_standard_error(text, holds):
    own = targets.floor(text)
    found = own.judge({"metrics": {"task/acc": 0.45, "text/ppl": 24.5}}, DENSE)
    assert found.holds is holds and found.worst is None


def texts(*nats):
    """The record of a text with these mean losses of its windows."""
    return {"metrics": {"text/ppl": math.exp(sum(nats) / len(nats))}, "metric_info": {"text/ppl": {"by_window": nats}}}


def test_a_text_is_compared_in_pairs_of_windows():
    """All windows lose 0.1 nats: no doubt about it, though windows differ. Where they lose differently, there is."""
    dense = texts(2.0, 3.0, 4.0)
    same = targets.floor("text/ppl<=1.11x").judge(texts(2.1, 3.1, 4.1), dense)
    assert same.holds and same.worst == pytest.approx(same.value) == pytest.approx(math.exp(3.1))
    unsure = targets.floor("text/ppl<=1.11x").judge(texts(2.0, 3.1, 4.2), dense)
    spread = 0.1 / math.sqrt(3)  # the standard error of a mean of 0, 0.1, 0.2
    assert not unsure.holds and unsure.worst == pytest.approx(math.exp(3.1 + targets.SURE * spread))
    assert unsure.value <= unsure.bound < unsure.worst and "with its error" in str(unsure)
    alone = targets.floor("text/ppl<=23").judge(texts(2.1, 3.1, 4.1), dense)  # against a number: its own error
    assert alone.worst == pytest.approx(math.exp(3.1 + targets.SURE / math.sqrt(3))) and not alone.holds
    added = targets.floor("text/ppl<=+4").judge(texts(2.1, 3.1, 4.1), dense)
    assert added.bound == pytest.approx(math.exp(3) + 4) and added.worst > added.value


def test_a_window_that_is_no_number_keeps_no_floor():
    """In a record it is null."""
    own, dense = texts(2.1, 3.1, 4.1), texts(2.0, 3.0, 4.0)
    own["metric_info"]["text/ppl"]["by_window"] = [2.1, None, 4.1]
    for text in ("text/ppl<=9x", "text/ppl<=900", "text/ppl<=+90"):
        assert not targets.floor(text).judge(own, dense).holds


def test_plain_rounding_wins_by_all_metrics_or_not_at_all(monkeypatch):
    def fit(**metrics):
        monkeypatch.setattr(ending, "record_of", lambda state: {"metrics": metrics})
        return SimpleNamespace(shares={"bytes": 0.5}, asked=SimpleNamespace(targets={"bytes": 0.5}, floors=[]),
                               state=SimpleNamespace(result="round"), steps=SimpleNamespace(model="dense"))

    def plain(**metrics):
        return Round("int8", {}, 1.0, metrics=metrics, shares={"bytes": 0.4}, kept=True)
    assert ending.wins(fit(ppl=10.0, acc=0.5), plain(ppl=10.0, acc=0.6))
    assert not ending.wins(fit(ppl=10.0, acc=0.6), plain(ppl=9.0, acc=0.25))
    assert not ending.wins(fit(acc=0.6), plain(acc=0.25)) and not ending.wins(fit(acc=0.6), plain(ppl=1.0))


def test_the_dense_model_keeps_a_floor_of_its_own_value():
    dense = texts(2.0, 3.0, 4.0)
    assert targets.floor("text/ppl<=1x").judge(dense, dense).holds


def test_a_task_is_compared_in_pairs_of_documents():
    def task(bits):
        return {"metrics": {"t/acc": bits.count("1") / len(bits)}, "metric_info": {"t/acc": {
            "samples": len(bits), "correct": hex(int(bits, 2)), "documents": "x", "stderr": 0.1}}}
    dense = task("1111111100")
    one = targets.floor("t/acc>=-10%").judge(task("1111111000"), dense)  # the bound itself, and nothing to spare
    assert not one.holds and one.value == pytest.approx(one.bound) and one.worst < one.bound
    assert targets.floor("t/acc>=-30%").judge(task("1111111000"), dense).holds
    own = targets.floor("t/acc>=0.6").judge(task("1111111000"), dense)
    assert own.worst == pytest.approx(0.7 - targets.SURE * 0.1)
