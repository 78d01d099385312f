"""`oneshot plan`: what it prints, what it chooses, what it refuses; the command it ends with is one that runs."""

import shlex

import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401

from oneshot import __main__ as dispatcher
from oneshot import models
from oneshot.data import choose
from oneshot.pipeline import forecast, machine, plan_command
from oneshot.pipeline.plan import allocated, make_plan, pruning_job
from oneshot.pipeline.task import passes, task_of
from oneshot.prune import loop
from oneshot.settings import flags

SPEEDS = dict.fromkeys(forecast.KINDS, 1e9)


@pytest.fixture(autouse=True)
def as_measured(monkeypatch):
    """A machine of a known size and speed."""
    monkeypatch.setattr(machine, "speeds", lambda *_: SPEEDS)
    monkeypatch.setattr(machine, "resident", lambda: 2**29)


def words(place, *more, **changed):  # noqa: F811
    return [str(a) for a in tiny.flags(place, "--no-dense", *more, **{"method": "sparsegpt"} | changed)]


def said(capfd, *argv):
    """(exit code, what it printed, the error)."""
    code = dispatcher.main(["plan", *argv])
    out, err = capfd.readouterr()
    return code, out, err.splitlines()


def planned(*argv, limit=2**40):
    given = flags.read(list(argv))
    return plan_command.plan(flags.expand(given), given, limit)


@pytest.mark.usefixtures("plain_pages")
def test_it_prints_a_plan_and_the_command(place, tmp_path, capfd):  # noqa: F811
    argv = words(place, save=tmp_path / "out", results=tmp_path / "runs")
    code, out, err = said(capfd, "--memory", "8GiB", *argv)
    assert code == 0 and not err
    for part in ("block", "Gram matrices", "activations", "outside the blocks", "PEAK, of 8", "finished blocks",
                 "calibrate and prune", "all"):
        assert part in out
    last = shlex.split(out.splitlines()[-1])
    assert last == ["oneshot", "prune", *argv]
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()
    assert dispatcher.main(last[1:]) == 0


@pytest.mark.usefixtures("plain_pages")
def test_what_it_chooses_runs(place, tmp_path, capfd, monkeypatch):  # noqa: F811
    argv = words(place, save=tmp_path / "out", results=tmp_path / "runs")
    here, away = planned(*argv), planned(*argv, "--offload", "disk")
    assert away.peak < here.peak
    code, out, _ = said(capfd, "--memory", f"{(here.peak + away.peak) / 2**21:.6f}MiB", *argv)
    last = shlex.split(out.splitlines()[-1])
    assert code == 0 and last[-2:] == ["--offload", "disk"]
    assert dispatcher.main(last[1:]) == 0


def test_what_is_given_stays(place):  # noqa: F811
    argv = words(place)
    limit = planned(*argv).peak - 1
    assert list(planned(*argv, limit=limit).flags) == ["offload"]
    assert not planned(*argv, "--offload", "disk", limit=limit).flags
    assert list(planned(*argv, "--offload", "none", limit=limit).flags) == ["eval_batch_size"]
    with pytest.raises(ValueError, match="--memory"):
        planned(*argv, "--offload", "none", "--eval-batch-size", "4", limit=limit)


def test_what_cannot_be_on_disk_stays_in_memory(place, monkeypatch):  # noqa: F811
    argv = words(place)
    limit = planned(*argv, "--eval-batch-size", "1", "--batch-size", "1").peak - 4000
    assert "offload" in planned(*argv, limit=limit).flags
    monkeypatch.setattr(plan_command.offloading.importlib.util, "find_spec", lambda name: None)  # no accelerate
    with pytest.raises(ValueError, match="with the whole model in memory"):
        planned(*argv, limit=limit)


def test_computing_as_stored_takes_less(tmp_path, monkeypatch):
    """Activations of half the size, no second copy of a block; speeds are those of the dtype."""
    place, asked = tiny.make(tmp_path), []  # noqa: F811
    tiny.save_model(place / "model", dtype=torch.bfloat16)
    monkeypatch.setattr(machine, "speeds", lambda *args: asked.append(args[1]) or SPEEDS)
    wide, half = (planned(*words(place, *more)) for more in ((), ("--compute", "stored")))
    assert asked == [torch.float32, torch.bfloat16] and half.peak < wide.peak
    sizes = [{part.name: part.bytes for part in found.phases["pruning"]} for found in (wide, half)]
    assert sizes[0]["activations"] == 2 * sizes[1]["activations"]
    assert sizes[0]["block, computing"] > sizes[1]["block, computing"] == 0


@pytest.mark.parametrize("more", [("--heal", "block"), ("--shrink", "0.7"), ("--divergence",), ("--latency",),
                                  ("--method", "gradient"), ("--quantise", "int4")])
def test_what_a_plan_does_not_know(more, place, capfd):  # noqa: F811
    code, _, [line] = said(capfd, *words(place, *more))
    assert code == 2 and line.startswith(f"error: {more[0]}") and "a plan does not know what it takes" in line


def test_passes(place):  # noqa: F811
    """As many as there are: the calls of the first block while one block is pruned."""
    for more in ((), ("--true-sequential",), ("--dense-target", "0.5"), ("--allocate", "owl"),
                 ("--true-sequential", "--dense-target", "0.5")):
        [cfg] = flags.parse(words(place, "--pattern", "0.5", *more, nsamples=1, evaluate="none", pattern=None))
        model = models.load(place / "model")[0]
        calls, first = [], models.blocks(model)[1][0]
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        tokens = choose.calibration(cfg, model, models.load(place / "model")[1])
        calls.clear()
        [plan] = allocated([cfg], model, [make_plan(cfg, model)], tokens)
        loop.prune_model(model, tokens.ids, None, pruning_job(cfg, plan, tokens))
        probes = 1 + bool(cfg.allocate != "uniform")  # what the block returns is asked before
        teacher = bool(cfg.dense_target)  # a copy of the block takes its hooks along
        assert len(calls) - probes == passes(cfg), (more, len(calls), teacher)


