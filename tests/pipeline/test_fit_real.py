"""`oneshot fit` for real, on tiny models: every form, a bug that is planted, kills at random moments, both APIs."""

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from oneshot_kernels import decoder_of
from tiny import plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM
from variants import needs_compiler

import oneshot
from oneshot import checkpoint
from oneshot.measure import latency
from oneshot.pipeline import compress, device_table, forms, latency_command, run
from oneshot.pipeline.fit import candidates, command, ending, ledger, rounds, steps

pytestmark = pytest.mark.usefixtures("plain_pages")
STORIES = Path(__file__).parents[1] / "data" / "stories260k"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """No pictures, as drawing takes longer than the rounds; few steps of timing."""
    monkeypatch.setattr(ending.figures, "save", lambda figure, path: path.write_text("drawn"))
    monkeypatch.setattr(latency, "STEPS", 2)
    monkeypatch.setattr(latency, "ROUNDS", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("place"))


def words(place, out, *more, model=None):
    given = ["--model", model or place / "model", "--save", out, "--evaluate", place / "evaluation.txt",
             "--calibration", place / "calibration.txt", "--nsamples", "8", "--seqlen", "16", "--eval-windows", "4",
             "--no-progress", *more]
    return [str(word) for word in given]


def healing(place):
    return ["--data", place / "calibration.txt", "--tokens", "200", "--heal-seqlen", "16", "--heal-batch", "32"]


def fitted(out):
    return json.loads((out / "fit.json").read_text())


def test_every_form_in_one_run_healed_and_repeated_for_nothing(place, tmp_path, monkeypatch, capfd):
    """A block goes, others become 2:4, all is rounded: one ordinary checkpoint, proved by `oneshot verify`."""
    monkeypatch.setattr(candidates, "narrower", lambda *args: [])
    monkeypatch.setattr(candidates, "fewer_heads", lambda model: [])
    out = tmp_path / "out"
    asked = words(place, out, "--target", "parameters=0.8,bytes=0.088", "--step", "100%", "--floor",
                  "evaluation/ppl<=9x", "--device", "cpu", "--final", "300", "--damage", "--say", "the",
                  *healing(place))
    assert command.main(asked) == 0, capfd.readouterr().err
    first = capfd.readouterr()
    [now, final] = fitted(out)["rounds"]
    assert now["plan"]["sparse"] and {key for _, key in now["plan"]["grids"]} == {"int4"} and now["kept"]
    assert now["shares"]["parameters"] <= 0.8 and now["shares"]["bytes"] <= 0.088 and final["name"] == "final"
    assert len(now["candidates"]["sparse"]) == tiny.BLOCKS and now["candidates"]["drops"][1:]
    folder = Path(first.out.rstrip().rpartition("result: ")[2])
    record = json.loads((folder / "oneshot.json").read_text())["record"]
    assert record["settings"]["quantise"] == "int4:64" and folder.parent == out
    assert all(row["pattern"] == "2:4" for row in record["layers"] if row["block"] in now["plan"]["sparse"])
    dense, left = (AutoModelForCausalLM.from_pretrained(p).num_parameters() for p in (place / "model", folder))
    assert left < dense and (out / "fit.svg").is_file() and (out / "fit.html").is_file()
    assert "evaluation/kl" in first.out and "> the" in first.out
    from oneshot.checkpoint import verify

    assert verify.main([str(folder)]) == 0
    assert command.main(asked) == 0
    again = capfd.readouterr()
    assert again.out.partition("pictures")[0].splitlines()[-1] == first.out.partition("pictures")[0].splitlines()[-1]
    assert again.err.count("finished earlier, stored result") == 7  # cut, sparse, int4; heal, int4; two plain ones
    for row, same in zip(fitted(out)["rounds"], [now, final], strict=True):
        assert row == same


