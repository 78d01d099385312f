"""The output head on a grid: named in full it is rounded to nearest, with what it is tied to, in every step after."""

import pytest
import tiny
import torch
from families import tiny as family
from oneshot_kernels.cpu import integers
from rounding import command, killed, the_record
from safetensors.torch import load_file, save_file
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM
from variants import needs_compiler

import oneshot
from oneshot import models, report
from oneshot.checkpoint import verify
from oneshot.pipeline import forms
from oneshot.quantise import head, mixed, rtn
from oneshot.report import storage
from oneshot.runtime import sealed

pytestmark = pytest.mark.usefixtures("plain_pages")
ROWS, GROUPS = "int8:row,lm_head=int8:row", "none,lm_head=int4:16"
IDS = torch.arange(64).view(4, 16) % 30


@pytest.fixture(scope="module")
def saved(place, tmp_path_factory):  # noqa: F811
    """{what --quantise was: folder} of the tiny model, rounded to nearest."""
    at, found = tmp_path_factory.mktemp("saved"), {}
    with tiny.no_pictures():
        for number, text in enumerate((ROWS, "int8:row", GROUPS)):
            assert command(place, save=at / str(number), results=at / f"{number}.runs", quantise=text,
                           quantiser="rtn") == 0
            found[text] = at / str(number)
    return found


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


# --- what is rounded ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [ROWS, GROUPS])
def test_the_head_is_the_nearest_on_its_grid_and_all_else_as_without(saved, place, text):  # noqa: F811
    own, dense = tiny.weights(saved[text]), tiny.weights(place / "model")["lm_head.weight"]
    want, _ = rtn.round_to_nearest(dense, mixed.parse(text).named("lm_head"))
    assert torch.equal(own.pop("lm_head.weight"), want) and not torch.equal(want, dense)
    if text == ROWS:
        other = tiny.weights(saved["int8:row"])
        assert torch.equal(other.pop("lm_head.weight"), dense) and not tiny_difference(own, other)
    assert torch.equal(own["model.embed_tokens.weight"], tiny.weights(place / "model")["model.embed_tokens.weight"])


def tiny_difference(some, others):
    """Names of the tensors that differ."""
    assert some.keys() == others.keys()
    return [name for name in some if not torch.equal(some[name], others[name])]


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "gpt2", "gemma2", "opt", "mixtral"])
def test_what_is_tied_to_it_is_rounded_with_it(name):
    model = family(name)
    (full, own), before = models.output_head(model), family(name).get_input_embeddings().weight
    record = oneshot.prune(model, method="dense", calibration=IDS, progress=False, quantiser="rtn",
                           quantise=f"none,{full}=int8:row")
    tied = own.weight is model.get_input_embeddings().weight
    R, C = own.weight.shape
    assert record["head"]["tied"] == tied and record["head"]["name"] == full
    assert torch.equal(before, model.get_input_embeddings().weight) != tied
    assert (record["head"]["stored"], record["head"]["dense"]) == (R * C + 2 * R, 4 * R * C)
    assert logits(model).isfinite().all() and not any("grid" in row for row in record["layers"])


def test_blocks_are_rounded_for_the_rounded_embedding(tmp_path, place):  # noqa: F811
    """Where the two are tied, the blocks' statistics are of what the result computes: as if it had come rounded."""
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    head.round_head(model, mixed.parse("none,lm_head=int4:16"))
    model.save_pretrained(tmp_path / "rounded")
    for name, text in (("tied", "int4:16,lm_head=int4:16"), ("rounded", "int4:16")):
        tiny.tokenizer().save_pretrained(tmp_path / name)
        assert command(place, model=tmp_path / name, method="keep", pattern="dense", save=tmp_path / f"{name}.out",
                       results=tmp_path / name / "runs", quantise=text) == 0
    assert not tiny_difference(*(tiny.weights(tmp_path / f"{name}.out") for name in ("tied", "rounded")))


def test_rows_are_rounded_some_at_a_time(monkeypatch):
    whole, parts = family("llama-tied-bias"), family("llama-tied-bias")
    asked = mixed.parse("none,lm_head=int4:16")
    found, scales, _ = head.round_head(whole, asked)
    monkeypatch.setattr(head, "ROWS", 7)
    again, same, _ = head.round_head(parts, asked)
    assert again == found and torch.equal(same["lm_head"], scales["lm_head"])
    assert torch.equal(whole.lm_head.weight, parts.lm_head.weight)


