"""`--offload disk`: the same weights, metrics and records as in memory, after a kill too; what cannot be is refused."""

import errno
import json
import os
import shutil
import signal

import families
import killed_runs
import processes
import pytest
import tiny
import torch
from safetensors import safe_open
from tiny import place, plain_pages  # noqa: F401

from oneshot import models
from oneshot.checkpoint import folder as writer
from oneshot.checkpoint import verify
from oneshot.models import offload
from oneshot.pipeline import offloading, run

pytestmark = pytest.mark.usefixtures("plain_pages")
RUNS = {  # family: what is done to it
    "llama": ("--method", "sparsegpt", "--pattern", "2:4"),
    "llama-tied-bias": ("--method", "wanda+refit", "--pattern", "0.5", "--allocate", "owl", "--dense-target", "0.5"),
    "mixtral": ("--method", "wanda", "--pattern", "2:4", "--divergence"),
    "gpt_oss": ("--method", "sparsegpt", "--pattern", "0.5", "--dtype", "float16"),
    "gpt2": ("--method", "wanda", "--pattern", "0.5", "--heal", "block", "--block.steps", "2", "--damage"),
    "jamba": ("--method", "sparsegpt", "--pattern", "0.5", "--true-sequential", "--gram-budget", "0.00001"),
}


def texts(folder):
    tiny.save_text(folder / "calibration.txt", 1)
    tiny.save_text(folder / "evaluation.txt", 2)
    return folder


def family(folder, name):
    """A place with the family's model in shards; the place."""
    families.tiny(name, dtype=torch.bfloat16).save_pretrained(folder / "model", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder / "model")
    return texts(folder)


def timeless(x):
    """A record without what differs from run to run."""
    if isinstance(x, dict):
        return {k: timeless(v) for k, v in x.items() if k not in ("seconds", "peak_memory_bytes", "environment")}
    return [timeless(v) for v in x] if isinstance(x, list) else x


def records(results):
    return {key: timeless(record) for key, record in tiny.records(results).items()}


def equal(folder, other):
    """Whether two checkpoints hold the same tensors, bit for bit."""
    some, others = tiny.weights(folder), tiny.weights(other)
    return some.keys() == others.keys() and all(torch.equal(t, others[n]) and t.dtype == others[n].dtype
                                                for n, t in some.items())


def pruned(place, how, *more, **changed):  # noqa: F811
    """Exit code of a run whose checkpoint and records have the name `how`."""
    return tiny.main(*tiny.flags(place, *more, **{"method": None, "pattern": None, "eval_windows": 6,
                                                  "save": place / how, "results": place / f"runs-{how}"} | changed))


@pytest.mark.parametrize("name", RUNS)
def test_bit_for_bit(name, tmp_path, capfd):
    place = family(tmp_path, name)  # noqa: F811
    assert pruned(place, "memory", *RUNS[name]) == 0, capfd.readouterr().err
    assert pruned(place, "disk", *RUNS[name], offload="disk") == 0, capfd.readouterr().err
    assert pruned(place, "spilt", *RUNS[name], offload="disk", save=None) == 0, capfd.readouterr().err
    assert equal(place / "memory", place / "disk")
    want = records(place / "runs-memory")
    assert len(want) == 2 and records(place / "runs-disk") == records(place / "runs-spilt") == want
    index = json.loads((place / "disk" / "model.safetensors.index.json").read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == names
    assert index["weight_map"].keys() == tiny.weights(place / "memory").keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tiny.weights(place / "memory").values())
    other = {f.name for f in (place / "disk").iterdir()} ^ {f.name for f in (place / "memory").iterdir()}
    assert other == {*names, "model.safetensors", "model.safetensors.index.json"}
    for how in ("none", "disk"):
        assert verify.main([str(place / "disk"), "--quiet", "--offload", how]) == 0


