"""`oneshot verify` covers every file and tensor, and what the manifest says of itself; so does loading packed values.
"""

import json
import random
import warnings

import pytest
import tiny
import torch
from tiny import plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM

from oneshot import models
from oneshot.checkpoint import contents, verify
from oneshot.runtime import sealed

pytestmark = pytest.mark.usefixtures("plain_pages")
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tiny.make(tmp_path_factory.mktemp("files"))
    for kind, dtype in (("llama", torch.bfloat16), ("gpt2", torch.float16)):
        tiny.save_model(place / kind, kind, dtype)
    return place


@pytest.fixture(scope="module")
def saved(place):
    """{name: a finished folder}"""
    runs = {"llama": {}, "gpt2": {"model": place / "gpt2"}, "packed": {"format": "packed"},
            "half": {"pattern": "0.5", "method": "sparsegpt"}}
    with tiny.no_pictures():
        for name, changed in runs.items():
            argv = tiny.flags(place, "--no-dense", **{"model": place / "llama", "evaluate": "none"} | changed,
                              save=place / "saved" / name)
            assert tiny.main(*argv) == 0
    return {name: place / "saved" / name for name in runs}


@pytest.fixture
def check(saved, tmp_path, capsys):
    """`check(name, change)`: (exit code, lines of stdout and stderr) for a copy of a good folder that is spoilt."""
    def run(name, change=lambda folder: None, *more):
        folder = tiny.copy(saved[name], tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        change(folder)
        capsys.readouterr()
        code = verify.main([str(folder), "--quiet", *more])
        told = capsys.readouterr()
        return code, (told.out + told.err).splitlines()
    return run


def flip(file, at, bit=6):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def in_manifest(change):
    """Change the manifest as its writer would: with a new seal."""
    def apply(folder):
        data, _ = sealed.read(folder / "oneshot.json")
        change(data)
        sealed.write(data, folder / "oneshot.json")
    return apply


def stripped(folder):
    """The manifest as an older oneshot wrote it."""
    data, _ = sealed.read(folder / "oneshot.json")
    old = {"schema": 1} | {k: v for k, v in data.items() if k not in ("schema", "files", "stored_tensors")}
    (folder / "oneshot.json").write_text(json.dumps(old, indent=1) + "\n")


# ---------------------------------------------------------------- files and tensors

@pytest.mark.parametrize("name", ["llama", "gpt2", "packed", "half"])
def test_good_folders_are_proved(check, saved, name):
    code, [verdict] = check(name)
    parts = contents.parts_of(saved[name] / "model.safetensors")
    files = [f for f in saved[name].iterdir() if f.name != "oneshot.json"]
    assert code == 0
    assert verdict.endswith(f"all proved ({len(files)} files and the {len(parts)} tensors in them hashed)")


@pytest.mark.parametrize("name", ["llama", "gpt2", "packed"])
def test_one_bit_of_any_tensor_is_found_and_named(check, saved, name):
    """Norms, embeddings, biases and packed values as well as linears, at their beginning and at their end."""
    parts = contents.parts_of(saved[name] / "model.safetensors")
    for tensor, part in parts.items():
        for at in (part.begin, part.end - 1):
            code, lines = check(name, lambda folder, at=at: flip(folder / "model.safetensors", at, 0))
            linear = tensor.removesuffix(".weight").removesuffix(".metadata")
            if code == 2:  # metadata that no kernel may see
                assert "metadata" in lines[0] and f"not as recorded: {tensor}" in lines[0]
            else:
                assert code == 1 and any(line.startswith(f"FAULT {linear}") for line in lines), (tensor, lines)
            assert len([line for line in lines if line.startswith("FAULT")]) <= 3


def test_one_bit_anywhere_is_found(check, saved):
    """In every file, headers and the manifest included."""
    draw = random.Random(0)
    for file in saved["llama"].iterdir():
        size = file.stat().st_size
        for at in [0, size - 1, *(draw.randrange(size) for _ in range(6))]:
            code, lines = check("llama", lambda f, n=file.name, at=at: flip(f / n, at, draw.randrange(8)))
            assert code in (1, 2) and not any("all proved" in line for line in lines), (file.name, at, lines)
            assert code == 1 or len(lines) == 1, lines


@pytest.mark.parametrize(("name", "change"), [
    ("config.json", {"rms_norm_eps": 0.5}), ("config.json", {"hidden_act": "gelu"}),
    ("config.json", {"attention_bias": False}), ("generation_config.json", {"temperature": 2.0}),
    ("tokenizer_config.json", {"model_max_length": 7})])
def test_a_changed_setting_of_the_model_is_found(check, name, change):
    def apply(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change, indent=2))
    code, lines = check("llama", apply)
    assert code == 1 and any(line.startswith(f"FAULT {name}: ") for line in lines)