def test_only_its_full_name_means_the_head(place, tmp_path, capfd):  # noqa: F811
    assert mixed.parse("int4,lm_*=int8").named("lm_head") is None and mixed.parse("int8").named("lm_head") is None
    for text, says in (("int8,lm_*=int8:row", "lm_*=int8:row: matches none of the model's 21 linears"),
                       ("int8,head=int8", "head=int8: matches none of the model's 21 linears, such as model.layers.0."
                                          "self_attn.q_proj; the output head is lm_head"),
                       ("int8,lm_head=int4,lm_head=int8", "lm_head=int4: counts for none of its 1 linears")):
        assert command(place, results=tmp_path, quantise=text) == 2
        assert f"error: --quantise {says}" in capfd.readouterr().err
    assert command(place, results=tmp_path, quantise="none,lm_head=int8:row", method="keep", pattern="dense") == 0
    assert {"name": "lm_head"}.items() <= the_record(tmp_path)["head"].items()
    assert command(place, results=tmp_path / "none", quantise="int8,lm_head=none") == 0
    assert "head" not in the_record(tmp_path / "none")


def test_weights_that_no_scale_holds_are_refused_or_told(place, tmp_path, capfd):  # noqa: F811
    """Too large: before anything is computed. So small that a scale vanishes: as with any other linear, a warning."""
    for name, factor in (("large", 1e9), ("small", 1e-9)):
        folder = tiny.copy(place / "model", tmp_path / name)
        tiny.change_weights(folder, lambda t, factor=factor: t["lm_head.weight"].mul_(factor))
    assert command(place, model=tmp_path / "large", results=tmp_path / "a", quantise=ROWS) == 2
    assert "error: --quantise lm_head=int8:row: its weights are too large" in capfd.readouterr().err
    assert command(place, model=tmp_path / "small", results=tmp_path / "b", quantise=ROWS) == 0
    [warning] = [text for text in the_record(tmp_path / "b")["warnings"] if text.startswith("lm_head: ")]
    assert warning == "lm_head: 32 groups became zero, their float16 scale vanished"


def test_scaling_columns_is_for_blocks(place, tmp_path, capfd):  # noqa: F811
    assert command(place, "--scale-columns", results=tmp_path, quantise="none,lm_head=int8:row", method="keep",
                   pattern="dense") == 2
    assert "error: --scale-columns: is for linears of blocks, and --quantise none,lm_head" in capfd.readouterr().err


# --- what comes after ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [ROWS, GROUPS])
def test_verify_proves_it(saved, tmp_path, text, capsys):
    assert verify.main([str(saved[text])]) == 0
    own = mixed.parse(text).named("lm_head")
    shown = capsys.readouterr().out
    assert "22 linears checked" in shown and f"dense {own}" in shown
    assert f"not pruned  lm_head.weight: output head, rounded to {own}" in shown

    def spoilt(name, change):
        folder = tiny.copy(saved[text], tmp_path / name)
        change(folder)
        return [str(fault) for fault in verify.verify(folder).faults]
    scales = load_file(saved[text] / "scales.safetensors")
    without = {name: s for name, s in scales.items() if name != "lm_head"}
    faults = spoilt("a", lambda folder: save_file(without or {"x": torch.ones(1)}, folder / "scales.safetensors"))
    assert "lm_head: its scales are missing in scales.safetensors" in faults
    faults = spoilt("b", lambda folder: tiny.change_weights(folder, lambda t: t["lm_head.weight"].mul_(1.01)))
    assert any(fault.startswith("lm_head: ") and f"weights are not on the grid {own}" in fault for fault in faults)

    def told(name, change):
        """The faults with another manifest, sealed again."""
        def other(folder):
            data, _ = sealed.read(folder / "oneshot.json")
            change(data["record"])
            sealed.write({k: v for k, v in data.items() if not k.startswith("sha256")}, folder / "oneshot.json")
        return " ".join(spoilt(name, other))
    assert f"grid None instead of {own}" in told("c", lambda record: record.pop("head"))
    assert "grid int8:row instead of None" in told("d", lambda record: record.update(
        settings=record["settings"] | {"quantise": "int8:row"}, head={"name": "lm_head", "grid": "int8:row"}))
    for key, false in (("stored", 1), ("dense", 10**9), ("tied", True), ("name", "head")):
        assert f"{key} {false} instead of" in told(
            key, lambda record, key=key, x=false: record["head"].update({key: x}))
    for number, damaged in enumerate(([1], "x", 7)):
        assert "what it says of the output head cannot be read" in told(
            f"e{number}", lambda record, x=damaged: record.update(head=x))
        assert "cannot be read" in told(f"f{number}", lambda record, x=damaged: record["settings"].update(quantise=x))