def test_a_changed_shard_is_found(tmp_path, capfd):
    place = family(tmp_path, "llama")  # noqa: F811
    assert pruned(place, "disk", *RUNS["llama"], offload="disk") == 0
    file = place / "disk" / "model-00003-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert verify.main([str(place / "disk"), "--quiet", "--offload", "disk"]) == 1
    assert "FAULT model.layers.1" in capfd.readouterr().out


def test_never_two_blocks_of_one_model_in_a_run(tmp_path, monkeypatch):
    place, real, counted = family(tmp_path, "mixtral"), offload.become, []  # noqa: F811

    def become(t, values):
        twin = real(t, values)
        for model, disk in offload._ON_DISK.items():
            counted.append(len({disk.block_of(n) for n, p in model.named_parameters() if not p.is_meta} - {None}))
        return twin
    monkeypatch.setattr(offload, "become", become)
    assert pruned(place, "disk", *RUNS["mixtral"], offload="disk") == 0
    assert set(counted) == {0, 1} and len(counted) > 100


def test_finished_blocks_take_no_more_room(tmp_path, monkeypatch):
    """The shard is the block's file itself: all the time, every block's bytes are on the disk once."""
    place, real, files = family(tmp_path, "llama"), writer.Folder._move, []  # noqa: F811

    def move(self, final, names):
        files.extend((self.work / f"block_0000{n}.safetensors", final / f"model-0000{n + 2}-of-00003.safetensors")
                     for n in range(2))
        assert all(block.samefile(shard) for block, shard in files)
        real(self, final, names)
    monkeypatch.setattr(writer.Folder, "_move", move)
    assert pruned(place, "disk", *RUNS["llama"], offload="disk") == 0
    assert len(files) == 2


# ---------------------------------------------------------------- killed

