"""`--format gguf` by command: the codes that were measured, what verify finds, what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from llama_cpp import LlamaCpp
from tiny import plain_pages  # noqa: F401

import oneshot
from oneshot import checkpoint, models
from oneshot.checkpoint import contents, gguf, rounded, verify
from oneshot.checkpoint.gguf import family, file
from oneshot.quantise import grids
from oneshot.runtime import sealed

pytest.importorskip("gguf", reason="pip install 'oneshot[gguf]'")
RUN = ("--model", "demo", "--pattern", "2:4", "--calibration", "self", "--nsamples", "4", "--seqlen", "16",
       "--evaluate", "none", "--no-dense", "--no-progress")


def run(folder, *more):
    return tiny.main(*RUN, "--save", folder, "--results", folder.parent / "runs", *more)


MIXED = "q8_0,*.down_proj=q4_0,*.o_proj=none,lm_head=q8_0"  # a head that is the embedding as well


@pytest.fixture(scope="module", params=["q4_0", "q8_0", MIXED, None])
def saved(request, tmp_path_factory):
    """(folder that the command saved, what --quantise was)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oneshot.report.page._pictures", lambda records: [])
        folder = tmp_path_factory.mktemp("saved") / "model"
        more = ("--quantise", request.param) if request.param else ()
        assert run(folder, "--method", "wanda", "--format", "gguf", *more) == 0
    return folder, request.param


def test_the_file_holds_the_codes_that_were_measured(saved, capsys):
    """And verify proves it."""
    import gguf as library

    folder, kind = saved
    assert verify.main([str(folder)]) == 0 and "all proved" in capsys.readouterr().out
    data = checkpoint.read_manifest(folder)
    types = {"bf16": 5, "q8_0": 26, "q4_0": 5} if kind == MIXED else {kind: 35, "bf16": 1} if kind else {"bf16": 36}
    assert data["format"] == "gguf" and {k: n for k, n in data["gguf"]["types"].items() if k != "f32"} == types
    model, _ = oneshot.load(folder)
    scales, there = rounded.read(folder), {t.name: t for t in library.GGUFReader(folder / gguf.FILE).tensors}
    for name, entry in data["tensors"].items():
        own = entry.get("grid")
        assert own == ((None if "o_proj" in name else "q4_0" if "down_proj" in name else "q8_0") if kind == MIXED else
                       kind)
        if own is None:
            continue
        t = there[family.names_of(model, family.family_of(model))[f"{name}.weight"]]
        value = library.quants.dequantize(np.array(t.data), t.tensor_type)
        W = model.get_submodule(name).weight
        grid = grids.parse(own)
        want = grid.value(rounded.codes_of(W, grid, scales[name]).float(), scales[name].float())
        heads = family.heads_of(f"{name}.weight", model.config, family.family_of(model))
        assert np.array_equal(family.separate(value, heads), want.numpy())
    if kind == MIXED:
        t = there["token_embd.weight"]
        assert np.array_equal(library.quants.dequantize(np.array(t.data), t.tensor_type),
                              scaled(model.lm_head.weight, scales["lm_head"]))


def scaled(W, scales):
    """A weight on q8_0 as float32: its scales times its codes."""
    grid = grids.parse("q8_0")
    return grid.value(rounded.codes_of(W, grid, scales).float(), scales.float()).numpy()


def test_a_finished_folder_is_known_again(saved, capsys, plain_pages):  # noqa: F811
    folder, kind = saved
    more = ("--quantise", kind) if kind else ()
    assert run(folder, "--method", "wanda", "--format", "gguf", *more) == 0
    assert "finished earlier, stored result" in capsys.readouterr().err


def test_llama_cpp_runs_what_was_saved(saved):
    """The loss of a text, position by position, as transformers has it: bf16 and integers round the activations."""
    folder, _ = saved
    model, words = oneshot.load(folder)
    engine = LlamaCpp(folder / gguf.FILE)
    ids = engine.tokens("The history of science is the study of how knowledge grew, in many places and times.")
    assert ids == words("The history of science is the study of how knowledge grew, in many places and times."
                        )["input_ids"]
    with torch.no_grad():
        want = model.float()(torch.tensor([ids])).logits[0].log_softmax(-1)
    got = torch.stack([engine.log_probabilities(ids[:n], model.config.vocab_size) for n in range(1, len(ids))])
    places, target = range(len(ids) - 1), ids[1:]
    assert abs(float((got - want[:-1])[places, target].mean())) < 0.02
    assert float((want[:-1].exp() * (want[:-1] - got)).sum(-1).mean()) < 2e-3  # KL, nats