def test_the_record_counts_its_bytes_and_names_it(saved):
    with_head, without = (the_record(saved[text].parent / f"{number}.runs") for number, text in ((0, ROWS),
                                                                                                 (1, "int8:row")))
    own = with_head["head"]
    assert with_head["bytes"] == without["bytes"]  # of the blocks' linears
    (a, dense), (b, same) = storage.whole_bytes(with_head), storage.whole_bytes(without)
    assert b - a == own["dense"] - own["stored"] > 0 and dense == same
    assert report.pattern_of(with_head) == "2:4 int8:row+head:int8:row" and report.pattern_of(without) == "2:4 int8:row"
    assert len(set(report.series([with_head, without]))) == 2
    assert [reason for reason, _ in report.left_dense(with_head)] == ["embedding"]
    assert [reason for reason, _ in report.left_dense(without)] == ["embedding", "output head"]
    only = {"settings": {"quantise": "none,lm_head=q4_0", "method": "keep", "pattern": "dense"},
            "head": {"name": "lm_head", "grid": "q4_0"}}
    assert report.pattern_of(only) == "none+head:q4_0"


@needs_compiler
def test_it_runs_on_integers_with_the_stored_codes(saved):
    """A head with its own scales computes what the dense folder's does, to float32's rounding."""
    runs, dense = forms.load(saved[ROWS]), AutoModelForCausalLM.from_pretrained(saved[ROWS])
    assert isinstance(runs.lm_head, integers.IntegerLinear)
    assert (logits(runs) - logits(dense)).norm() <= 1e-4 * logits(dense).norm()
    assert not isinstance(forms.load(saved["int8:row"]).lm_head, integers.IntegerLinear)


@needs_compiler
def test_an_embedding_stays_one_when_its_head_runs_on_integers():
    model = family("llama-tied-bias")
    head.round_head(model, mixed.parse("none,lm_head=int8:row"))
    want, table = logits(model), model.get_input_embeddings()
    runs = forms.with_kernels(model, {forms.HEAD: "int8"})
    assert isinstance(runs.lm_head, integers.IntegerLinear) and runs.get_input_embeddings() is table
    assert (logits(runs) - want).norm() <= 1e-2 * want.norm()  # its scales are found anew


@pytest.mark.parametrize("after", [tiny.BLOCKS + 1, 2 * tiny.BLOCKS - 1])
def test_killed_and_resumed_it_is_bit_identical(place, tmp_path, after):  # noqa: F811
    assert verify.main([str(killed(place, tmp_path, after, "int4:16,lm_head=int8")), "--quiet"]) == 0


@pytest.mark.parametrize("text", [ROWS, "none,lm_head=int8:row,model.layers.2.*=int8:row"])
def test_a_smaller_models_head_is_rounded_too(place, tmp_path, text):  # noqa: F811
    assert command(place, save=tmp_path / "out", results=tmp_path / "runs", method="magnitude", pattern="dense",
                   drop="1", quantise=text, quantiser="rtn") == 0
    assert the_record(tmp_path / "runs")["head"]["grid"] == "int8:row"
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0


# --- formats ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["packed", "compressed-tensors"])
def test_formats_of_linears_refuse_it(place, tmp_path, capfd, form):  # noqa: F811
    assert command(place, save=tmp_path / "out", results=tmp_path, quantise=ROWS, format=form) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: --format {form}: ") and not (tmp_path / "out").exists()
