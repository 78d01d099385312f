"""`--format packed` with `--quantise`: the dense twin bit for bit, in exactly the bytes that the record counts."""

import json

import pytest
import tiny
import torch
from alone import alone
from oneshot_kernels import Rounded24Linear, reference, sparsify
from oneshot_kernels.cpu import integers
from oneshot_kernels.cpu.codes import emulate
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from variants import needs_compiler

from oneshot import checkpoint, models
from oneshot.checkpoint import packed, rounded, verify
from oneshot.pipeline import generate
from oneshot.prune.patterns import NM
from oneshot.quantise import grids
from oneshot.report import page

FORMS = {("llama", "int8:row"): torch.bfloat16, ("llama", "int4:64"): torch.float32, ("gpt2", "int4:64"): torch.float16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{(family, grid): (dense folder, packed folder)} of tiny models, both made by the same command."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_pictures", lambda records: [])
        for (family, grid), dtype in FORMS.items():
            place = tiny.make(tmp_path_factory.mktemp(family))
            tiny.save_model(place / "model", family, dtype)
            for form in ("dense", "packed"):
                assert tiny.main(*tiny.flags(place, "--no-dense", method="sparsegpt", evaluate="none", quantise=grid,
                                             save=place / form, format=form)) == 0
            found[family, grid] = place / "dense", place / "packed"
    return found


@pytest.fixture(scope="module", params=FORMS, ids=" ".join)
def twins(request, folders):
    return folders[request.param]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ids(model):
    return torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_plain_from_pretrained_gives_the_dense_twin_bit_for_bit(twins, dtype):
    dense, small = (load(folder, dtype=dtype) for folder in twins)
    assert {type(m) for m in packed.linears(small)} == {Rounded24Linear} and not packed.linears(dense)
    for name, m in small.named_modules():
        if isinstance(m, Rounded24Linear):
            twin = dense.get_submodule(name)
            W = twin.weight.T if packed.is_conv1d(twin) else twin.weight
            assert torch.equal(m.dense().to(W.dtype), W), name
    if dtype == torch.float32:
        torch.testing.assert_close(small(ids(small)).logits, dense(ids(dense)).logits, rtol=1e-5, atol=1e-5)


def test_the_bytes_are_those_that_the_record_counts(twins):
    data = json.loads((twins[1] / checkpoint.MANIFEST).read_text())
    grid = grids.parse(data["record"]["settings"]["quantise"])
    want = sum(grid.bytes(*entry["shape"], NM(2, 4)) for entry in data["tensors"].values())
    assert data["packed"]["bytes"] == data["record"]["bytes"]["stored"] == want
    kinds = ("weight", "metadata", "scales")
    tensors = tiny.weights(twins[1])
    stems = [name.removesuffix("metadata") for name in tensors if name.endswith(".metadata")]
    assert want == sum(tensors[stem + kind].numel() * tensors[stem + kind].element_size() for stem in stems
                       for kind in kinds)
    assert len(stems) == len(data["tensors"]) and not (twins[1] / "scales.safetensors").exists()


def test_verify_proves_it_and_the_twin(twins, capsys):
    assert verify.main([str(twins[1]), "--twin", str(twins[0])]) == 0
    out = capsys.readouterr().out
    assert "all proved" in out and "all equal" in out and "2:4 int" in out


@pytest.mark.parametrize("part", ["weight", "metadata", "scales"])
def test_verify_finds_one_changed_value(twins, tmp_path, capsys, part):
    folder = tiny.copy(twins[1], tmp_path / "spoilt")
    key = next(k for k in tiny.weights(folder) if k.endswith(".metadata")).replace("metadata", part)
    tiny.change_weights(folder, lambda t: t[key].view(-1)[:1].bitwise_xor_(1))
    code = verify.main([str(folder), "--quiet"])
    said = "".join(capsys.readouterr())  # 2: metadata that describe no positions do not load
    assert (code == 1 and "bytes are not the recorded ones" in said) or (code == 2 and "bad metadata" in said)


@pytest.mark.parametrize("part", ["weight", "metadata", "scales"])
def test_a_tensor_that_is_missing_is_not_made_up(twins, tmp_path, part):
    folder = tiny.copy(twins[1], tmp_path / "spoilt")
    key = next(k for k in tiny.weights(folder) if k.endswith(".metadata")).replace("metadata", part)
    tiny.change_weights(folder, lambda t: t.pop(key))
    with pytest.raises(ValueError, match=r"packed linears, the files hold .* incomplete"):
        load(folder)


@pytest.mark.parametrize("changes", [{"grid": "int4"}, {"stored": "float33"}, {"grid": "int4:64", "stored": None}])
def test_a_config_that_says_something_else_is_refused(folders, tmp_path, changes):
    folder = tiny.copy(folders["llama", "int8:row"][1], tmp_path / "spoilt")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no grid or dtype"):
        load(folder)


