"""What is wrong with what comes in is one line and exit code 2, never a traceback: models, texts, records, disks."""

import errno
import json
import os

import families
import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM

import oneshot
from oneshot import models
from oneshot.checkpoint import verify
from oneshot.measure.losses import token_losses
from oneshot.pipeline import generate
from oneshot.report import compare
from oneshot.runtime.command import exit_code

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.fixture
def one_line(place, tmp_path, capfd):  # noqa: F811
    """`one_line(*more, main=, argv=, **changed)`: the one line of a command that is refused, without "error: "."""
    def check(*more, main=tiny.main, argv=None, **changed):
        if argv is None:
            given = {"results": tmp_path / "runs", "method": "magnitude", "nsamples": 2} | changed
            code = main(*tiny.flags(place, "--no-dense", *more, **given))
        else:
            code = main([str(word) for word in argv])
        err = capfd.readouterr().err.splitlines()
        assert code == 2, err
        assert [line.startswith("error: ") for line in err].count(True) == 1 and err[-1].startswith("error: "), err
        assert len(err[-1]) < 500, err
        return err[-1].removeprefix("error: ")
    return check


@pytest.fixture
def changed_model(place, tmp_path):  # noqa: F811
    """`changed_model(kind, **changes)`: a copy of a tiny model with another config.json."""
    def change(**changes):
        folder = tiny.copy(place / "model", tmp_path / "model")
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder
    return change


# ---------------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize(("changes", "words"), [
    ({"num_attention_heads": 3}, "not a multiple of"),
    ({"num_hidden_layers": 0}, "has no transformer blocks"), ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ({"num_labels": 10**30}, "num_labels"), ({"num_key_value_heads": 0}, ""), ({"num_key_value_heads": 3}, ""),
    ({"vocab_size": "32"}, ""), ({"vocab_size": 20}, "vocab_size"), ({"dtype": "float8"}, ""), ({"head_dim": 5}, ""),
    ({"rms_norm_eps": None}, ""), ({"rms_norm_eps": "1e-05"}, ""), ({"hidden_size": 32.0}, ""),
    ({"hidden_act": "none"}, "KeyError: 'none'"), ({"hidden_act": 3}, ""), ({"model_type": ["llama"]}, ""),
    ({"rope_parameters": []}, ""), ({"rope_parameters": {"rope_type": "abc"}}, ""), ({"architectures": 7}, None),
    ({"layer_types": "abc"}, ""), ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, None),
    ({"max_position_embeddings": "abc"}, ""), ({"pad_token_id": 99999}, "Padding_idx"),
], ids=lambda x: json.dumps(x)[:40] if isinstance(x, dict) else "")
def test_configs(one_line, changed_model, place, tmp_path, capfd, changes, words):  # noqa: F811
    """words: what the line holds beside the flag; None: it may as well work."""
    folder = changed_model(**changes)
    code = tiny.main(*tiny.flags(place, model=folder, nsamples=2, results=tmp_path / "runs"))
    capfd.readouterr()
    if words is None and code == 0:
        return
    line = one_line(model=folder)
    assert line.startswith("--model") and (words or "") in line, line


@pytest.mark.parametrize("where", ["embed_tokens", "layers.0.mlp", "layers.2.self_attn", "norm"])
@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), IndexError("index 7"), AssertionError(),
                                   ImportError("needs a thing"), KeyError("x"), NotImplementedError("not on this one")],
                         ids=lambda e: type(e).__name__)
def test_the_models_own_code(place, monkeypatch, capfd, where, error):  # noqa: F811
    """Wherever the model's code fails while blocks are run: said of the model, by its class, as ValueError."""
    model, tokenizer = models.load(place / "model")

    def failing(*args, **kwargs):
        raise error
    model.model.get_submodule(where).forward = failing
    said = r"^--model: Llama\w+ cannot be run block by block: " + type(error).__name__
    with pytest.raises(ValueError, match=said):
        token_losses(model, torch.full((2, 8), 5))
    if where != "norm":  # which pruning does not need
        with pytest.raises(ValueError, match=said):
            oneshot.prune(model, tokenizer, method="wanda", pattern="0.5", calibration=str(place / "calibration.txt"),
                          nsamples=2, seqlen=8, progress=False)


