"""Packed checkpoints: what `--format packed` writes is, the dense twin in 0.57 of the bytes."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from alone import alone
from oneshot_kernels import Sparse24Linear, sparsify
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

from oneshot import checkpoint, models
from oneshot.checkpoint import packed, verify
from oneshot.pipeline import generate, run
from oneshot.report import page

pytestmark = pytest.mark.filterwarnings("ignore:.*loaded unchecked")
PROMPT = "the rain"
FAMILIES = {"llama": torch.bfloat16, "gpt2": torch.float16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: (dense folder, packed folder)} of tiny models, both pruned by the same command."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_pictures", lambda records: [])
        for family, dtype in FAMILIES.items():
            place = tiny.make(tmp_path_factory.mktemp(family))
            tiny.save_model(place / "model", family, dtype)
            for form in ("dense", "packed"):
                assert tiny.main(*tiny.flags(place, "--no-dense", method="sparsegpt", evaluate="none",
                                             save=place / form, format=form)) == 0
            found[family] = place / "dense", place / "packed"
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def twins(request, folders):
    """(dense folder, packed folder) of one family."""
    return folders[request.param]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ids(model):
    return torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


def test_plain_from_pretrained_gives_the_dense_twin(twins):
    dense, small = (load(folder, dtype=torch.float32) for folder in twins)
    assert packed.linears(small) and not packed.linears(dense)
    torch.testing.assert_close(small(ids(small)).logits, dense(ids(dense)).logits, rtol=1e-5, atol=1e-5)
    for name, m in small.named_modules():
        if isinstance(m, Sparse24Linear):
            twin = dense.get_submodule(name).weight
            assert torch.equal(m.dense(), twin.T if packed.is_conv1d(dense.get_submodule(name)) else twin), name


def test_dtype_as_stored(twins):
    dense, small = (load(folder) for folder in twins)
    assert {m.weight.dtype for m in packed.linears(small)} == {dense.dtype} == {small.dtype}


def test_size(twins):
    _, small = twins
    entry = json.loads((small / checkpoint.MANIFEST).read_text())["packed"]
    model = load(small)
    assert (entry["bytes"], entry["dense_bytes"]) == packed.bytes_of(model)
    assert 0.5 < entry["bytes"] / entry["dense_bytes"] <= 0.57
    on_disk = [sum(t.numel() * t.element_size() for t in tiny.weights(folder).values()) for folder in twins]
    assert on_disk[0] - on_disk[1] == entry["dense_bytes"] - entry["bytes"]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_saved_again_and_loaded_again(twins, tmp_path, fused):
    """In several files, and from a model whose q, k, v and gate, up share launches."""
    model = load(twins[1])
    if fused:
        sparsify(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, again = (load(folder, dtype=torch.float32) for folder in (twins[1], tmp_path))
    assert torch.equal(one(ids(one)).logits, again(ids(again)).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto", "half on disk"])
def test_device_map(twins, tmp_path, device_map):
    pytest.importorskip("accelerate", reason="device_map needs accelerate (pip install accelerate)")
    want = load(twins[1], dtype=torch.float32)
    if device_map == "half on disk":
        parts = {name for name, m in want.named_modules() if name.count(".") <= 1 and list(m.parameters(recurse=False))}
        blocks = {name for name, _ in want.named_modules() if name.rpartition(".")[2].isdigit()}
        device_map = dict.fromkeys(parts, "cpu") | {name: "disk" if name.endswith("1") else "cpu" for name in blocks}
        device_map |= {"model.rotary_emb": "cpu"} if hasattr(want, "model") else {}
    model = load(twins[1], dtype=torch.float32, device_map=device_map, offload_folder=tmp_path)
    assert packed.linears(model)  # what lies on the disk runs through torch, the rest compiled: equal to rounding
    torch.testing.assert_close(model(ids(model)).logits, want(ids(want)).logits)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_compiled_with_a_static_cache(twins, fused):
    """One graph, no break, a prompt and a step behind it: the shape in which a GPU decodes."""
    model = load(twins[1], dtype=torch.float32)
    if fused:
        assert len(sparsify(model).fused) == (2 * tiny.BLOCKS if model.config.model_type == "llama" else 0)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    prompt, seen = ids(model), []
    for forward in (model.forward, compiled):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            seen.append([forward(part, past_key_values=cache, cache_position=at).logits
                         for part, at in ((prompt, torch.arange(12)), (prompt[:, :1], torch.tensor([12])))])
    for eager, graph in zip(*seen, strict=True):
        torch.testing.assert_close(graph, eager)


def test_perplexity_is_the_twins(twins, tmp_path, capsys):
    text, values = tiny.save_text(tmp_path / "text.txt", 3), []
    for folder in twins:
        assert run.main(["--model", str(folder), "--method", "dense", "--evaluate", str(text), "--seqlen", "16",
                         "--results", str(tmp_path / folder.name), "--no-progress"]) == 0, capsys.readouterr().err
        record = json.loads(next((tmp_path / folder.name).glob("*.json")).read_text())
        values.append(next(iter(record["metrics"].values())))
        assert record["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_packed_model_is_not_pruned_again(twins, tmp_path, capsys):
    assert run.main(["--model", str(twins[1]), "--method", "wanda", "--evaluate", "none", "--results", str(tmp_path),
                     "--no-progress"]) == 2
    assert "packed already" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_import_it_fails_loudly(folders):
    """One process for all families: it loads none of them."""
    code = """import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        print("mismatch" in str(error).lower())"""
    packed_ones = [str(small) for _, small in folders.values()]
    done = alone(code, *packed_ones)
    assert done.stdout.split() == ["True"] * len(packed_ones), done.stderr[-2000:]
    for folder in packed_ones:
        assert "import oneshot" in (Path(folder) / "config.json").read_text()


def test_verified(twins, capsys):
    assert verify.main([str(twins[1])]) == 0, capsys.readouterr().out


def test_verify_compares_with_the_twin(twins, capsys):
    for one, other in (twins, twins[::-1]):
        assert verify.main([str(one), "--twin", str(other), "--quiet"]) == 0
        *_, last = capsys.readouterr().out.splitlines()
        model = load(twins[0])
        assert last == f"{len(model.state_dict())} tensors compared with {other}: all equal"


def test_verify_finds_what_differs_from_the_twin(twins, tmp_path, capsys):
    """Also outside the linears, where the manifest says nothing."""
    twin = tiny.copy(twins[0], tmp_path / "twin")

    def change(tensors):
        norm = next(k for k in tensors if k.endswith(("norm.weight", "ln_f.weight")))
        tensors[norm][0] += 1
        wide = next(k for k in tensors if k.endswith(("up_proj.weight", "c_fc.weight")))
        tensors[wide][0, :2] += 1
    tiny.change_weights(twin, change)
    assert verify.main([str(twins[1]), "--twin", str(twin), "--quiet"]) == 1
    told = capsys.readouterr().out
    assert told.count("FAULT") == 2 and ": 1 of 32 values differ" in told and ": 2 of " in told and "all proved" in told
    assert verify.main([str(twins[1]), "--twin", str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


def test_verify_finds_another_dtype_and_other_names(twins, tmp_path, capsys):
    load(twins[0], dtype=torch.float32).save_pretrained(tmp_path / "wide")
    tiny.tokenizer().save_pretrained(tmp_path / "wide")
    compared, faults = verify.compare(twins[1], tmp_path / "wide")
    assert len(faults) == compared and all("torch.float32" in text for text in faults)
    other = tiny.save_model(tmp_path / "other", "llama" if "gpt2" in str(twins[0]) else "gpt2")
    compared, faults = verify.compare(twins[1], other)
    assert faults and all(": only in " in text for text in faults if "lm_head" not in text)


def test_verify_finds_one_changed_value(twins, tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tampered"
    shutil.copytree(twins[1], folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if k.endswith(".metadata")).removesuffix("metadata") + "weight"
    tensors[name][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert verify.main([str(folder)]) == 1
    assert "bytes are not the recorded ones" in capsys.readouterr().out


def edit(folder, target, **changes):
    """A copy of a packed folder with another quantization_config."""
    import shutil

    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def metadata_key(tensors):
    return next(key for key in tensors if key.endswith("metadata"))


def test_damaged_metadata_is_refused_while_loading(twins, tmp_path):
    """Whatever the device: the GPU kernels would multiply with it. Also where no manifest says that it has changed."""
    folder = tiny.copy(twins[1], tmp_path / "spoilt")
    (folder / checkpoint.MANIFEST).unlink()
    tiny.change_weights(folder, lambda t: t[metadata_key(t)].fill_(0xFF))
    with pytest.raises(ValueError, match="bad metadata: row 0, group 0"):
        load(folder)


@pytest.mark.parametrize("part", ["weight", "metadata"])
def test_a_tensor_that_is_missing_is_not_made_up(twins, tmp_path, part):
    folder = tiny.copy(twins[1], tmp_path / "spoilt")
    tiny.change_weights(folder, lambda t: t.pop(metadata_key(t).replace("metadata", part)))
    with pytest.raises(ValueError, match=r"packed linears, the files hold .* incomplete"):
        load(folder)


def test_a_config_that_does_not_fit_is_refused(twins, tmp_path):
    with pytest.raises(ValueError, match="not a linear of"):
        load(edit(twins[1], tmp_path / "a", linears=["lm_head.nothing"]))
    with pytest.raises(ValueError, match="unknown entries"):
        load(edit(twins[1], tmp_path / "b", module="os"))


def test_packing_refuses_what_is_not_2of4(tmp_path):
    model = load(tiny.save_model(tmp_path, "llama", torch.float32))
    name = next(models.all_weights(model)).name
    with pytest.raises(ValueError, match=f"{name}: not 2:4: row 0"):
        packed.pack_model(model, [name])


@pytest.mark.parametrize("flags", [["--pattern", "0.5", "--save", "x"], ["--pattern", "2:4"]])
def test_format_packed_wants_2of4_and_a_folder(flags, capsys):
    assert run.main(["--method", "magnitude", "--format", "packed", *flags]) == 2
    assert "--format packed" in capsys.readouterr().err


def test_generate_shows_both(twins, capsys):
    dense, small = twins
    assert generate.main([str(small), "--compare", str(dense), "--prompt", PROMPT, "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    first, second = (part.split("\n")[1] for part in ("\n" + out).split("\n--- ")[1:])
    assert first == second and "(packed)" in out and "tokens/s" in out
    llama = "llama" in str(dense)
    assert out.count("one compiled call" if llama else "transformers (gpt2 is not among") == 2


def test_generate_compiles_packed_models_where_it_compiles_dense_ones(twins):
    """transformers asks the quantizer; a no would leave the decoding on a GPU uncompiled, without a word."""
    model = load(twins[1], dtype=torch.float32)
    prompt = ids(model)[:1]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **options)
    how = CompileConfig(backend="aot_eager", fullgraph=True)
    how._compile_all_devices = True  # else only on a GPU
    got = model.generate(prompt, **options, cache_implementation="static", compile_config=how)
    assert hasattr(model, "_compiled_call") and torch.equal(got, want)


@pytest.mark.parametrize(("words", "flags"), [
    (["positions"], ["--max-new-tokens", "100000"]), (["--device"], ["--device", "nowhere"]),
    (["--max-new-tokens"], ["--max-new-tokens", "0"]), (["--prompt"], ["--prompt", ""]),
    (["--temperature -1", "above 0"], ["--temperature", "-1"]), (["--dtype", "int3"], ["--dtype", "int3"]),
    (["--tokens", "did you mean"], ["--tokens", "3"]),
    (["--compare absent: no such folder"], ["--compare", "absent", "--max-new-tokens", "2"]),
])
def test_generate_bad_input(twins, capfd, words, flags):
    assert generate.main([str(twins[1]), "--prompt", PROMPT, *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert all(word in err for word in words), err


def test_generate_wants_a_model(tmp_path, capsys):
    assert generate.main([]) == 2 and "required: model" in capsys.readouterr().err
    assert generate.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no config.json")
