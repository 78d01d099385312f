"""`torchrun -m oneshot prune`: two processes (gloo) share a run; one that dies ends it, and the command continues."""

import contextlib
import datetime
import json
import os
import signal
import time

import families
import processes
import pytest
import tiny
import torch
from tiny import plain_pages  # noqa: F401

from oneshot import __main__, calibrate, checkpoint
from oneshot.checkpoint import verify
from oneshot.models import offload
from oneshot.pipeline import api, checks, forecast, machine, run
from oneshot.pipeline.fit import command as fit
from oneshot.prune import linear, loop
from oneshot.report import page
from oneshot.runtime import distributed
from oneshot.settings import flags


def command(place, out, *more, **changed):
    """A run of 8 windows in 4 batches that saves to `out`."""
    return tiny.flags(place, *more, **{"method": "sparsegpt", "pattern": "2:4", "save": out, "batch_size": 2,
                                       "results": f"{out}.runs"} | changed)


def program(*argv):
    """The program, without pictures."""
    page._pictures = lambda records: []
    return tiny.main(*argv)


def both(folder, *argv, n=2):
    """The exit codes of n processes that run the program."""
    return processes.together(n, folder / "said", program, *argv)


def die(rank, number, *argv):
    """The program, in which process `rank` is killed when it comes to block `number`."""
    real = loop.prune_block

    def dying(job, block, *rest, **more):
        if os.environ["RANK"] == str(rank) and block.number == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(job, block, *rest, **more)
    loop.prune_block = dying
    return program(*argv)


def hang(*argv):
    """The program with little patience, in which process 1 does nothing any more when it comes to the second block."""
    distributed.LIMIT = datetime.timedelta(seconds=3)
    real = loop.prune_block

    def hanging(job, block, *rest, **more):
        if os.environ["RANK"] == "1" and block.number == 1:
            time.sleep(6)
            os._exit(9)
        return real(job, block, *rest, **more)
    loop.prune_block = hanging
    return program(*argv)


