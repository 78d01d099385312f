"""Two processes under torchrun (gloo): the one-process result within rounding; what cannot be shared is refused."""

import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import tiny
import torch
from tiny import plain_pages  # noqa: F401

from oneshot import checkpoint
from oneshot.checkpoint import verify
from oneshot.measure import Subject
from oneshot.pipeline import checks, lesson
from oneshot.report import page
from oneshot.settings import flags


def argv(place, out):
    return tiny.flags(place, "--no-dense", method="wanda", pattern="2:4", heal="full", heal_tokens="400",
                      heal_data=place / "calibration.txt", heal_seqlen=16, heal_batch=32, save=out, evaluate="none",
                      results=out.with_name("runs"))


def test_two_processes_give_the_result_of_one_within_rounding(tmp_path):
    place = tiny.make(tmp_path / "place")
    assert tiny.main(*argv(place, tmp_path / "1")) == 0
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "oneshot",
             "prune", *map(str, argv(place, tmp_path / "2"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (tiny.weights(tmp_path / name) for name in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    told = [checkpoint.read_manifest(tmp_path / name)["record"]["heal"]["full"] for name in "12"]
    assert told[0]["steps"] == told[1]["steps"] > 5
    assert told[0]["held_out_after"] == pytest.approx(told[1]["held_out_after"], rel=1e-3)
    assert not (tmp_path / "2" / ".oneshot" / "heal").exists()


def program(port, *argv):
    """The program in this process of several, sharded."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "MASTER_PORT": str(port)}
    page._pictures = lambda records: []
    return tiny.main(*argv)


def dying(port, *argv):
    """The program, in which process 1 dies in the sixth step."""
    from oneshot.heal.text import trainer

    real = trainer.TextTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 5 and os.environ["RANK"] == "1":
            os._exit(9)
        return real(self, *args, **kwargs)
    trainer.TextTrainer.training_step = step
    return program(port, *argv)


def continuing(ports, whole, broken):
    """In one of two processes: a run, then one that continues, which says its first step, its share of a weight."""
    from oneshot.heal.text import trainer

    real, steps, parts = trainer.TextTrainer.training_step, [], set()

    def step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        parts.update(p.to_local().numel() / p.numel() for p in self.model.trained.values())
        return real(self, *args, **kwargs)
    if code := program(ports[0], *whole):
        return code
    trainer.TextTrainer.training_step = step
    code = program(ports[1], *broken)
    print(min(steps), max(parts))
    return code


@pytest.mark.usefixtures("plain_pages")
def test_sharded_as_whole_and_after_a_kill(tmp_path):
    """By FSDP2: what two processes give that hold all weights, within rounding; zeros and resumed bits exactly."""
    place, plain = tiny.make(tmp_path / "place"), tmp_path / "plain"
    tiny.save_model(place / "model", dtype=torch.bfloat16)
    assert tiny.main(*argv(place, plain)) == 0
    whole, broken = argv(place, tmp_path / "whole"), argv(place, tmp_path / "broken")
    assert processes.together(2, tmp_path / "said", dying, processes.port(), *broken)[1] == 9
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: ") and "resumes" in line
    ports = [processes.port(), processes.port()]
    codes = processes.together(2, tmp_path / "then", continuing, ports, whole, broken)
    assert codes == [0, 0], processes.said(tmp_path / "then")
    first, share = (tmp_path / "then" / "1.out").read_text().split()[-2:]
    assert int(first) > 0 and 0.4 < float(share) <= 0.6
    one, two, resumed = (tiny.weights(folder) for folder in (plain, tmp_path / "whole", tmp_path / "broken"))
    start = tiny.weights(place / "model")
    assert any(not torch.equal(start[name], two[name]) for name in two)
    for name in one:
        torch.testing.assert_close(one[name].float(), two[name].float(), rtol=2e-2, atol=1e-4)
        assert torch.equal(one[name] == 0, two[name] == 0) and torch.equal(two[name], resumed[name])
    assert verify.main([str(tmp_path / "broken"), "--quiet"]) == 0


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, why in (("full", "needs several processes"), ("lora", "is not divided")):
        with pytest.raises(ValueError, match=f"^ACCELERATE_USE_FSDP: is set, and --heal {name} {why}"):
            checks.check_text(flags.build({"method": "wanda", "pattern": "2:4", "heal": name, "heal_data": "c4"}))


@pytest.mark.parametrize("batch, processes", [(16, 2), (96, 4)])
def test_steps_that_cannot_be_shared_evenly_are_refused(batch, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cfg = flags.build({"method": "wanda", "pattern": "2:4", "heal": "full", "heal_data": "c4", "heal_seqlen": 16,
                       "heal_batch": batch})
    with pytest.raises(ValueError, match=f"^--heal-batch {batch}: {batch // 16} windows of 16"):
        lesson.share(Subject(None, None, cfg, {}), Path("nowhere"), "full")
