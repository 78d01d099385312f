"""`--quantise`: killed and resumed to the same bits, what does not go together in one line, every family."""


import jobs
import pytest
import tiny
import torch
from families import FAMILIES
from families import tiny as family
from rounding import LINEAR, command, the_record
from tiny import place, plain_pages  # noqa: F401

from oneshot import models, quantise
from oneshot.checkpoint import verify
from oneshot.prune import loop
from oneshot.prune.options import Options
from oneshot.quantise import grids, mixed, walk

pytestmark = pytest.mark.usefixtures("plain_pages")
BLOCKS = tiny.BLOCKS
TEXT = {"heal": "full", "heal_data": "calibration.txt", "heal_tokens": 200, "heal_seqlen": 16, "heal_batch": 32}


@pytest.mark.parametrize(("more", "after"), [
    ({}, 1), ({}, BLOCKS), ({}, BLOCKS + 1), ({}, 2 * BLOCKS - 1), ({"quantiser": "joint"}, 1),
    ({"method": "dense"}, 1), (TEXT, BLOCKS + 1), ({"heal": "distil", "distil.steps": 2, "nsamples": 12}, BLOCKS + 1),
    ({"shrink": 0.7, "tries": 1, "nsamples": 12, "pattern": "dense"}, BLOCKS + 1)])
def test_killed_and_resumed_it_is_bit_identical(place, tmp_path, monkeypatch, more, after):  # noqa: F811
    """Three blocks are pruned, three are rounded: wherever it is killed, the same command ends with the same files."""
    monkeypatch.chdir(place)  # --heal-data

    def run(name):
        return command(place, save=tmp_path / name, results=tmp_path / f"{name}.runs", **more)
    assert run("whole") == 0
    with tiny.interrupted(after):
        assert run("cut") == 130
    solved, prune_block = [], loop.prune_block
    with monkeypatch.context() as patch:
        patch.setattr(loop, "prune_block", lambda *args: (solved.append(1), prune_block(*args))[1])
        assert run("cut") == 0
    walks = 1 if more.get("quantiser") == "joint" else 2
    if not more.get("shrink") and more.get("method") != "dense":
        assert len(solved) == walks * BLOCKS - after
    for file in ("model.safetensors", "scales.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    whole, cut = (the_record(tmp_path / f"{name}.runs") for name in ("whole", "cut"))
    for one in (whole, cut):
        for row in one["layers"]:
            row.pop("seconds")
    assert whole["layers"] == cut["layers"] and whole["warnings"] == cut["warnings"]
    assert verify.main([str(tmp_path / "cut"), "--quiet"]) == 0


@pytest.mark.parametrize(("more", "says"), [
    ({"quantise": "int1"}, "--quantise int1: no such integers"),
    ({"quantise": "q4_0"}, "--quantise q4_0 needs a width divisible by 32, this one is 48"),
    ({"quantiser": "nope"}, "--quantiser nope: no such method; there are gptq, joint, rtn"),
    ({"quantiser": "rtn", "quantise": None}, "--quantiser: would do nothing, as there is no --quantise"),
    ({"gptq.damping": 0.1, "quantise": None}, "--gptq.damping: --quantiser does not use gptq"),
    ({"quantiser": "joint", "method": "wanda"}, "--quantiser joint: rounds while --method sparsegpt prunes"),
    ({"quantiser": "joint", "method": "sparsegpt+refit"}, "--quantiser joint: rounds while --method sparsegpt prunes"),
    ({"quantiser": "joint", "heal": "block"}, "--heal: does not go with --quantiser joint"),
    ({"quantiser": "joint", "dense_target": 0.5}, "--dense-target: does not go with --quantiser joint"),
    ({"method": "keep"}, "--method keep: model.layers.0.self_attn.q_proj does not have --pattern 2:4"),
    ({"method": "keep", "pattern": None}, "--method keep: give the --pattern that the model has"),
    ({"method": "keep", "pattern": "0.5", "allocate": "owl"}, "--allocate owl: --method keep takes the zeros as they"),
])
def test_what_does_not_go_is_one_line(place, tmp_path, capfd, more, says):  # noqa: F811
    assert command(place, results=tmp_path, **more) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: {says}"), line


def test_shared_inputs_do_not_go_with_it(place, tmp_path, capfd):  # noqa: F811
    assert command(place, "--shared-inputs", results=tmp_path) == 2
    assert "--shared-inputs: looks at the dense model alone" in capfd.readouterr().err


def test_too_large_weights_name_the_linear(place, tmp_path, capfd):  # noqa: F811
    model = tiny.copy(place / "model", tmp_path / "model")
    tiny.change_weights(model, lambda t: t[f"{LINEAR}.weight"].mul_(1e7))
    assert command(place, model=model, method="magnitude", results=tmp_path / "runs") == 2
    assert f"{LINEAR}: its weights are too large for the float16 scales of int4:32" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe", "gemma3"])
def test_families(name, dtype):
    """Transposed weights, fused experts of which some see no token: all on the grid, in their stored dtype."""
    if name not in FAMILIES:
        pytest.skip(f"no family {name}")
    model = family(name).to(dtype)
    grid = grids.parse("int4:32")
    plan = jobs.job_of(model, "magnitude", "dense").plan
    method = quantise.module("gptq")
    job = walk.rounding(plan, Options(batch_size=4, progress=False, device="cpu"), method, method.Config(),
                        mixed.Grids(grid))
    before = {w.name: w.get().clone() for w in models.all_weights(model)}
    result = loop.prune_model(model, jobs.tokens(), None, job)
    assert {row["name"] for row in result.layers} == set(before) == set(result.scales)
    for weight in models.all_weights(model):
        W, s = weight.get(), result.scales[weight.name].float()
        value = grid.value(grid.round(W, s), s)
        assert torch.equal(value.to(dtype).float(), W) and not torch.equal(W, before[weight.name])


def test_zeros_stay_where_the_pattern_says_dense(place, tmp_path):  # noqa: F811
    """As after an uneven allocation, which is no one pattern."""
    assert tiny.main(*tiny.flags(place, "--no-dense", method="wanda", pattern="0.5", save=tmp_path / "pruned")) == 0
    words = tiny.flags(place, "--no-dense", method="keep", pattern="dense", quantise="int4", save=tmp_path / "rounded")
    words[words.index("--model") + 1] = str(tmp_path / "pruned")
    assert tiny.main(*words) == 0
    before, after = tiny.weights(tmp_path / "pruned"), tiny.weights(tmp_path / "rounded")
    zeros = {name: W == 0 for name, W in before.items() if name.endswith("proj.weight")}
    assert sum(int(z.sum()) for z in zeros.values()) > 1000
    assert not any(after[name][z].any() for name, z in zeros.items())
    assert any(not torch.equal(before[name], after[name]) for name in zeros)
