"""Two processes under torchrun (gloo): the one-process result within rounding; what cannot be shared is refused."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import tiny
import torch

from oneshot import checkpoint
from oneshot.checkpoint import verify
from oneshot.heal.text import memory
from oneshot.measure import Subject
from oneshot.pipeline import lesson
from oneshot.report import page
from oneshot.runtime import distributed
from oneshot.settings import flags


def argv(place, out):
    return tiny.flags(place, "--no-dense", method="wanda", pattern="2:4", heal="full", heal_tokens="400",
                      heal_data=place / "calibration.txt", heal_seqlen=16, heal_batch=32, save=out, evaluate="none",
                      results=out.with_name("runs"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What tiny.make makes; beside it `1`, the result of one process."""
    folder = tmp_path_factory.mktemp("place")
    place = tiny.make(folder / "place")
    assert tiny.main(*argv(place, folder / "1")) == 0
    return place


def test_two_processes_give_the_result_of_one_within_rounding(place, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "oneshot",
             "prune", *map(str, argv(place, tmp_path / "2"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    folders = (place.with_name("1"), tmp_path / "2")
    one, two = map(tiny.weights, folders)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    told = [checkpoint.read_manifest(folder)["record"]["heal"]["full"] for folder in folders]
    assert told[0]["steps"] == told[1]["steps"] > 5
    assert told[0]["held_out_after"] == pytest.approx(told[1]["held_out_after"], rel=1e-3)
    assert not (tmp_path / "2" / ".oneshot" / "heal").exists()


def plain(*argv):
    """The program in this process, without pictures."""
    page._pictures = lambda records: []
    return tiny.main(*argv)


def test_lora_in_two_processes_gives_the_result_of_one_within_rounding(place, tmp_path):
    own = ["--heal", "lora", "--lora.r", "2", "--heal-tokens", "200"]
    for n in (1, 2):
        codes = processes.together(n, tmp_path / f"said{n}", plain, *argv(place, tmp_path / str(n)), *own)
        assert codes == [0] * n, processes.said(tmp_path / f"said{n}")
    one, two = (tiny.weights(tmp_path / name) for name in "12")
    assert any(not torch.equal(one[name], t) for name, t in tiny.weights(place.with_name("1")).items())
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(one[name] == 0, two[name] == 0)
    told = [checkpoint.read_manifest(tmp_path / name)["record"]["heal"]["lora"] for name in "12"]
    assert told[0]["steps"] == told[1]["steps"] > 5 and told[0]["merge_error"] == told[1]["merge_error"] == 0
    assert told[0]["held_out_after"] == pytest.approx(told[1]["held_out_after"], rel=1e-3)


def program(port, *argv):
    """The program in this process of several, sharded."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "MASTER_PORT": str(port)}
    return plain(*argv)


def full_disk(port, *argv):
    """The program, in which process 1 cannot write all of its shard of the fourth checkpoint."""
    from oneshot.heal.text import trainer

    real = trainer.Shards.on_save

    def on_save(self, args, state, *more, **kwargs):
        if state.global_step == 4 and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return real(self, args, state, *more, **kwargs)
    trainer.Shards.on_save = on_save
    return program(port, *argv)


def dying(port, *argv):
    """The program, in which process 1 dies in the sixth step; it says its steps."""
    from oneshot.heal.text import trainer

    real = trainer.TextTrainer.training_step

    def step(self, *args, **kwargs):
        print(self.state.global_step, flush=True)
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


def test_sharded_as_whole_and_after_a_full_disk_and_a_kill(place, tmp_path):
    """By FSDP2: what a process gives that holds all weights, within rounding; zeros and resumed bits exactly."""
    whole, broken = argv(place, tmp_path / "whole"), argv(place, tmp_path / "broken")
    assert processes.together(2, tmp_path / "full", full_disk, processes.port(), *broken) == [2, 2]
    [line] = processes.said(tmp_path / "full").splitlines()
    assert line.startswith(f"error: process 1: --save {tmp_path / 'broken'}: cannot be written (")
    assert processes.together(2, tmp_path / "said", dying, processes.port(), *broken)[1] == 9
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: ") and "resumes" in line
    assert (tmp_path / "said" / "1.out").read_text().split() == ["3", "4", "5"]
    ports = [processes.port(), processes.port()]
    codes = processes.together(2, tmp_path / "then", continuing, ports, whole, broken)
    assert codes == [0, 0], processes.said(tmp_path / "then")
    first, share = (tmp_path / "then" / "1.out").read_text().split()[-2:]
    assert int(first) > 0 and 0.4 < float(share) <= 0.6
    folders = place.with_name("1"), tmp_path / "whole", tmp_path / "broken"
    told = [checkpoint.read_manifest(folder)["record"]["heal"]["full"] for folder in folders]
    assert told[1]["steps"] == told[0]["steps"] and told[1]["sharded"] == 2
    assert told[1]["held_out_after"] == pytest.approx(told[0]["held_out_after"], rel=1e-3)
    assert told[1]["held_out_after"] < told[1]["held_out_before"]
    one, two, resumed = map(tiny.weights, folders)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(one[name] == 0, two[name] == 0) and torch.equal(two[name], resumed[name])
    assert verify.main([str(tmp_path / "broken"), "--quiet"]) == 0


def least(folder):
    """In each of two processes, of which the second has less memory: what a step is planned with."""
    distributed.start()
    memory.environment.free_memory = lambda _: 1000 - 100 * distributed.rank()
    (folder / str(distributed.rank())).write_text(str(memory.least_free(torch.device("cpu"))))
    distributed.end()


def test_all_compute_a_step_as_the_process_with_least_memory_must(tmp_path):
    assert processes.together(2, tmp_path, least, tmp_path) == [0, 0], processes.said(tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["450", "450"]  # half: they share the machine


@pytest.mark.parametrize("batch, processes", [(16, 2), (96, 4)])
def test_steps_that_cannot_be_shared_evenly_are_refused(batch, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cfg = flags.build({"method": "wanda", "pattern": "2:4", "heal": "full", "heal_data": "c4", "heal_seqlen": 16,
                       "heal_batch": batch})
    with pytest.raises(ValueError, match=f"^--heal-batch {batch}: {batch // 16} windows of 16"):
        lesson.share(Subject(None, None, cfg, {}), Path("nowhere"), "full")