def wrong(*argv):
    """The program, in which a linear of process 1 cannot be solved."""
    real = linear.solve

    def failing(job, weight, statistics):
        if os.environ["RANK"] == "1":
            raise ValueError(f"{weight.name}: its inputs are not finite")
        return real(job, weight, statistics)
    linear.solve = failing
    return program(*argv)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What tiny.make makes; beside it `two`, the result of two processes, and `one`, that of one."""
    place = tiny.make(tmp_path_factory.mktemp("place"))
    assert both(place, *command(place, place / "two")) == [0, 0], processes.said(place / "said")
    assert tiny.main(*command(place, place / "one")) == 0
    return place


def runs(place, name):
    """{method: record}."""
    return {method: record for (method, _), record in tiny.records(place / f"{name}.runs").items()}


def test_two_processes_give_the_result_of_one(place):
    one, two = runs(place, "one"), runs(place, "two")
    [ppl] = one["sparsegpt"]["metrics"]
    assert two["sparsegpt"]["metrics"][ppl] == pytest.approx(one["sparsegpt"]["metrics"][ppl], rel=1e-3)
    first, other = (tiny.weights(place / name) for name in ("one", "two"))
    same = sum(int(((first[n] == 0) == (other[n] == 0)).sum()) for n in first)
    assert same >= 0.999 * sum(t.numel() for t in first.values())
    assert one["sparsegpt"]["warnings"] == two["sparsegpt"]["warnings"]
    assert [row["name"] for row in one["sparsegpt"]["layers"]] == [row["name"] for row in two["sparsegpt"]["layers"]]
    assert not (place / "two" / ".oneshot").exists()


def test_nothing_but_a_pruned_runs_identity_depends_on_how_many_there_are(place):
    one, two = runs(place, "one"), runs(place, "two")
    assert one["sparsegpt"]["run_id"] != two["sparsegpt"]["run_id"]
    assert one["dense"]["run_id"] == two["dense"]["run_id"] and one["dense"]["metrics"] == two["dense"]["metrics"]
    assert "processes" not in one["sparsegpt"]["environment"] and two["sparsegpt"]["environment"]["processes"] == 2


def test_only_the_first_speaks(place):
    assert (place / "said" / "1.out").read_text() == "" == (place / "said" / "1.err").read_text()
    assert "sparsegpt" in (place / "said" / "0.out").read_text()


@pytest.mark.parametrize("rank, offload", [(0, "disk"), (1, "none")])
def test_a_killed_process_ends_all_and_the_same_command_continues(place, tmp_path, rank, offload):
    argv = command(place, tmp_path / "out", "--no-dense", evaluate="none", offload=offload)
    codes = processes.together(2, tmp_path / "said", die, rank, 2, *argv)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == (1 if rank == 0 else 2)
    said = processes.said(tmp_path / "said").splitlines()
    assert len(said) == rank  # rank 0 says it
    assert not said or (said[0].startswith("error: another process has ended") and "same command resumes" in said[0])
    kept = sorted(file.name for file in (tmp_path / "out" / ".oneshot").glob("block_*"))
    assert kept == ["block_00000.safetensors", "block_00001.safetensors"]
    assert both(tmp_path, *argv) == [0, 0]
    whole, continued = (tiny.weights(folder) for folder in (place / "two", tmp_path / "out"))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_a_process_that_no_longer_answers_is_not_waited_for(place, tmp_path):
    assert processes.together(2, tmp_path / "said", hang, *command(place, tmp_path / "out")) == [2, 9]
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: another process has ended, or does not answer (") and "imed out" in line


def test_an_error_in_another_process_is_one_line(place, tmp_path):
    assert processes.together(2, tmp_path / "said", wrong, *command(place, tmp_path / "out")) == [2, 2]
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: process 1: model.layers.0.") and "its inputs are not finite" in line


def test_too_few_windows_are_one_line(place, tmp_path):
    argv = command(place, tmp_path / "out", nsamples=2, batch_size=1)
    assert both(tmp_path, *argv, n=3) == [2, 2, 2]
    [line] = processes.said(tmp_path / "said").splitlines()
    assert line.startswith("error: torchrun: 2 calibration windows") and "--batch-size" in line


@pytest.mark.parametrize("windows, batch, held, fits", [(5, 4, (), False), (9, 4, (), True), (2, 1, (), False),
                                                        (9, 4, (0,), False), (3, 1, (), True)])
def test_every_process_needs_a_batch_to_train_on(windows, batch, held, fits, monkeypatch):
    monkeypatch.setattr("oneshot.runtime.distributed.ranks", lambda: 3)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=f"^torchrun: {windows} calibration"):
        calibrate.check_parts(windows, batch, held)


WHOLE = {  # settings of which parts run in rank 0 alone, or together in other ways
    "gradients, allocation, rounding": {"method": "taylor", "pattern": "0.5", "allocate": "owl",
                                        "quantise": "int8:row,*.1.*=none", "scale_columns": ""},
    "whole-model healing": {"method": "wanda", "heal": "block,distil", "block.steps": 4, "distil.steps": 4},
    "shared inputs": {"method": "wanda,magnitude", "shared_inputs": ""},
    "before pruning": {"method": "wanda", "sensitivity": "kind"},
    "a smaller model": {"method": "wanda", "shrink": 0.6, "tries": 1, "shrink_method": "wanda"},
}


EXPERTS = {"method": "sparsegpt", "pattern": "0.5", "eval_windows": 6}
STREAMED = {  # name: (whose result it must be, settings); "apart": as if the other process were on another machine
    "llama": ("two", {}),
    "experts in memory": ("experts in memory", EXPERTS),
    "experts": ("experts in memory", EXPERTS | {"offload": "disk"}),
    "experts, apart": ("experts in memory", EXPERTS | {"offload": "disk"}),
    "experts, not saved": ("experts in memory", EXPERTS | {"offload": "disk", "save": None}),
}


def every(place, folder):
    """The program with each of WHOLE, then of STREAMED, one after the other, in this process of two."""
    watch_disk()
    ports = iter(json.loads((folder / "ports.json").read_text()))
    argvs = [settings(place, folder / name, changed) for name, changed in WHOLE.items()]
    argvs += [streamed(place, folder, name) for name in STREAMED]
    for argv, port in zip(argvs, ports):  # noqa: B905 - one is left
        os.environ["MASTER_PORT"] = str(port)
        offload.visible = (lambda files: False) if "experts, apart" in " ".join(map(str, argv)) else VISIBLE
        if code := program(*argv):
            return code
    os.environ["MASTER_PORT"] = str(next(ports))
    machine.speeds = lambda *_: dict.fromkeys(forecast.KINDS, 1e9)
    return __main__.main(["plan", *map(str, command(place, folder / "planned", offload="disk"))])


VISIBLE = offload.visible


def watch_disk():
    """Raise where two blocks of a model on disk are in memory, or another process than the first writes one."""
    become, write = offload.become, offload.save_file

    def becoming(t, values):
        twin = become(t, values)
        for model, disk in offload._ON_DISK.items():
            there = {disk.block_of(n) for n, p in model.named_parameters() if not p.is_meta} - {None}
            if len(there) > 1:
                raise RuntimeError(f"blocks {there} at once")
        return twin

    def writing(*args):
        if distributed.rank():
            raise RuntimeError("another process than the first writes")
        write(*args)
    offload.become, offload.save_file = becoming, writing


def streamed(place, folder, name):
    """The command line of one of STREAMED."""
    if name == "llama":
        return command(place, folder / name, offload="disk")
    return command(folder / "mixtral", folder / name, **{"results": folder / f"{name}.runs"} | STREAMED[name][1])


def settings(place, out, changed):
    """The command line of one of WHOLE."""
    switches = [f"--{name.replace('_', '-')}" for name, value in changed.items() if value == ""]
    values = {name: value for name, value in changed.items() if value != ""}
    return command(place, out, "--no-dense", *switches, **{"eval_windows": 6} | values)


@pytest.fixture(scope="module")
def others(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    families.tiny("mixtral", dtype=torch.bfloat16).save_pretrained(folder / "mixtral" / "model", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder / "mixtral" / "model")
    for number, text in enumerate(("calibration", "evaluation")):
        tiny.save_text(folder / "mixtral" / f"{text}.txt", number)
    (folder / "ports.json").write_text(json.dumps([processes.port() for _ in (*WHOLE, *STREAMED, "plan")]))
    assert processes.together(2, folder, every, place, folder) == [0, 0], processes.said(folder)
    return folder


@pytest.mark.usefixtures("plain_pages")
@pytest.mark.parametrize("name", WHOLE)
def test_everything_else_comes_out_as_in_one_process(place, others, tmp_path, name):
    assert tiny.main(*settings(place, tmp_path / name, WHOLE[name])) == 0
    one, two = (tiny.records(folder / f"{name}.runs") for folder in (tmp_path, others))
    assert one.keys() == two.keys()
    for key, record in one.items():
        near = 0.05 if "heal" in WHOLE[name] else 2e-3
        for metric, value in record["metrics"].items():
            assert two[key]["metrics"][metric] == pytest.approx(value, rel=near, abs=1e-6), metric
        if "heal" not in WHOLE[name]:
            assert [row["zeros"] for row in record["layers"]] == [row["zeros"] for row in two[key]["layers"]]
    for found in (tmp_path / name).rglob("model.safetensors"):
        folder = found.parent.relative_to(tmp_path)
        assert checkpoint.read_manifest(others / folder)["record"]["status"] == "finished"


@pytest.mark.parametrize("name", STREAMED)
def test_from_disk_two_processes_give_the_bits_that_they_give_in_memory(place, others, name):
    whose = STREAMED[name][0]
    want, found = (place if whose == "two" else others) / whose, others / name
    records = [tiny.records(folder.with_name(f"{folder.name}.runs")) for folder in (want, found)]
    assert len(records[0]) == 2 and records[0].keys() == records[1].keys()
    for key, record in records[0].items():
        other = records[1][key]
        for part in ("run_id", "metrics", "metric_info", "warnings", "sparsity", "bytes", "model", "skipped"):
            assert record[part] == other[part], part
        for mine, its in zip(record["layers"], other["layers"], strict=True):
            assert mine | {"seconds": 0} == its | {"seconds": 0}
    if STREAMED[name][1].get("save", "") is None:
        assert not found.exists()
        return
    weights, its = tiny.weights(want), tiny.weights(found)
    assert weights.keys() == its.keys() and all(torch.equal(t, its[n]) for n, t in weights.items())
    assert len(list(found.glob("*.safetensors"))) == (1 if name == "experts in memory" else 1 + len(
        {row["block"] for row in record["layers"]}))
    assert verify.main([str(found), "--quiet", "--offload", "disk"]) == 0


def test_a_plan_is_for_as_many_processes(others):
    lines = (others / "0.out").read_text().splitlines()
    assert lines[-1].startswith("torchrun --nproc-per-node 2 -m oneshot prune --model ")
    assert any(", 2 processes" in line for line in lines) and not (others / "1.out").read_text()


def test_help_ends_in_all(tmp_path):
    assert both(tmp_path, "--help") == [0, 0]
    assert (tmp_path / "said" / "1.out").read_text() == "" and "--method" in (tmp_path / "said" / "0.out").read_text()


def test_what_cannot_be_shared_is_refused(monkeypatch, place, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^torchrun: shares the work of"):
        api.prune(None, calibration=torch.zeros(1, 4, dtype=torch.long))
    [cfg] = flags.parse(["--method", "dense"])
    with pytest.raises(ValueError, match=r"^torchrun: shares the work of"):
        run.run(cfg)
    argv = ["--model", place / "model", "--target", "parameters=0.5", "--save", place / "fit"]
    assert fit.main([str(word) for word in argv]) == 2
    assert capsys.readouterr().err.startswith("error: torchrun: shares the work of")
    assert not (place / "fit").exists()
    assert __main__.main(["compare", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: torchrun: shares the work of")
    monkeypatch.setattr("oneshot.runtime.environment.check_device", lambda *args: None)
    with pytest.raises(ValueError, match=r"^--device cuda:1: is one GPU for all"):
        checks.check_devices(flags.build({"method": "wanda", "pattern": "2:4", "device": "cuda:1"}))
