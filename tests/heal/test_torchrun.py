"""Two processes under torchrun (gloo): the one-process result within rounding; what cannot be shared is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from oneshot import checkpoint
from oneshot.measure import Subject
from oneshot.pipeline import checks, lesson
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


def test_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^--heal full: cannot be sharded by FSDP"):
        checks.check_text(flags.build({"method": "wanda", "pattern": "2:4", "heal": "full", "heal_data": "c4"}))


@pytest.mark.parametrize("batch, processes", [(16, 2), (96, 4)])
def test_steps_that_cannot_be_shared_evenly_are_refused(batch, processes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cfg = flags.build({"method": "wanda", "pattern": "2:4", "heal": "full", "heal_data": "c4", "heal_seqlen": 16,
                       "heal_batch": batch})
    with pytest.raises(ValueError, match=f"^--heal-batch {batch}: {batch // 16} windows of 16"):
        lesson.share(Subject(None, None, cfg, {}), Path("nowhere"), "full")