MOMENTS = ("within-a-block", "final-half-written", "before-manifest", "cleaning")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(place, what killed_runs reports) with `--offload disk`."""
    place = tiny.make(tmp_path_factory.mktemp("killed"))  # noqa: F811
    tiny.save_model(place / "model", dtype=torch.bfloat16)
    done = processes.script(killed_runs.__file__, place, ",".join(MOMENTS), "--offload", "disk", folder=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_continues_to_the_same_bits(killed, moment):
    place, told = killed  # noqa: F811
    (code, _), (continued, after) = told[moment]
    assert (code, continued) == (-signal.SIGKILL, 0)
    assert after == tiny.BLOCKS - (1 if moment == "within-a-block" else tiny.BLOCKS)
    assert equal(place / moment, place / "whole")
    ours, whole = (json.loads((place / name / "oneshot.json").read_text())["record"] for name in (moment, "whole"))
    assert ours["metrics"] == whole["metrics"]
    assert verify.main([str(place / moment), "--quiet"]) == 0


def test_killed_run_ends_as_in_memory(killed):
    place, _ = killed  # noqa: F811
    shutil.rmtree(place / "memory", ignore_errors=True)
    argv = tiny.flags(place, "--no-dense", method="sparsegpt", eval_windows=8, save=place / "memory")
    assert tiny.main(*argv) == 0
    assert equal(place / "memory", place / "whole")


@pytest.mark.parametrize("first, then", [("disk", "none"), ("none", "disk")])
def test_blocks_saved_the_other_way_are_pruned_again(first, then, place, tmp_path, monkeypatch):  # noqa: F811
    real = writer.Folder.save_block

    def dying(self, number, *rest):
        real(self, number, *rest)
        raise KeyboardInterrupt
    argv = tiny.flags(place, "--no-dense", save=tmp_path / "out", results=tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(writer.Folder, "save_block", dying)
        assert tiny.main(*argv, "--offload", first) == 130
    assert tiny.main(*argv, "--offload", then) == 0
    [record] = tiny.records(tmp_path / "runs").values()
    how = "with" if first == "disk" else "without"
    assert [w for w in record["warnings"] if f"was saved {how} --offload disk; it is pruned again" in w]
    assert tiny.main(*tiny.flags(place, "--no-dense", save=tmp_path / "whole", results=tmp_path / "runs2")) == 0
    assert equal(tmp_path / "out", tmp_path / "whole")


# ---------------------------------------------------------------- refused

REFUSED = {
    "--shrink": ("--shrink", "0.7"), "--heal full": ("--heal", "full", "--heal-data", "c4"),
    "--heal block,distil": ("--heal", "block,distil"), "--quantise int4": ("--quantise", "int4"),
    "--format packed": ("--format", "packed"), "--shared-inputs": ("--shared-inputs",),
    "--calibration self": ("--calibration", "self"), "--method keep": ("--method", "keep", "--pattern", "dense"),
    "--method gradient": ("--method", "gradient"), "--quantised": ("--quantised",),
    "--tasks": ("--tasks", "zeroshot7"), "--say": ("--say", "a"), "--latency": ("--latency",),
    "--sensitivity": ("--sensitivity", "linear"),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_needs_the_whole_model_is_refused(flag, place, tmp_path, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run, "load", lambda cfg: pytest.fail("it was loaded"))
    argv = tiny.flags(place, save=tmp_path / "out", results=tmp_path / "runs", offload="disk")
    assert tiny.main(*argv, *REFUSED[flag]) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: {flag}: needs the whole model in memory") and "--offload disk" in line


def test_other_refusals(place, tmp_path, capfd, monkeypatch):  # noqa: F811
    argv = tiny.flags(place, "--no-dense", save=tmp_path / "out", results=tmp_path / "runs", offload="disk")
    with monkeypatch.context() as patch:
        patch.setattr(offloading.importlib.util, "find_spec", lambda name: None)
        assert tiny.main(*argv) == 2 and "--offload disk: needs accelerate" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(offloading.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
        assert tiny.main(*argv) == 2 and f"--save {tmp_path / 'out'}: its disk has 0 GB" in capfd.readouterr().err
        assert tiny.main(*(a for a in argv if a not in ("--save", str(tmp_path / "out")))) == 2
        assert "without --save the pruned blocks wait in" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        def link(source, target):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        patch.setattr(os, "link", link)
        assert tiny.main(*argv) == 2
        assert "its file system has no hard links (Operation not permitted)" in capfd.readouterr().err
    assert tiny.main(*argv) == 0


def test_verify_and_python_refuse(place, tmp_path, capfd):  # noqa: F811
    import oneshot

    argv = tiny.flags(place, "--no-dense", "--format", "packed", save=tmp_path / "packed", results=tmp_path / "runs")
    assert tiny.main(*argv) == 0
    for more, said in ((["--twin", str(place / "model")], "--twin: compares whole models"),
                       ([], f"--offload disk: {tmp_path / 'packed'} is of format packed")):
        assert verify.main([str(tmp_path / "packed"), "--offload", "disk", *more]) == 2
        assert said in capfd.readouterr().err
    model, tokenizer = models.load(place / "model", offload="disk")
    with pytest.raises(ValueError, match="its blocks are on disk"):
        oneshot.prune(model, tokenizer, progress=False)


def test_the_shard_is_an_ordinary_file(tmp_path):
    """transformers loads it, and its header says for what the block was kept."""
    from transformers import AutoModelForCausalLM

    place = family(tmp_path, "llama")  # noqa: F811
    assert pruned(place, "disk", *RUNS["llama"], offload="disk") == 0
    model = AutoModelForCausalLM.from_pretrained(place / "disk", dtype="auto")
    assert equal_state(model, tiny.weights(place / "disk"))
    with safe_open(place / "disk" / "model-00002-of-00003.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt" and f.metadata()["number"] == "0"


def equal_state(model, weights):
    state = model.state_dict()
    return all(torch.equal(state[name], t) for name, t in weights.items())