def test_it_refuses_in_one_line(place, tmp_path, capfd, monkeypatch):  # noqa: F811
    argv = words(place)
    code, _, [line] = said(capfd, "--memory", "100MB", *argv)
    assert code == 2 and line.startswith("error: --memory 0.0931 GiB: the run takes 0.56")
    assert "with --offload disk and the smallest batches; the largest parts: the program 0.5" in line
    for text in ("24 parsecs", "0GiB", "-1", ""):
        assert said(capfd, f"--memory={text}", *argv)[0] == 2
    assert said(capfd, "--memory", "1GiB", *words(place, model=tmp_path))[2][-1].startswith("error: --model")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in said(capfd, "--memory", "1GiB", *words(place, model=tmp_path / "a.gguf"))[2][-1]
    assert "no such flag" in said(capfd, "--memory", "1GiB", *argv, "--no-such-flag")[2][-1]
    monkeypatch.setattr(plan_command.shutil, "disk_usage", lambda _: plan_command.shutil._ntuple_diskusage(9, 9, 9))
    code, _, [line] = said(capfd, "--memory", "1GiB", *argv, "--save", str(tmp_path / "out"))
    assert code == 2 and line.startswith("error: --save: the runs write") and "has 9e-09 GB free" in line


def test_without_memory_it_is_what_is_free(place, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setattr(plan_command.environment, "free_memory", lambda device: 3 * 2**30)
    assert "PEAK, of 3" in said(capfd, *words(place))[1]
    monkeypatch.setattr(plan_command.environment, "free_memory", lambda device: None)
    assert said(capfd, *words(place))[2][-1].startswith("error: --memory: this system")


def test_several_runs(place):  # noqa: F811
    one = planned(*words(place, method="sparsegpt"))
    both = planned(*words(place, method="wanda,sparsegpt"))
    with_dense = planned(*[w for w in words(place, method="wanda,sparsegpt") if w != "--no-dense"])
    assert both.peak == one.peak
    assert sum(one.seconds.values()) < sum(both.seconds.values()) < sum(with_dense.seconds.values())


@pytest.mark.parametrize("text, size", [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("800MB", 8e8),
                                        ("1.5g", 1.5 * 2**30), ("2 MiB", 2 * 2**20)])
def test_sizes(text, size):
    assert plan_command.size(text) == size


def test_a_gpu_is_planned_apart(place, monkeypatch):  # noqa: F811
    argv = words(place)
    monkeypatch.setattr(plan_command.environment, "total_memory", lambda device: 2**30)
    found = planned(*argv)
    assert found.limits[1] == 2**30 and "GPU" in plan_command.shown(found)
    monkeypatch.setattr(plan_command.environment, "total_memory", lambda device: 10)
    with pytest.raises(ValueError, match="--device: its memory"):
        planned(*argv)


def test_processes_share_windows_and_linears(place, monkeypatch):  # noqa: F811
    argv = words(place, nsamples=8, batch_size=2, eval_windows=8, offload="disk", save=place / "shared")
    one = planned(*argv)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # on each of two machines
    four = planned(*argv)
    assert four.peak == 2 * forecast.peak(four.phases)[1] < 2 * one.peak and four.processes == 2
    for phase, part, n in (("pruning", "activations", 4), ("evaluating", "activations", 4),
                           ("pruning", "block, stored", 1), ("pruning", "Gram matrices", 1)):
        sizes = [next(p.bytes for p in found.phases[phase] if p.name == part) for found in (one, four)]
        assert sizes[0] == n * sizes[1] > 0
    shape = plan_command.shape_of(models.load(place / "model")[0])
    [cfg] = flags.parse(argv)
    task = task_of(cfg, *models.load(place / "model"))
    alone = plan_command.replace(task, processes=1, calibration=(8, task.calibration[1]))
    mine, its = (forecast.pruning(shape, t) for t in (task, alone))
    assert all(4 * mine[kind] == pytest.approx(its[kind]) for kind in ("product", "solve"))
    assert one.disk == four.disk
    assert "PEAK, of 1.02e+03, 2 processes" in plan_command.shown(four)
    assert plan_command.start() == "torchrun --nnodes 2 --nproc-per-node 2 -m oneshot"
    assert not planned(*argv, limit=four.peak + 1).flags
    assert planned(*argv, limit=four.peak - 1).flags
    with pytest.raises(ValueError, match="and there are 2 processes; the largest parts of each: ") as refused:
        planned(*argv, limit=2**29)
    assert float(str(refused.value).partition("the run takes ")[2].split()[0]) > 0.5  # of both
    with pytest.raises(ValueError, match=r"^torchrun: 8 calibration windows are 1 batches"):
        planned(*argv, "--batch-size", "8")


def test_speeds_are_measured(place, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.undo()
    monkeypatch.setattr(machine, "N", 32)
    monkeypatch.setattr(machine, "LONG", 0.001)
    [cfg] = flags.parse(words(place))
    found = machine.speeds("cpu", torch.float32, plan_command.pruning_chain(cfg), plan_command.pattern_of(cfg),
                           place / "model" / "model.safetensors", tmp_path)
    assert set(found) == set(forecast.KINDS) and all(0 < v < 1e15 for v in found.values())
    found = machine.speeds("cpu", torch.bfloat16, (), None, None, tmp_path)
    assert set(found) == set(forecast.KINDS) - {"solve", "choice"}
    assert not list(tmp_path.iterdir()) and machine.resident() > 10**8