def test_without_oneshot_it_fails_loudly(folders):
    folder = folders["llama", "int4:64"][1]
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(folder)!r})"
    done = alone(code)
    assert done.returncode and "mismatch" in done.stderr


def test_saved_again_and_loaded_again(twins, tmp_path):
    load(twins[1]).save_pretrained(tmp_path)
    one, again = (load(folder, dtype=torch.float32) for folder in (twins[1], tmp_path))
    assert torch.equal(one(ids(one)).logits, again(ids(again)).logits)


@needs_compiler
@pytest.mark.parametrize("rounds", [False, True])
def test_the_compiled_layers_hold_the_same_codes(twins, rounds):
    """What differs is that no weight is rounded to the model's dtype, and with `rounds` the inputs to int8."""
    exact, fast = (load(twins[1], dtype=torch.float32) for _ in range(2))
    report = sparsify(fast, fuse=False, round_inputs=rounds)
    assert len(report.replaced) == len(packed.linears(exact)) and not packed.linears(fast)
    for name, m in exact.named_modules():
        if isinstance(m, Rounded24Linear):
            layer = fast.get_submodule(name)
            x = torch.randn(3, m.in_features, generator=torch.Generator().manual_seed(1))
            scale = m.half_scales().float()
            want = emulate(x, m.codes(), scale[:, 0] if m.bits == 8 else scale, m.bias, not rounds)
            assert reference.relative_error(layer(x), want) < 1e-6
    a, b = (m(ids(m)).logits for m in (exact, fast))
    assert 0 < (a - b).norm() < (0.05 if rounds else 0.01) * a.norm()


@needs_compiler
@pytest.mark.parametrize("rounds", [False, True])
def test_generate_computes_with_the_codes(twins, rounds, monkeypatch, capsys):
    seen = []
    real = generate.prepared

    def prepared(*args):
        made = real(*args)
        seen.append({layer.round_inputs for layer in made[0].modules() if isinstance(layer, integers.IntegerLinear)})
        return made
    monkeypatch.setattr(generate, "prepared", prepared)
    flags = ["--round-inputs"] if rounds else []
    assert generate.main([str(twins[1]), "--max-new-tokens", "2", "--device", "cpu", *flags]) == 0
    assert seen == [{rounds}]
    plain = ["--device", "cpu", "--dtype", "float32"]
    assert generate.main([str(twins[0]), "--max-new-tokens", "2", *plain, "--round-inputs"]) == 2
    assert "--round-inputs: " in capsys.readouterr().err


def test_what_the_format_cannot_hold_is_refused(tmp_path, capfd):
    place = tiny.make(tmp_path / "place")
    for quantise in ("int4", "int3:64", "int8:64"):
        assert tiny.main(*tiny.flags(place, quantise=quantise, format="packed", save=tmp_path / "out")) == 2
        assert f"--format packed: holds int8:row and int4:64, not --quantise {quantise}" in capfd.readouterr().err


def test_a_linear_that_stays_dense_keeps_its_scales_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "_pictures", lambda records: [])
    place = tiny.make(tmp_path / "place")
    assert tiny.main(*tiny.flags(place, "--no-dense", quantise="int8:row", format="packed", save=tmp_path / "out",
                                 keep_dense="*.o_proj", evaluate="none")) == 0
    scales = load_file(tmp_path / "out" / rounded.FILE)
    assert set(scales) == {f"model.layers.{i}.self_attn.o_proj" for i in range(tiny.BLOCKS)}
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0


def test_a_packed_rounded_model_can_be_measured(twins, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_pictures", lambda records: [])
    model, _ = models.load(str(twins[1]))
    assert len(packed.linears(model)) == len(json.loads((twins[1] / checkpoint.MANIFEST).read_text())["tensors"])


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_come_back(bits):
    codes = reference.random_24(7, 36, torch.float32, torch.Generator().manual_seed(0)).mul_(2).round_()
    codes = codes.clamp_(-8, 7) if bits == 4 else codes.mul_(9).clamp_(-128, 127)
    codes[0, :2] = torch.tensor([-(2.0 ** (bits - 1)), 2 ** (bits - 1) - 1])
    codes[0, 2:4] = 0
    scales = torch.rand(7, 2).half()
    layer = Rounded24Linear.from_codes(codes, scales, bits=bits, group=32, dtype=torch.float32)
    assert torch.equal(layer.codes(), codes) and torch.equal(layer.half_scales(), scales)
    wide = scales.float().repeat_interleave(32, 1)[:, :36]
    assert torch.equal(layer.dense(), codes * wide) and not layer.can_compile()
    with pytest.raises(ValueError, match="no compiled kernel"):
        layer.compiled()
    assert torch.equal(layer.to(torch.bfloat16).half_scales(), scales)