@pytest.mark.parametrize("name", ["generation_config.json", "report.html", "tokenizer_config.json"])
def test_a_file_that_is_gone_is_found(check, name):
    code, lines = check("llama", lambda folder: (folder / name).unlink())
    assert code in (1, 2) and any(f"{name}: is missing" in line for line in lines)


def test_what_is_not_the_runs_is_named_and_no_fault(check):
    def add(folder):
        (folder / "notes.txt").write_text("mine")
        (folder / "more").mkdir()
        (folder / "more" / "a.json").write_text("{}")
    code, [verdict] = check("llama", add)
    assert code == 0 and "not checked: more/a.json (not the run's), notes.txt (not the run's)" in verdict


@pytest.mark.parametrize("name", ["llama", "packed"])
@pytest.mark.filterwarnings("ignore:.*loaded unchecked")
def test_an_older_manifest_still_proves_what_it_can(check, name):
    code, [verdict] = check(name, stripped)
    assert code == 0 and "all proved (not checked: norms, embeddings" in verdict

    def change(folder):
        stripped(folder)
        part = contents.parts_of(folder / "model.safetensors")["model.norm.weight"]
        flip(folder / "model.safetensors", part.begin)
    assert check(name, change)[0] == 0  # nothing is known of it, and that is said


@pytest.mark.parametrize("key", ["files", "stored_tensors", "sha256_of_this", "schema"])
def test_a_manifest_without_its_hashes_is_no_older_one(check, key):
    def strip(folder):
        data = json.loads((folder / "oneshot.json").read_text())
        data.pop(key)
        (folder / "oneshot.json").write_text(json.dumps(data, indent=1) + "\n")
    assert check("llama", strip)[0] != 0


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "a/../../outside.txt", ".oneshot/x", "link/x.txt"])
def test_a_manifest_names_files_inside_the_folder_only(check, tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.txt").write_text("x")

    def change(folder):
        (folder / "link").symlink_to(tmp_path / "outside")
        in_manifest(lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))(folder)
    code, lines = check("llama", change)
    assert code == 1 and f"FAULT {name}: is no name of a file in this folder" in lines


# ---------------------------------------------------------------- what a manifest says of itself

def entry(**changes):
    return lambda m: m["tensors"][UP].update(changes)


def settings(**changes):
    return lambda m: m["record"]["settings"].update(changes)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("llama", entry(target_zeros=767), f"{UP}: recorded to need 767 zeros, pattern 2:4 needs 768"),
    ("llama", entry(group="row"), f"{UP}: group row, which pattern 2:4 does not have"),
    ("half", entry(group="row"), f"{UP}: pattern 0.5 by row, the settings ask for 0.5 by 128"),
    ("half", entry(group="128"), f"{UP}: group 128, which pattern 0.5 does not have"),
    ("llama", entry(zeros=10**9), f"{UP}: 1000000000 zeros recorded"),
    ("llama", lambda m: m["record"]["layers"].pop(), "has no row in the record"),
    ("llama", lambda m: m["record"]["layers"][3].update(zeros=5), "its zeros differ between record and manifest"),
    ("llama", settings(pattern="4:8"), f"{UP}: pattern 2:4, the settings ask for 4:8"),
    ("half", settings(pattern="0.6"), f"{UP}: pattern 0.5 by 128, the settings ask for 0.6 by 128"),
    ("half", settings(method="wanda", solver={"wanda": {}}), f"{UP}: pattern 0.5 by 128, the settings ask for 0.5"),
    ("half", settings(group="matrix"), "the settings ask for 0.5 by matrix"),
    ("half", settings(allocate="owl", pattern="0.6"), "its patterns ask for"),
    ("llama", settings(method="dense"), "though --method dense prunes nothing"),
    ("llama", settings(method="unheard-of"), "Its settings: cannot be read"),
    ("llama", settings(pattern=["2:4"]), "Its settings: cannot be read"),
    ("llama", lambda m: m.update(format="packed"), "its format is packed, the settings ask for dense"),
    ("llama", lambda m: (m.update(format="packed"), m["record"]["settings"].update(format="packed")),
     "Its format: cannot be read"),
    ("llama", lambda m: m.update(format="gguf"), "its format is gguf"),
    ("packed", lambda m: (m.update(format="dense"), m["record"]["settings"].update(format="dense")),
     "but it has an entry packed"),
    ("packed", lambda m: m["packed"].update(linears=3), "packed linears, recorded 3"),
    ("packed", lambda m: m["packed"].update(bytes=3), "recorded 3 and"),
    ("packed", lambda m: m["left_dense"].update({UP: "why"}), "are not left dense"),
    ("llama", lambda m: m["record"].update(sparsity=0.9), "sparsity 0.9 recorded, it is 0.5"),
    ("llama", lambda m: m["record"].update(layers=3), "cannot be read"),
])
def test_a_manifest_that_does_not_agree_with_itself(check, name, change, words):
    code, lines = check(name, in_manifest(change))
    assert code == 1 and any(words in line for line in lines if line.startswith("FAULT")), lines


