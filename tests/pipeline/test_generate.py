"""`oneshot generate` on a CPU: what was saved dense runs by the kernels of its forms, and says so."""

import shutil

import pytest
import tiny
import torch
from oneshot_kernels import Sparse24Linear
from oneshot_kernels.cpu import integers
from tiny import place  # noqa: F401 - fixture
from transformers import AutoModelForCausalLM
from variants import needs_compiler

from oneshot.pipeline import forms, generate
from oneshot.runtime import environment

pytestmark = needs_compiler
KINDS = {"2:4": Sparse24Linear, "int8": integers.IntegerLinear, "2:4 int4": integers.IntegerLinear}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """(a folder that was saved dense, its form)."""
    folder = tmp_path_factory.mktemp("saved")
    pattern, grid = forms.of(request.param)
    given = {"method": "magnitude" if "2:4" in request.param else "dense", "pattern": str(pattern),
             "save": folder / "out", "quantise": str(grid) if grid else None}
    assert tiny.main(*tiny.flags(tiny.make(folder / "place"), "--no-dense", **given)) == 0
    return folder / "out", request.param


@pytest.fixture
def seen(monkeypatch):
    """The models that `generate` has prepared."""
    found, real = [], generate.prepared

    def prepared(*args):
        made = real(*args)
        found.append(made[0])
        return made
    monkeypatch.setattr(generate, "prepared", prepared)
    return found


def go(folder, *flags):
    return generate.main([str(folder), "--max-new-tokens", "3", "--prompt", "a dog", "--device", "cpu", *flags])


@pytest.mark.parametrize("slow", [False, True])
def test_the_kernels_compute_what_is_stored(saved, seen, monkeypatch, capsys, slow):
    """slow: a CPU that emulates bfloat16, where all else is float32."""
    folder, form = saved
    monkeypatch.setattr(environment, "processor", lambda: {"avx512_bf16": not slow})
    assert go(folder) == 0
    assert f"out ({form})" in capsys.readouterr().out
    [runs], held = seen, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = {type(m) for m in runs.model.layers.modules()} & {*KINDS.values(), torch.nn.Linear}
    assert own == {KINDS[form]} and (not slow or runs.dtype == torch.float32)
    ids = (torch.arange(32) % 28 + 3).view(2, 16)
    with torch.no_grad():
        want, found = held(ids).logits, runs(ids).logits.float()
    assert (found - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("can, want", [({}, torch.float32), ({"amx_bf16": True}, torch.bfloat16),
                                       ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, torch.bfloat16)])
def test_bfloat16_is_kept_where_it_is_not_emulated(place, tmp_path, seen, monkeypatch, can, want):  # noqa: F811
    """Also where its products are no faster than float32's: a token costs the bytes of the weights."""
    monkeypatch.setattr(environment, "processor", lambda: can)
    shutil.copytree(place / "model", tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    assert go(tmp_path / "model") == 0 and [model.dtype for model in seen] == [want]


def test_another_dtype_and_other_models_run_as_they_are(saved, seen, place, capsys):  # noqa: F811
    assert go(saved[0], "--dtype", "float32") == go(place / "model") == 0
    assert not any(isinstance(m, tuple(KINDS.values())) for model in seen for m in model.modules())
    assert f"({saved[1]})" not in capsys.readouterr().out


def test_inputs_are_rounded_where_asked_for(saved, seen, capsys):
    asked = go(saved[0], "--round-inputs")
    if saved[1] == "2:4":
        assert asked == 2 and "--round-inputs: " in capsys.readouterr().err
    else:
        layers = [m for m in seen[0].modules() if isinstance(m, integers.IntegerLinear)]
        assert asked == 0 and layers and all(layer.round_inputs for layer in layers)


def test_weights_that_are_not_what_was_saved_are_refused(saved, tmp_path, capsys):
    """Never made 2:4 or rounded anew without a word."""
    folder, form = saved
    spoilt = tiny.copy(folder, tmp_path / "spoilt")
    tiny.change_weights(spoilt, lambda t: [t[key].mul_(1.1).add_(0.01) for key in t if "proj" in key])
    assert go(spoilt) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {spoilt}: is not what oneshot.json says, ")
    assert ("is not 2:4" if "2:4" in form else "not on the grid") in err


def test_missing_scales_are_refused(saved, tmp_path, capsys):
    folder, form = saved
    spoilt = tiny.copy(folder, tmp_path / "spoilt")
    (spoilt / "scales.safetensors").unlink(missing_ok=True)
    assert go(spoilt) == (0 if form == "2:4" else 2)
    assert ("its scales are missing" in capsys.readouterr().err) == (form != "2:4")


def test_what_has_no_kernel_is_not_said_to_have_one(tmp_path, capsys):
    """Conv1D stays as it is."""
    folder = tmp_path / "place"
    folder.mkdir()
    tiny.save_model(folder / "model", "gpt2")
    for name in ("calibration.txt", "evaluation.txt"):
        tiny.save_text(folder / name, 1)
    assert tiny.main(*tiny.flags(folder, "--no-dense", method="magnitude", pattern="2:4", save=tmp_path / "out")) == 0
    capsys.readouterr()
    assert go(tmp_path / "out") == 0 and "(2:4)" not in capsys.readouterr().out
