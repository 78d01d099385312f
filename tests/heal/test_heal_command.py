"""`--heal` by command: the record, a run that is interrupted, what is refused."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import plain_pages  # noqa: F401

from oneshot import checkpoint, models
from oneshot.prune import loop
from oneshot.runtime import environment
from oneshot.settings import flags

pytestmark = pytest.mark.usefixtures("plain_pages")


def test_a_command_heals_and_the_record_says_so(tmp_path):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", heal="block,distil", save=place / "out",
                                 **{"block.steps": 3, "distil.steps": 3})) == 0
    record = checkpoint.read_manifest(place / "out")["record"]
    assert record["heal"]["distil"]["steps"] == 3
    assert all(b["heal"]["block"]["steps"] == 3 and b["seconds"]["heal"] > 0 for b in record["blocks"])
    assert record["settings"]["healing"] == {"block": {"unit": "block", "steps": 3, "lr": 0.02}, "distil": {
        "steps": 3, "lr": record["settings"]["healing"]["distil"]["lr"]}}


def test_an_interrupted_run_with_healing_ends_with_the_same_bits(tmp_path, monkeypatch):
    place = tiny.make(tmp_path)

    def argv(name):
        return tiny.flags(place, "--no-dense", method="sparsegpt", heal="block,distil", dense_target=0.5,
                          save=place / name, **{"block.steps": 4, "distil.steps": 4})
    assert tiny.main(*argv("whole")) == 0
    real, calls = loop.prune_block, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(loop, "prune_block", stop)
    assert tiny.main(*argv("broken")) == 130
    monkeypatch.setattr(loop, "prune_block", real)
    assert tiny.main(*argv("broken")) == 0
    whole, broken = (load_file(place / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[n], broken[n]) for n in whole)


@pytest.mark.parametrize("flag, value", [("block.steps", 0), ("distil.lr", 0.0), ("block.lr", 1.0)])
def test_useless_settings_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag}"):
        flags.build({"method": "wanda", "pattern": "0.5", "heal": flag.split(".")[0], flag: value})


@pytest.mark.parametrize("methods, right", [("distil,block", "block,distil"), ("block,block", "block"),
                                            ("block,distil,block", "block,distil"), ("distil,distil", "distil")])
def test_block_behind_another_method_or_itself_is_refused(methods, right):
    with pytest.raises(ValueError, match=f"^--heal {methods}: .*: --heal {right}$"):
        flags.build({"method": "wanda", "pattern": "0.5", "heal": methods})


def test_unknown_method():
    with pytest.raises(ValueError, match="--heal magic: no such method; there are block, distil"):
        flags.build({"method": "wanda", "pattern": "0.5", "heal": "magic"})


@pytest.mark.parametrize("method, words", [("distil", "--heal distil: trains the whole model"),
                                           ("block", "--block.unit parts: block 0")])
def test_healing_that_cannot_be_is_refused_before_the_first_row(tmp_path, capsys, monkeypatch, method, words):
    def no_parts(block):
        raise ValueError("nothing here")
    monkeypatch.setattr(environment, "total_memory", lambda device: 1000)
    monkeypatch.setattr(models, "mlp", no_parts)
    place, own = tiny.make(tmp_path), {"block": {"block.unit": "parts"}, "distil": {}}[method]
    argv = tiny.flags(place, "--no-dense", "--heal", method, method="magnitude,wanda", **own)
    assert tiny.main(*argv) == 2
    assert words in capsys.readouterr().err and not list((place / "runs").glob("*.json"))