def test_blocks_of_different_forms_are_one_checkpoint(place, tmp_path, capfd):
    """Between int8 and int4 for all: one of three blocks stays in int8, and the kernels of both load."""
    out = tmp_path / "out"
    assert command.main(words(place, out, "--target", "bytes=0.2", "--step", "100%", "--allow", "int8,int4",
                              "--device", "cpu")) == 0, capfd.readouterr().err
    [now] = fitted(out)["rounds"]
    grids = {b: {"int8": "int8:row", "int4": "int4:64"}[key] for b, key in now["plan"]["grids"]}
    assert sorted(grids.values()) == ["int4:64", "int4:64", "int8:row"] and now["shares"]["bytes"] <= 0.2
    data = checkpoint.read_manifest(out / "round-1")
    assert all(row["grid"] == grids[row["block"]] for row in data["record"]["layers"])
    assert now["foretold"]["bytes"] == pytest.approx(now["shares"]["bytes"])
    assert len(now["candidates"]["grids"]["int8"]) == len(now["candidates"]["grids"]["int4"]) == tiny.BLOCKS
    from oneshot.checkpoint import verify

    assert verify.main([str(out / "round-1"), "--quiet"]) == 0
    runs, held = forms.load(out / "round-1"), AutoModelForCausalLM.from_pretrained(out / "round-1").eval()
    ids = (torch.arange(32) % 28 + 3).view(2, 16)
    with torch.no_grad():
        assert (runs(ids).logits - held(ids).logits).norm() <= 0.05 * held(ids).logits.norm()


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A place with a model that has learnt something, and a text that it knows."""
    folder = tmp_path_factory.mktemp("stories")
    text = ("Once upon a time, there was a little girl named Lily. She liked to play in the park with her mom. One "
            "day, she saw a big red ball. She was very happy and wanted to play with it. Her mom said yes. ")
    for name in ("calibration.txt", "evaluation.txt"):
        (folder / name).write_text(text * 12)
    return folder


def test_a_bug_that_zeroes_the_weights_of_a_layer_is_taken_back(stories, tmp_path, monkeypatch, capfd):
    real, calls = compress.prove_patterns, []

    def planted(model, plan, rows):
        calls.append(1)
        if len(calls) == 1:
            with torch.no_grad():
                for p in model.model.layers[1].parameters():
                    p.zero_()
        return real(model, plan, rows)
    monkeypatch.setattr(compress, "prove_patterns", planted)
    out = tmp_path / "out"
    asked = words(stories, out, "--target", "parameters=0.95", "--step", "100%", "--floor", "evaluation/ppl<=1.6x",
                  "--device", "cpu", "--seqlen", "64", "--allow", "shrink", model=STORIES)
    assert command.main(asked) == 0, capfd.readouterr().err
    found = fitted(out)["rounds"]
    assert not found[0]["kept"] and found[-1]["kept"] and found[0]["broken"][0].startswith("evaluation/ppl ")
    assert fitted(out)["ending"]["result"] == str(out / found[-1]["name"]) != str(out / "round-1")


def test_a_floor_that_cannot_be_met_ends_with_the_best_state_and_3(stories, tmp_path, capfd):
    out = tmp_path / "out"
    asked = words(stories, out, "--target", "parameters=0.3", "--step", "40%", "--floor", "evaluation/ppl<=1.03x",
                  "--device", "cpu", "--seqlen", "64", "--allow", "shrink", model=STORIES)
    assert command.main(asked) == 3
    said = capfd.readouterr().out
    assert "target not met: evaluation/ppl" in said and "next would be: " in said
    rows = fitted(out)["rounds"]
    assert not rows[-1]["kept"] and len(rows) >= 3 and [r["broken"] for r in rows if r["plan"] and not r["kept"]]
    best = next((r for r in reversed(rows) if r["kept"]), None)
    assert said.rstrip().endswith(f"result: {out / best['name'] if best else STORIES}")


@pytest.mark.parametrize("seed", [0])
def test_kills_at_random_moments_end_with_the_same(seed, place, tmp_path, monkeypatch, capfd):
    more = ["--target", "parameters=0.8,bytes=0.5", "--step", "100%", "--device", "cpu", "--allow",
            "shrink,2:4,heal", "--final", "200", *healing(place)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command.main(words(place, whole, *more)) == 0
    draw, left = random.Random(seed), []

    def mortal(owner, name):
        real = getattr(owner, name)

        def step(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        return real, step
    for _ in range(4):
        left[:] = [draw.randint(1, 25)]
        with monkeypatch.context() as patch:
            for owner, name in ((checkpoint.Folder, "save_block"), (ledger.Ledger, "write"), (run, "made"),
                                (rounds.Looks, "at"), (rounds.Looks, "base")):
                patch.setattr(owner, name, mortal(owner, name)[1])
            code = command.main(words(place, killed, *more))
        assert code in (130, 0)
    capfd.readouterr()
    assert command.main(words(place, killed, *more)) == 0, capfd.readouterr().err
    same = [[{key: x for key, x in r.items() if key != "seconds"} for r in fitted(out)["rounds"]]
            for out in (whole, killed)]
    assert same[0] == same[1]
    last = Path(fitted(whole)["ending"]["result"]).name
    a, b = tiny.weights(whole / last), tiny.weights(killed / last)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- forms, devices, dtypes

@pytest.mark.parametrize("form", forms.FORMS)
def test_kernels_compute_what_the_stored_weights_say(form, place, tmp_path):
    """Up to what integer layers round their inputs to; and their bytes are what the record counts."""
    if form not in forms.runnable("cpu"):
        pytest.skip("no compiler")
    pattern, grid = forms.of(form)
    given = {"method": "magnitude" if "2:4" in form else "dense", "pattern": str(pattern), "save": tmp_path / "out",
             "quantise": str(grid) if grid else None}
    assert tiny.main(*tiny.flags(place, "--no-dense", **given)) == 0
    record = json.loads((tmp_path / "out" / "oneshot.json").read_text())["record"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert forms.stored(forms.linears(model), dict.fromkeys(range(tiny.BLOCKS), form)) == record["bytes"]["stored"]
    ids = (torch.arange(32) % 28 + 3).view(2, 16)
    runs = forms.load(tmp_path / "out")
    with torch.no_grad():
        want, found = model(ids).logits, runs(ids).logits
    assert (found - want).norm() <= (0.05 if grid else 1e-4) * want.norm()
    kinds = {type(m).__name__ for m in runs.model.layers.modules()} & {"IntegerLinear", "Sparse24Linear", "Linear"}
    assert kinds == {"IntegerLinear" if grid else "Sparse24Linear"}


@needs_compiler
def test_rounds_are_timed_as_they_decode(place, tmp_path, monkeypatch):
    """The result and the dense model, each by one compiled call; integers in the result alone."""
    assert tiny.main(*tiny.flags(place, "--no-dense", method="dense", quantise="int8:row", save=tmp_path / "out")) == 0
    seen, real = [], latency.one

    def one(model, kind, device, graph):
        before = decoder_of(model).tokens
        seconds = real(model, kind, device, graph)
        layers = sum(type(m).__name__ == "IntegerLinear" for m in model.modules())
        seen.append((decoder_of(model).tokens - before, layers))
        return seconds
    monkeypatch.setattr(latency, "one", one)
    own = steps.Steps((*words(place, tmp_path / "fit")[4:], "--device", "cpu"), str(place / "model"),
                      "model.layers", "obs", (), tmp_path / "fit")
    assert steps.time_share(own.dense, str(tmp_path / "out")) > 0
    assert sorted(set(seen)) == [(latency.STEPS, 0), (latency.STEPS, 7 * tiny.BLOCKS)] and len(seen) == 4


@pytest.mark.parametrize("dtype, want", [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_latency_is_measured_in_the_dtype_of_the_command(dtype, want, place, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(forms, "runnable", lambda device: [])
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "cache"))
    seen = []
    monkeypatch.setattr(latency, "one", lambda model, kind, device, graph: seen.append(model.dtype) or (
        0.001 + 0.01 * model.config.num_hidden_layers * model.config.intermediate_size))
    asked = words(place, tmp_path / "out", "--target", "latency=0.9", "--step", "100%", "--allow", "shrink",
                  "--dtype", dtype, "--device", "cpu")
    assert command.main(asked) == 0, capfd.readouterr().err
    assert set(seen) == {want} and "no kernel for" not in capfd.readouterr().out
    assert fitted(tmp_path / "out")["rounds"][-1]["shares"]["latency"] <= 0.9


def test_the_table_of_another_device_foretells_and_a_device_without_one_is_refused(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forms, "runnable", lambda device: [])
    monkeypatch.setattr(latency, "one", lambda model, kind, device, graph: 0.001 + 0.01 * len(model.model.layers))
    table = tmp_path / "there.json"
    assert latency_command.main([str(place / "model"), "--rounds", "1", "--no-progress", "--out", str(table)]) == 0
    monkeypatch.setattr(steps, "time_share", lambda *args: 1 / 0)  # nothing is measured here
    asked = words(place, tmp_path / "out", "--target", "latency=0.7", "--step", "100%", "--allow", "shrink,int8",
                  "--device", table)
    assert command.main(asked) == 0, capfd.readouterr().err
    out = capfd.readouterr().out
    assert "times are foretold by the table of --device, not measured" in out
    assert "no kernel for int8 in the device's table: no time is gained by them, bytes only" in out
    assert fitted(tmp_path / "out")["rounds"][0]["shares"]["latency"] == pytest.approx(21 / 31)
    other = device_table.read(table) | {"blocks": 7}
    table.write_text(json.dumps(other))
    half = tmp_path / "half.json"
    half.write_text(json.dumps(other | {"blocks": tiny.BLOCKS, "dtype": "float16"}))
    for device, said in ((table, "is the table of a llama of 7 blocks"), (half, "give --dtype float16"),
                         (tmp_path / "no.json", "is no table of"),
                         ("pi5", "without its table no device is guessed"), ("cuda", "sees no CUDA device")):
        if device != "cuda" or not torch.cuda.is_available():
            assert command.main([*asked[:-1], str(device)]) == 2 and said in capfd.readouterr().err


def test_from_python_with_a_model_in_memory(place, tmp_path):
    model, tokenizer = oneshot.load(str(place / "model"))
    found = oneshot.fit(model, tokenizer, target="parameters=0.9", step="100%", save=tmp_path / "out", device="cpu",
                        allow="shrink", floor=["evaluation/ppl<=9x"], evaluate=str(place / "evaluation.txt"),
                        calibration=str(place / "calibration.txt"), nsamples=8, seqlen=16, eval_windows=4,
                        progress=False, layer_errors=False)
    assert found["met"] and [r["kept"] for r in found["rounds"]] == [True]
    assert AutoModelForCausalLM.from_pretrained(found["result"]).num_parameters() < model.num_parameters()
    with pytest.raises(ValueError, match="--target speed"):
        oneshot.fit(str(place / "model"), target="speed=1", save=tmp_path / "other")
    with pytest.raises(ValueError, match="holds the rounds of another model"):
        model.lm_head.weight.data.mul_(2)
        oneshot.fit(model, tokenizer, target="parameters=0.9", step="100%", save=tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match="evalute"):
        oneshot.fit(str(place / "model"), target="bytes=0.5", save=tmp_path / "other", evalute="x")