def test_other_places_where_the_model_is_run(place, tmp_path, one_line, monkeypatch):  # noqa: F811
    from transformers import LlamaForCausalLM

    def failing(*args, **kwargs):
        raise RuntimeError("no kernel image")
    monkeypatch.setattr(LlamaForCausalLM, "forward", failing)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "expected": "b"}\n')
    for words, changed in (("--calibration self: ", {"calibration": "self", "method": "wanda"}),
                           ("--prompts ", {"prompts": tmp_path / "p.jsonl", "evaluate": "none"}),
                           ("--model: ", {})):
        line = one_line(**changed)
        assert line.startswith(words) and "LlamaForCausalLM" in line and "no kernel image" in line
    argv = [place / "model", "--prompt", "a", "--max-new-tokens", "2"]
    line = one_line(main=generate.main, argv=argv)
    assert line.startswith(str(place / "model")) and "no kernel image" in line


def test_short_of_memory_is_not_taken_for_the_models_fault(place, one_line, monkeypatch):  # noqa: F811
    def failing(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", failing)
    line = one_line()
    assert line.startswith("out of memory") and "--batch-size" in line and "--model" not in line
    assert exit_code(lambda: (_ for _ in ()).throw(MemoryError())) == 2


def test_a_fault_of_oneshots_own_keeps_its_traceback(place, monkeypatch):  # noqa: F811
    """No net below everything: a traceback is what a fault report needs."""
    def failing(*args):
        raise RuntimeError("a fault of ours")
    monkeypatch.setattr("oneshot.pipeline.run.identify", failing)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        tiny.main(*tiny.flags(place))


def test_offloaded_models(place):  # noqa: F811
    """Weights that are on no device: load the model without offload."""
    model, tokenizer = models.load(place / "model")
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"^--model: model\.layers\.1\..* is offloaded .*load the model without"):
        oneshot.prune(model, tokenizer, method="wanda", calibration=str(place / "calibration.txt"), progress=False)


def test_blocks_that_return_two_things(place, tmp_path):  # noqa: F811
    """Bamba's do, its second one None: pruned, saved, proved, and measured as the model itself does it."""
    families.tiny("bamba").save_pretrained(tmp_path / "bamba")
    tiny.tokenizer().save_pretrained(tmp_path / "bamba")
    argv = tiny.flags(place, "--no-dense", model=tmp_path / "bamba", save=tmp_path / "out", results=tmp_path / "runs")
    assert tiny.main(*argv) == 0
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0
    [record] = tiny.records(tmp_path / "runs").values()
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), torch.randint(3, 30, (3, 12))
    with torch.no_grad():
        plain = sum(model(row[None], labels=row[None]).loss for row in ids) / 3
    torch.testing.assert_close(token_losses(model, ids).mean(), plain)
    assert record["sparsity"] == pytest.approx(0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("flag", ["device", "activations"])
def test_a_gpu_that_is_not_there(one_line, place, flag):  # noqa: F811
    assert one_line(**{flag: "cuda"}).startswith(f"--{flag} cuda: ")
    if flag == "device":
        assert one_line(main=generate.main, argv=[place / "model", "--device", "cuda:1"]).startswith("--device cuda:1")


# ------------------------------------------------------------------------------------- tokens and their tokenizer

def test_a_tokenizer_that_knows_more_than_the_model(one_line, place, tmp_path):  # noqa: F811
    """Another model's, or with tokens added: padding is masked, so it may; text may not, wherever it comes from."""
    model, tokenizer = tiny.copy(place / "model", tmp_path / "model"), tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(model)
    argv = tiny.flags(place, "--no-dense", "--per-line", model=model, documents="separate", nsamples=2,
                      save=tmp_path / "s", results=tmp_path / "runs",
                      calibration=tiny.save_text(tmp_path / "short.txt", 3, n=9))
    assert tiny.main(*argv) == 0, "padding is masked"
    chat, suite = tmp_path / "chat.txt", tmp_path / "p.jsonl"
    chat.write_text("<|im_start|>user tell me a story about a dog and a ball\n" * 200)
    suite.write_text('{"prompt": "a", "expected": "b"}\n{"prompt": "<|im_start|>", "expected": "b"}\n')
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "expected": "<|im_start|>", "choices": ["<|im_start|>"]}\n')
    beyond = "token 33 ('<|im_start|>') is beyond the 32 rows of the model's embedding"
    for begin, changed in ((f"--calibration {chat}: ", {"calibration": chat, "method": "wanda"}),
                           (f"--evaluate {chat}: ", {"evaluate": f"x={chat}"}),
                           (f"--prompts {suite}: line 2: ", {"prompts": suite, "evaluate": "none"}),
                           (f"--prompts {tmp_path / 'c.jsonl'}: line 1: ", {"prompts": tmp_path / "c.jsonl"})):
        line = one_line(model=model, **changed)
        assert line.startswith(begin + beyond) or (begin + beyond) in line, line
    line = one_line(main=generate.main, argv=[model, "--prompt", "<|im_start|>user"])
    assert line.startswith(f"--prompt: {beyond}")


