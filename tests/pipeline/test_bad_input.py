"""What a user can get wrong: exit code 2, one line on stderr that names it and says what to do, nothing written.

The line that names the device stands before it once the command line is understood.
"""

import json

import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.fixture
def refused(place, tmp_path, capfd):  # noqa: F811
    """`refused(words, *more, **changed)`: the run is refused in one line that holds all the words; that line."""
    def check(words, *more, command=None, **changed):
        out = tmp_path / "out"
        changed = {"save": out, "results": tmp_path / "runs"} | changed
        code = tiny.main(*(tiny.flags(place, *more, **changed) if command is None else command))
        stdout, stderr = capfd.readouterr()
        assert code == 2, stdout + stderr
        lines = tiny.said(stderr)
        assert len(lines) == 1 and lines[0].startswith("error: "), stderr
        assert not [word for word in words if word not in lines[0]], lines[0]
        assert len(lines[0]) < 500
        assert not list(out.rglob("*")) and not list((tmp_path / "runs").rglob("*"))
        return lines[0]
    return check


@pytest.mark.parametrize(("words", "changed"), [
    (["--model", "no/such/folder"], {"model": "./no/such/folder"}),
    (["--model", "nobody/nothing"], {"model": "nobody/nothing"}),  # a hub name, offline
    (["--method", "wander", "wanda"], {"method": "wander"}),
    (["--method", "wanda+sparsegpt", "refiner"], {"method": "wanda+sparsegpt"}),
    (["--method"], {"method": ","}),
    (["--pattern", "half", "2:4"], {"pattern": "half"}),
    (["--pattern", "5:4"], {"pattern": "5:4"}),
    (["--pattern", "[0, 1)"], {"pattern": "1.0"}),
    (["--pattern", "[0, 1)"], {"pattern": "-0.1"}),
    (["--pattern", "[0, 1)"], {"pattern": "nan"}),
    (["--pattern 2:5", "model.layers.0.self_attn.q_proj", "32x32"], {"pattern": "2:5"}),
    (["--group"], {"group": "column"}),
    (["--calibration", "absent.txt", "path"], {"calibration": "absent.txt"}),
    (["--calibration", "nonsense", "builtin"], {"calibration": "nonsense"}),
    (["--evaluate", "absent.txt", "path"], {"evaluate": "absent.txt"}),
    (["--nsamples", "at least 1"], {"nsamples": 0}),
    (["--seqlen", "at least 2"], {"seqlen": 1}),
    (["--seqlen 100", "64 positions"], {"seqlen": 100}),
    (["--eval-seqlen 100", "64 positions"], {"eval_seqlen": 100}),
    (["--gram-budget"], {"gram_budget": "inf"}),
    (["--nsamples", "int", "many"], {"nsamples": "many"}),
    (["--documents", "apart", "separate"], {"documents": "apart"}),
    (["--device", "abacus"], {"device": "abacus"}),
    (["--device", "cpu and cuda"], {"device": "meta"}),
    (["--activations", "abacus"], {"activations": "abacus"}),
    (["--save"], {"save": ""}),
    (["--evaluate", "second text"], {"evaluate": "builtin:prose,builtin:prose"}),
    (["--evaluate", "second text named a"], {"evaluate": "a=builtin:prose,a=builtin:sampled"}),
    (["--evaluate a=", "NAME=FILE"], {"evaluate": "a="}),
    (["--evaluate =builtin", "NAME=FILE"], {"evaluate": "=builtin"}),
    (["--evaluate absent.txt"], {"evaluate": "a=absent.txt"}),
    (["--prompts absent.jsonl", "No such file"], {"prompts": "absent.jsonl"}),
], ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "")
def test_flags(refused, words, changed):
    refused(words, **changed)


@pytest.mark.parametrize(("words", "more"), [
    (["--methd", "did you mean --method?"], ["--methd", "wanda"]),
    (["--sparsegpt.damping", "does not use sparsegpt"], ["--sparsegpt.damping", "0.1"]),
    (["--nsamples", "argument"], ["--nsamples"]),
    (["--sparsity_ratio", "--prune_method"], ["--sparsity_ratio", "0.5"]),
    (["--method", "--prune_method"], ["--prune_method", "wanda"]),
], ids=lambda x: x[0])
def test_flags_that_do_not_fit(refused, words, more):
    refused(words, *more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_absent(refused):
    refused(["--device cuda", "no CUDA device", "cpu"], device="cuda")


def test_text_shorter_than_a_window(refused, tmp_path):
    (tmp_path / "short.txt").write_text("so short")
    refused(["--calibration", "short.txt", "8 tokens", "--seqlen"], calibration=tmp_path / "short.txt")
    refused(["--evaluate", "short.txt", "8 tokens", "--seqlen"], evaluate=tmp_path / "short.txt")


def test_data_files(refused, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"body": "a b c", "title": "d"}))
    refused(["--calibration", "no column 'text'", "body, title"], "--column", "text", calibration=rows)
    rows.write_text("{")
    refused(["--calibration", "line 1", "JSON"], calibration=rows)
    (tmp_path / "data.xyz").write_text("text")
    refused(["--calibration", "data.xyz", ".txt"], calibration=tmp_path / "data.xyz")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_not_finite(refused, place, tmp_path, value):  # noqa: F811
    name = "model.layers.1.mlp.up_proj.weight"
    model = tiny.copy(place / "model", tmp_path / "model")
    tiny.change_weights(model, lambda tensors: tensors[name][3].fill_(value))
    refused([name, "not finite"], model=model)