@pytest.mark.parametrize("more", [
    ("--allocate", "owl", "--pattern", "0.5"), ("--allocate", "arithmetic", "--pattern", "0.5", "--group", "16"),
    ("--allocate", "error", "--pattern", "0.3", "--keep-dense", "*.down_proj"), ("--allocate", "mix"),
    ("--method", "ria", "--pattern", "0.7"), ("--method", "wanda", "--wanda.use-variant", "--pattern", "0.5"),
    ("--method", "sparsegpt", "--sparsegpt.block-size", "16", "--pattern", "0.5"),
    ("--group", "row", "--pattern", "0.1"),
    ("--keep-dense", "model.layers.0.*"), ("--heal", "block", "--block.steps", "1")], ids=" ".join)
def test_what_the_program_writes_agrees(place, tmp_path, capsys, more):
    argv = tiny.flags(place, "--no-dense", *more, evaluate="none", save=tmp_path / "out", results=tmp_path / "runs")
    assert tiny.main(*argv) == 0
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0, capsys.readouterr().out


# ---------------------------------------------------------------- loading packed values

def test_changed_packed_values_do_not_load(saved, tmp_path):
    """60 of 60, wherever they lie, and in every kind of tensor."""
    folder = tiny.copy(saved["packed"], tmp_path / "copy")
    file = folder / "model.safetensors"
    parts = contents.parts_of(file)
    draw, good = random.Random(1), file.read_bytes()
    begin = min(part.begin for part in parts.values())
    for _ in range(60):
        at = draw.randrange(begin, len(good))
        flip(file, at, draw.randrange(8))
        [name] = [tensor for tensor, part in parts.items() if part.begin <= at < part.end]
        with pytest.raises(ValueError, match=rf"{name}: not the bytes that oneshot\.json records"):
            AutoModelForCausalLM.from_pretrained(folder)
        file.write_bytes(good)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(folder)


def test_changed_packed_values_as_a_model_are_one_line(saved, tmp_path, capsys):
    folder = tiny.copy(saved["packed"], tmp_path / "copy")
    flip(folder / "model.safetensors", -1)
    with pytest.raises(ValueError, match=r"cannot be loaded .*not the bytes that oneshot\.json records"):
        models.load(folder)


@pytest.mark.parametrize("spoil", [lambda f: (f / "oneshot.json").unlink(), stripped,
                                   lambda f: (f / "oneshot.json").write_text("[")])
def test_packed_values_nobody_can_check_load_with_a_warning(saved, tmp_path, spoil):
    folder = tiny.copy(saved["packed"], tmp_path / "copy")
    spoil(folder)
    with pytest.warns(UserWarning, match="its packed values are loaded unchecked"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_verify_names_changed_packed_values_with_and_without_a_twin(check, saved):
    code, lines = check("packed", lambda f: flip(f / "model.safetensors", -1), "--twin", str(saved["llama"]))
    assert code == 1 and any(line.startswith("FAULT") for line in lines) and "1 fault" in lines[-1]


@pytest.mark.parametrize("layers, said", [
    (10**30, f"its config says that num_hidden_layers is {10**29}"),
    (10**7, "its config names 1e+07 layers, its files hold 30 tensors")])
def test_a_config_with_more_layers_than_the_files_could_fill_takes_no_memory(check, layers, said):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    code, [error] = check("llama", change)
    assert code == 2 and said in error