# ---------------------------------------------------------------------------------------------- files and places

DEEP = "[" * 100_000


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 100_000, "", "[1", "\0", "3", "null", '"text"', "9" * 5000,
                                     b"\xff",
                                     r'{"sensitivity": [{"name": "\ud83d", "loss_increase": 1, "weights": 1}]}',
                                     '{"sensitivity": [{"name": "a", "loss_increase": 1, "weights": 0}]}',
                                     '{"sensitivity": {"name": []}}', '{"sensitivity": [[1]]}', "pipe", "folder"],
                         ids=lambda x: str(x)[:30])
def test_json_of_any_content(one_line, tmp_path, content):
    """As texts, prompts, records to compare, records of sensitivities."""
    file = tmp_path / "x.json"
    if content == "pipe":
        os.mkfifo(file)
    elif content == "folder":
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for words, more in ((f"--calibration {file}", {"calibration": file, "method": "wanda"}),
                        (f"--evaluate {file}", {"evaluate": file}), (f"--prompts {file}", {"prompts": file}),
                        (f"--keep-dense {file}", {"keep_dense": f"{file}:1"}),
                        ("--sensitivity.record", {"sensitivity.record": file, "allocate": "sensitivity",
                                                  "pattern": "0.5", "method": "wanda"})):
        assert one_line(**more).startswith(words)
    assert str(file) in one_line(main=compare.main, argv=[file, "--page", tmp_path / "p.html"])
    if content != "folder":
        assert str(file) in one_line(main=compare.main, argv=[tmp_path, "--page", tmp_path / "p.html"])


@pytest.mark.parametrize("flag", ["--calibration", "--evaluate", "--prompts"])
def test_half_an_emoji(one_line, tmp_path, flag):
    file = tmp_path / "half.jsonl"
    file.write_text(r'{"prompt": "hello \ud83d", "expected": "hello there my friend"}' + "\n")
    line = one_line("--column", "prompt", **{flag[2:]: file, "method": "wanda"})
    assert line.startswith(f"{flag} {file}: ") and "1" in line and "surrogate" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", [".json", ".html"])
def test_results_that_cannot_be_written(one_line, tmp_path, monkeypatch, number, kind):
    """A full disk, a quota, a right taken away meanwhile: the flag and the reason, no half file left."""
    real = os.replace

    def full(part, path, *more):
        if str(path).endswith(kind):
            raise OSError(number, os.strerror(number), str(path))
        return real(part, path, *more)
    monkeypatch.setattr(os, "replace", full)
    line = one_line()
    assert line.startswith(f"--results {tmp_path / 'runs'}: ") and os.strerror(number) in line
    assert not list((tmp_path / "runs").glob("*.part")) and not list((tmp_path / "runs").glob(f"*{kind}"))


def test_messages_say_the_thing_itself(one_line, changed_model, place, tmp_path):  # noqa: F811
    """Not "see the report above": there is none."""
    line = one_line(model=changed_model(vocab_size=40))
    assert "model.embed_tokens.weight" in line or "lm_head.weight" in line
    assert "(32, 32)" in line and "(40, 32)" in line and "above" not in line
    bare = tiny.copy(place / "model", tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer in this folder" in one_line(model=bare)
