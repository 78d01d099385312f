"""Two processes (gloo): every part of a run gives what one process gives, and from disk the bits of memory."""

import json
import os

import families
import processes
import pytest
import tiny
import torch
from joint_runs import command, program
from tiny import plain_pages  # noqa: F401

from oneshot import __main__, checkpoint, models
from oneshot.checkpoint import verify
from oneshot.models import offload
from oneshot.pipeline import forecast, machine
from oneshot.runtime import distributed, together

WHOLE = {  # settings of which parts run in rank 0 alone, or together in other ways
    "gradients, allocation, rounding": {"method": "taylor", "pattern": "0.5", "allocate": "owl",
                                        "quantise": "int8:row,*.1.*=none,lm_head=int8:row", "scale_columns": ""},
    "whole-model healing": {"method": "wanda", "heal": "block,distil", "block.steps": 4, "distil.steps": 4},
    "shared inputs": {"method": "wanda,magnitude", "shared_inputs": ""},
    "before pruning": {"method": "wanda", "sensitivity": "kind"},
    "a smaller model": {"method": "wanda", "shrink": 0.6, "tries": 1, "shrink_method": "wanda"},
}


EXPERTS = {"method": "sparsegpt", "pattern": "0.5", "eval_windows": 6}
STREAMED = {  # name: (whose result it must be, settings); "apart": as if the other process were on another machine
    "llama in memory": ("llama in memory", {}),
    "llama": ("llama in memory", {"offload": "disk"}),
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
    """Raise where two blocks of a model on disk are in memory, or another process than the first writes one, or where
    they cannot be read any more when all is saved."""
    become, write, finish = offload.become, offload.save_file, checkpoint.Folder.finish

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

    def finishing(folder, model, *rest):
        record = finish(folder, model, *rest)
        if offload.on_disk(model):
            together.run(read_all, model)
        return record
    offload.become, offload.save_file, checkpoint.Folder.finish = becoming, writing, finishing


def read_all(model):
    for block in models.walk(model, "cpu"):
        if any(p.is_meta for p in block.module.parameters()):
            raise RuntimeError("a block was not read")


def streamed(place, folder, name):
    """The command line of one of STREAMED."""
    return command(place if "llama" in name else folder / "mixtral", folder / name, **STREAMED[name][1])


def settings(place, out, changed):
    """The command line of one of WHOLE."""
    switches = [f"--{name.replace('_', '-')}" for name, value in changed.items() if value == ""]
    values = {name: value for name, value in changed.items() if value != ""}
    return command(place, out, "--no-dense", *switches, **{"eval_windows": 6} | values)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("place"))


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
def test_from_disk_two_processes_give_the_bits_that_they_give_in_memory(others, name):
    want, found = others / STREAMED[name][0], others / name
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
    assert len(list(found.glob("*.safetensors"))) == (1 if "in memory" in name else 1 + len(
        {row["block"] for row in record["layers"]}))
    assert verify.main([str(found), "--quiet", "--offload", "disk"]) == 0


def test_a_plan_is_for_as_many_processes(others):
    lines = (others / "0.out").read_text().splitlines()
    assert lines[-1].startswith("torchrun --nproc-per-node 2 -m oneshot prune --model ")
    assert any(", 2 processes" in line for line in lines) and not (others / "1.out").read_text()