def test_a_smaller_model_with_whole_blocks(tmp_path, capsys, plain_pages):  # noqa: F811
    """The neurons that are left fill blocks of 32, so that GGUF's grids fit."""
    folder = tmp_path / "small"
    assert run(folder, "--method", "magnitude", "--format", "gguf", "--quantise", "q8_0", "--quantiser", "rtn",
               "--shrink", "0.8", "--shrink-method", "magnitude", "--tries", "1", "--heal", "none") == 0
    left = json.loads((folder / "config.json").read_text())["intermediate_size"]
    assert left % 32 == 0 < left < 512
    assert verify.main([str(folder), "--quiet"]) == 0
    model, words = oneshot.load(folder)
    engine, ids = LlamaCpp(folder / gguf.FILE), words("The history of science")["input_ids"]
    with torch.no_grad():
        want = model.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert (engine.log_probabilities(ids, len(want)) - want).abs().mean() < 0.1  # inputs are rounded to int8


@pytest.mark.parametrize("spoil", ["byte", "sealed", "cut", "gone", "another"])
def test_verify_finds_what_is_not_the_model(saved, tmp_path, capsys, spoil):
    """Also where all hashes have been made to fit."""
    folder = tiny.copy(saved[0], tmp_path / "spoilt")
    path = folder / gguf.FILE
    data = bytearray(path.read_bytes())
    data[-9] ^= 1  # the last tensor is the last norm or matrix
    if spoil == "gone":
        path.unlink()
    elif spoil == "another":
        model, words = oneshot.load(folder)
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        file.write(path, model, words, file.plan_of(model, "gguf", {"tensors": {}, "record": {}}), {})
    else:
        path.write_bytes(data[:-40] if spoil == "cut" else data)
    if spoil in ("sealed", "another"):
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text()) | contents.describe(folder)
        manifest["gguf"]["bytes"] = path.stat().st_size
        manifest.pop("sha256_of_this")
        sealed.write(manifest, folder / checkpoint.MANIFEST)
    assert verify.main([str(folder), "--quiet"]) == 1
    said = capsys.readouterr().out
    assert (gguf.FILE in said) and ("is missing" in said if spoil == "gone" else True)
    if spoil in ("sealed", "another"):
        assert "FAULT model." in said and "the recorded ones" not in said


@pytest.mark.parametrize("more, words", [
    (("--format", "gguf:q8_0"), "--format gguf:q8_0: holds what --quantise q8_0 rounded"),
    (("--format", "gguf:q4_0", "--quantise", "q8_0"), "--format gguf:q4_0: holds what --quantise q4_0 rounded"),
    (("--format", "gguf", "--model", "MODEL"), "--format gguf: llama.cpp cannot follow this model's tokenizer"),
])
def test_refused_before_anything_is_computed(more, words, tmp_path, capsys):
    more = [str(tiny.save_model(tmp_path / "model")) if part == "MODEL" else part for part in more]
    assert run(tmp_path / "out", "--method", "magnitude", *more) == 2
    [line] = tiny.said(capsys.readouterr().err)
    assert words in line and not (tmp_path / "out").exists()


def test_without_save_refused(capsys):
    assert tiny.main(*RUN, "--method", "magnitude", "--format", "gguf") == 2
    assert "--format gguf: goes with --save" in capsys.readouterr().err


def test_every_form_is_offered():
    from oneshot.settings.known import known

    assert {*gguf.FORMS} == {form for form in known()["format"].metadata["choices"] if form.startswith("gguf")}
    assert models.gguf.is_gguf  # the other direction


@pytest.mark.parametrize("counts, kind", [({"q8_0": 1, "q4_0": 5, "f32": 9}, "MOSTLY_Q4_0"),
                                          ({"q8_0": 5, "q4_0": 1, "bf16": 9}, "MOSTLY_Q8_0"), ({"f32": 3}, "ALL_F32"),
                                          ({"f32": 9, "bf16": 3}, "MOSTLY_BF16")])
def test_the_file_is_called_by_what_most_matrices_are(counts, kind):
    import gguf as library

    assert file.file_type(library, SimpleNamespace(summary=counts)) == library.LlamaFileType[kind]