def test_activations_not_finite(refused, place, tmp_path):  # noqa: F811
    model = tiny.copy(place / "model", tmp_path / "model")
    tiny.change_weights(model, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e30))
    refused(["model.layers.0.mlp.down_proj", "not finite"], model=model)


def test_checkpoints_that_cannot_be_loaded(refused, place, tmp_path):  # noqa: F811
    def spoilt(name, change):
        change(tiny.copy(place / "model", tmp_path / name))
        return tmp_path / name

    def pickle(folder):
        torch.save(tiny.weights(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def truncate(folder):
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-1000])

    def settings(**changed):
        def change(folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | changed))
        return change

    refused(["--model", "pickle", "safetensors"], model=spoilt("pickle", pickle))
    refused(["--model", "truncated"], model=spoilt("truncated", truncate))
    refused(["--model", "broken"], model=spoilt("broken", lambda f: (f / "config.json").write_text("{")))
    refused(["--model", "unknown"], model=spoilt("unknown", settings(model_type="nonesuch")))
    refused(["--model", "config.json"], model=spoilt("bare", lambda f: (f / "config.json").unlink()))
    refused(["--model", "empty"], model=spoilt("empty", lambda f: (f / "model.safetensors").unlink()))
    lost = spoilt("lost", lambda f: tiny.change_weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))
    refused(["--model", "model.layers.1.mlp.up_proj.weight"], model=lost)
    refused(["--model", "wrong"], model=spoilt("wrong", settings(intermediate_size=64)))
    refused(["--model", "tokenizer"], model=spoilt("tokenizer", lambda f: (f / "tokenizer.json").unlink()))


@pytest.mark.parametrize("kind", ["bert", "roformer", "rembert", "megatron-bert", "roberta"])
def test_encoder_only_model(refused, tmp_path, capfd, kind):
    """AutoModelForCausalLM loads each of them without a word."""
    config = AutoConfig.for_model(kind, vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  intermediate_size=48, max_position_embeddings=64, pad_token_id=0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / kind)
    tiny.tokenizer().save_pretrained(tmp_path / kind)
    capfd.readouterr()  # what transformers says of saving
    refused(["--model", "decoder-only"], model=tmp_path / kind)


def test_an_encoder_made_a_decoder_is_one(place, tmp_path):  # noqa: F811
    config = AutoConfig.for_model("roformer", vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  intermediate_size=48, max_position_embeddings=64, pad_token_id=0, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    assert tiny.main(*tiny.flags(place, "--no-dense", model=tmp_path / "model", results=tmp_path / "runs")) == 0


def test_places_to_write(refused, place, tmp_path, monkeypatch):  # noqa: F811
    file = tmp_path / "file"
    file.write_text("mine")
    refused(["--save", "is a file"], save=file)
    refused(["--save", "is a file"], save=file / "below")
    refused(["--results", "is a file"], results=file)
    refused(["--results", "is a file"], results=file / "below")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    refused(["--save", "foreign", "not oneshot's"], save=foreign)
    refused(["--save", "foreign", "not oneshot's"], "--overwrite", save=foreign)
    assert file.read_text() == (foreign / "thesis.tex").read_text() == "mine" and len(list(foreign.iterdir())) == 1
    copied = tiny.copy(place / "model", tmp_path / "copied")
    refused(["--save"], save=copied, model=copied)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    refused(["--results", "no permission"], results=tmp_path / "locked", save=None)
    refused(["--save", "no permission"], save=tmp_path / "locked")


@pytest.mark.parametrize("below", ["", "runs", "runs/../.", "a/b"])
@pytest.mark.parametrize("method", ["wanda", "dense,wanda"])
def test_records_in_the_folder_of_the_checkpoint(refused, tmp_path, below, method):
    """They would be foreign files there, so that a damaged or unfinished checkpoint could not be made again."""
    save = tmp_path / "save"
    save.mkdir()
    refused(["--results", "--save"], save=save, results=save / below, method=method, evaluate="none")
    assert not list(save.iterdir())


def test_records_above_the_folders_of_several_checkpoints(place, tmp_path):  # noqa: F811
    argv = tiny.flags(place, "--no-dense", method="magnitude,wanda", evaluate="none", save=tmp_path / "save",
                      results=tmp_path / "save")
    assert tiny.main(*argv) == 0 and tiny.main(*argv) == 0


@pytest.mark.parametrize("flag", ["save", "results", "model", "task_path"])
def test_names_that_no_file_can_have(refused, flag):
    refused([f"--{flag.replace('_', '-')} xxx", "too long"], **{"tasks": "mine"} if flag == "task_path" else {},
            **{flag: "x" * 300})


def test_nothing_to_save(refused):
    refused(["--save", "nothing is pruned"], method="dense")


def test_default_results_folder_is_not_made_for_a_refused_run(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(["--pattern"], pattern="2:5", results=None)
    assert not (tmp_path / "runs").exists()


def test_program_exits_with_the_code(place, tmp_path):  # noqa: F811
    done = tiny.python("-m", "oneshot.run", *tiny.flags(place, model="nobody/nothing", results=tmp_path / "runs"))
    assert done.returncode == 2 and done.stdout == ""
    [line] = tiny.said(done.stderr)
    assert line.startswith("error: --model nobody/nothing")
