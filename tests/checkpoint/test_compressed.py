"""`--format compressed-tensors`: what transformers alone loads computes what was measured; verify proves the files."""

import json

import pytest
import tiny
import torch
from alone import alone
from tiny import plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM

from oneshot import checkpoint
from oneshot.checkpoint import verify
from oneshot.quantise import grids

pytest.importorskip("compressed_tensors", reason="pip install 'oneshot[compressed]'")
FORMS = {"int4:16": (torch.float32, "2:4"), "int8:row": (torch.bfloat16, "2:4"), "int3:16": (torch.float32, "dense")}
LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save(model(ids).logits, folder + sys.argv[1])
assert not [name for name in sys.modules if name.startswith("oneshot")]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{grid: (dense folder, compressed folder)} of tiny models, both made by the same command."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneshot.report.page._pictures", lambda records: [])
        for grid, (dtype, pattern) in FORMS.items():
            place = tiny.make(tmp_path_factory.mktemp("place"))
            tiny.save_model(place / "model", dtype=dtype)
            for form in ("dense", "compressed-tensors"):
                method = {"method": "dense"} if pattern == "dense" else {"method": "sparsegpt", "pattern": pattern}
                assert tiny.main(*tiny.flags(place, "--no-dense", evaluate="none", quantise=grid, save=place / form,
                                             format=form, **method)) == 0
            found[grid] = place / "dense", place / "compressed-tensors"
    return found


@pytest.fixture(scope="module", params=FORMS)
def twins(request, folders):
    return folders[request.param]


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def test_transformers_alone_computes_what_was_measured(folders):
    """In a process that never sees oneshot."""
    done = alone(LOGITS, ".logits", *(small for _, small in folders.values()))
    assert done.returncode == 0, done.stderr[-2000:]
    for grid, (dense, small) in folders.items():
        got, want = torch.load(f"{small}.logits").float(), logits(dense).float()
        exact = FORMS[grid][0] == torch.float32  # in bfloat16 the loader rounds the scales
        assert (got - want).norm() <= (1e-5 if exact else 0.02) * want.norm()


def test_verify_proves_it(twins, capsys):
    assert verify.main([str(twins[1])]) == 0
    assert "all proved" in capsys.readouterr().out
    data = json.loads((twins[1] / checkpoint.MANIFEST).read_text())
    assert data["format"] == "compressed-tensors" and not (twins[1] / "scales.safetensors").exists()
    grid = grids.parse(data["record"]["settings"]["quantise"])
    words = sum(4 * R * -(-C * grid.bits // 32) + 2 * R * (C // grid.width(C)) + 16
                for R, C in (entry["shape"] for entry in data["tensors"].values()))
    assert data["packed"]["bytes"] == words < data["packed"]["dense_bytes"]


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_verify_finds_one_changed_value(twins, tmp_path, capsys, part):
    folder = tiny.copy(twins[1], tmp_path / "spoilt")
    key = next(k for k in tiny.weights(folder) if k.endswith(part))
    tiny.change_weights(folder, lambda t: t[key].view(torch.int16).view(-1)[:1].bitwise_xor_(1))
    assert verify.main([str(folder), "--quiet"]) == 1
    assert f"FAULT {key.rpartition('.')[0]}: its bytes are not the recorded ones" in capsys.readouterr().out


def test_verify_finds_another_config(twins, tmp_path, capsys):
    folder = tiny.copy(twins[1], tmp_path / "spoilt")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    assert verify.main([str(folder), "--quiet"]) == 1
    assert "its quantization_config has another config_groups than" in capsys.readouterr().out


def test_a_missing_tensor_is_named(twins, tmp_path, capsys):
    folder = tiny.copy(twins[1], tmp_path / "spoilt")
    key = next(k for k in tiny.weights(folder) if k.endswith("weight_scale"))
    tiny.change_weights(folder, lambda t: t.pop(key))
    assert verify.main([str(folder), "--quiet"]) == 2
    assert f"{key.rpartition('.')[0]}: its tensors in" in capsys.readouterr().err


@pytest.mark.usefixtures("plain_pages")
@pytest.mark.parametrize(("kind", "more", "says"), [
    ("llama", {"quantise": None}, "--format compressed-tensors: goes with --quantise int2 to int8"),
    ("llama", {"quantise": "int12"}, "--format compressed-tensors: goes with --quantise int2 to int8"),
    ("llama", {"quantise": "q8_0"}, "--format compressed-tensors: goes with --quantise int2 to int8"),
    ("llama", {"quantise": "int4:16", "save": None}, "--format compressed-tensors: goes with --quantise"),
    ("llama", {"quantise": "int4:32"}, "--format compressed-tensors: model.layers.0.mlp.down_proj has 48 inputs"),
    ("gpt2", {"quantise": "int4:16"}, "--format compressed-tensors: transformer.h.0.attn.c_attn is no nn.Linear")])
def test_what_the_format_cannot_hold_is_refused(tmp_path, capfd, kind, more, says):
    place = tiny.make(tmp_path / "place")
    tiny.save_model(place / "model", kind)
    given = {"format": "compressed-tensors", "save": tmp_path / "out", "evaluate": "none"} | more
    assert tiny.main(*tiny.flags(place, "--no-dense", **given)) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: {says}"), line
    assert not (tmp_path / "out").exists()
