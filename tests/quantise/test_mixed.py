"""Grids by linear: each is rounded as if all had its grid, in every format, resumed, proved; or refused in a line."""

import json

import pytest
import tiny
import torch
from families import tiny as family
from oneshot_kernels import Sparse24Linear
from oneshot_kernels.cpu import integers
from rounding import command, killed, the_record
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM
from variants import needs_compiler

import oneshot
from oneshot import checkpoint, models, report
from oneshot.checkpoint import verify
from oneshot.pipeline import forms
from oneshot.prune.patterns import parse as parse_pattern
from oneshot.quantise import grids, mixed, rtn

pytestmark = pytest.mark.usefixtures("plain_pages")
MIXED = "int4:16,model.layers.0.*=int8:row,*.down_proj=int3:16,*.o_proj=none"


def expected(name):
    """What MIXED says of a linear, by hand."""
    if name.endswith("o_proj"):
        return None
    if name.endswith("down_proj"):
        return "int3:16"
    return "int8:row" if ".layers.0." in name else "int4:16"


def linears(folder):
    return {name.removesuffix(".weight"): W for name, W in tiny.weights(folder).items() if "_proj.weight" in name}


@pytest.fixture(scope="module")
def saved(place, tmp_path_factory):  # noqa: F811
    """{what --quantise was: folder} by rounding to nearest, in one linear's grid for all, mixed, and not at all."""
    at, found = tmp_path_factory.mktemp("saved"), {}
    with tiny.no_pictures():
        for number, text in enumerate((MIXED, "int4:16", "int8:row", "int3:16", None)):
            more = {"quantise": text, "quantiser": "rtn" if text else None, "method": "sparsegpt"}
            assert command(place, save=at / str(number), results=at / f"{number}.runs", **more) == 0
            found[text] = at / str(number)
    return found


# --- what the text says -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["int4:64", "none,a.*=int8:row", MIXED])
def test_text_and_object_are_the_same(text):
    assert str(mixed.parse(text)) == text and mixed.parse(text.replace(",", " , ")) == mixed.parse(text)


def test_the_last_entry_that_matches_counts():
    own = mixed.parse("int4,*.a=int8,x.*=none,x.y.a=q8_0")
    assert [str(own.of(name)) for name in ("b", "z.a", "x.b", "x.y.a")] == ["int4", "int8", "None", "q8_0"]
    assert list(map(str, own.kinds)) == ["int4", "int8", "q8_0"]


def test_renamed_it_says_the_same_of_the_same_linears():
    own = mixed.parse("int4,l.1.*=int8,l.3.b=none")
    now = own.renamed({"l.0.a": "l.1.a", "l.0.b": "l.1.b", "l.1.a": "l.3.a", "l.1.b": "l.3.b"})
    assert [str(now.of(name)) for name in ("l.0.a", "l.0.b", "l.1.a", "l.1.b")] == ["int8", "int8", "int4", "None"]
    assert mixed.parse(str(now)) == now


@pytest.mark.parametrize(("text", "says"), [
    ("", "--quantise : no such integers"), ("int4,", "--quantise : only the first entry is for all linears"),
    ("*.o_proj=int4", "--quantise *.o_proj=int4: the first entry is for all linears, such as int4:64, or none"),
    ("int4,int8", "--quantise int8: only the first entry is for all linears; say whose it is, such as"),
    ("int4,*.o_proj=int1", "--quantise int1: no such integers"), ("int4,=int8", "--quantise =int8: only the first"),
    ("none", "--quantise none: rounds nothing"), ("none,*.a=none", "--quantise none,*.a=none: rounds nothing"),
    ("int4,*=none", "--quantise int4,*=none: rounds none of the model's linears"),
    ("int4,*.nope=int8", "--quantise *.nope=int8: matches none of the model's 21 linears, such as model.layers.0.s"),
    ("int4,model.layers.0.*.up_proj=int8,*.1.*=int8,*.up_proj=none",
     "--quantise model.layers.0.*.up_proj=int8: counts for none of its 1 linears, later entries match them all; the"),
    ("int4,*.o_proj=int8,*.o_proj=int8", "--quantise *.o_proj=int8: counts for none of its 3 linears, later entries"),
    ("int4,*.down_proj=q8_0", "--quantise q8_0 needs a width divisible by 32, this one is 48 (model.layers.0.mlp.down"),
])
def test_what_does_not_go_is_one_line(place, tmp_path, capfd, text, says):  # noqa: F811
    assert tiny.main(*tiny.flags(place, "--no-dense", f"--quantise={text}", results=tmp_path, evaluate="none")) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: {says}"), line


# --- the law ------------------------------------------------------------------------------------------------

def test_each_linear_is_rounded_as_if_all_had_its_grid(saved):
    """To nearest, so that nothing depends on the linears before; without a grid it is as it was."""
    own, entries = linears(saved[MIXED]), checkpoint.read_manifest(saved[MIXED])["tensors"]
    for name, W in own.items():
        assert torch.equal(W, linears(saved[expected(name)])[name]), name
        assert entries[name].get("grid") == expected(name)
    assert {expected(name) for name in own} == {None, "int3:16", "int4:16", "int8:row"}


@pytest.mark.parametrize("quantiser", ["gptq", "joint"])
def test_a_mix_of_one_grid_is_that_grid(place, tmp_path, quantiser):  # noqa: F811
    """Bit for bit, also where statistics matter; and what joint leaves unrounded is what SparseGPT alone gives."""
    texts = {"plain": "int4:16", "mixed": "int8,*=int4:16", "bare": "int4:16,model.layers.0.self_attn.q_proj=none"}
    for name, text in texts.items():
        assert command(place, save=tmp_path / name, results=tmp_path / f"{name}.runs", quantise=text,
                       quantiser=quantiser) == 0
    plain, same, bare = (linears(tmp_path / name) for name in texts)
    assert all(torch.equal(W, same[name]) for name, W in plain.items())
    assert command(place, save=tmp_path / "pruned", results=tmp_path / "pruned.runs", quantise=None) == 0
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(bare[first], linears(tmp_path / "pruned")[first])
    assert torch.equal(bare[first.replace("q_", "k_")], plain[first.replace("q_", "k_")])


def test_record_bytes_and_proof_are_by_linear(saved, capsys):
    record, wanted = the_record(saved[MIXED].parent / "0.runs"), 0
    for row in record["layers"]:
        text, pattern = expected(row["name"]), parse_pattern(row["pattern"])
        assert row.get("grid") == text and ("rounded_to_zero" in row) == ("rounding_error" in row) == bool(text)
        wanted += grids.parse(text).bytes(*row["shape"], pattern) if text else pattern.bytes(*row["shape"], 4)
    assert record["bytes"]["stored"] == wanted
    assert report.pattern_of(record) == "2:4 int4:16+int8:row+int3:16+none" and not report.is_dense(record)
    assert verify.main([str(saved[MIXED])]) == 0
    out = capsys.readouterr().out
    assert "2:4 int8:row" in out and "2:4 int3:16" in out and "all proved" in out


def test_verify_finds_another_grid_than_was_asked_for(saved):
    data = json.loads((saved[MIXED] / "oneshot.json").read_text())
    bare, other = "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    data["tensors"][bare]["grid"], data["tensors"][other]["grid"] = "int4:16", "int8:row"
    said = list(map(str, checkpoint.claims.check(data)))
    assert f"{bare}: rounded to int4:16, the settings ask for None" in said
    assert f"{other}: rounded to int8:row, the settings ask for int3:16" in said


def test_runs_with_other_mixes_are_other_runs(place, tmp_path):  # noqa: F811
    for text in ("int4:16", MIXED, MIXED.replace(":16,*.o", ":8,*.o")):
        assert command(place, results=tmp_path, quantise=text, quantiser="rtn") == 0
    found = [report.read(file) for file in tmp_path.glob("*.json")]
    assert len({r["run_id"] for r in found}) == 3 == len(set(report.series(found)))
    assert max(map(len, report.series(found))) < 100
    assert len(report.tables.pivot([r | {"metrics": {"a/ppl": 1.0}} for r in found], "a/ppl", "csv").splitlines()) == 4


@pytest.mark.parametrize("after", [tiny.BLOCKS + 1, 2 * tiny.BLOCKS - 1])
def test_killed_and_resumed_it_is_bit_identical(place, tmp_path, after):  # noqa: F811
    """Also where a block has nothing to round."""
    text = "none,model.layers.0.*=int8:row,*.2.mlp.*=int4:16"
    assert verify.main([str(killed(place, tmp_path, after, text)), "--quiet"]) == 0


def test_a_smaller_model_keeps_each_linears_grid(place, tmp_path):  # noqa: F811
    """Block 1 goes, so block 2 has another number in the result; names are those of the model that was given."""
    text = "none,model.layers.2.mlp.*=int8:row,model.layers.1.*=int4:16"
    assert command(place, save=tmp_path / "out", results=tmp_path / "runs", method="magnitude", pattern="dense",
                   drop="1", quantise=text, quantiser="rtn") == 0
    rows = {row["name"]: row.get("grid") for row in the_record(tmp_path / "runs")["layers"]}
    assert rows and all(grid == ("int8:row" if ".layers.1.mlp." in name else None) for name, grid in rows.items())
    assert verify.main([str(tmp_path / "out"), "--quiet"]) == 0


def test_where_all_that_is_rounded_goes_the_line_says_so(place, tmp_path, capfd):  # noqa: F811
    assert command(place, save=tmp_path / "out", results=tmp_path / "runs", method="magnitude", pattern="dense",
                   drop="1", quantise="none,model.layers.1.*=int4:16", quantiser="rtn") == 2
    assert "error: --quantise none,model.layers.1.*=int4:16: rounds none of the linears that are left" in \
        capfd.readouterr().err


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_families_from_python(name):
    """Transposed weights and single experts: each as rounding the whole model to its grid gives it."""
    model, other = family(name), family(name)
    names = [w.name for w in models.all_weights(model)]
    glob = {"gpt2": "*.c_proj", "mixtral": "*.1"}[name]
    rtn.quantise_model(other, grids.parse("int8:row"))
    before = {w.name: w.get().clone() for w in models.all_weights(model)}
    record = oneshot.prune(model, method="dense", calibration=torch.arange(64).view(4, 16) % 60, progress=False,
                           quantise=f"none,{glob}=int8:row", quantiser="rtn")
    rounded, ending = {w.name: w.get() for w in models.all_weights(other)}, glob.lstrip("*")
    for w in models.all_weights(model):
        assert torch.equal(w.get(), rounded[w.name] if w.name.endswith(ending) else before[w.name]), w.name
    assert sum("grid" in row for row in record["layers"]) == sum(n.endswith(ending) for n in names) > 0


# --- the formats --------------------------------------------------------------------------------------------

def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("form", "text"), [
    ("packed", "int4:64,model.layers.0.*=int8:row,*.o_proj=none"), ("compressed-tensors", MIXED)])
def test_other_formats_hold_what_was_measured(place, tmp_path, capsys, form, text):  # noqa: F811
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="pip install 'oneshot[compressed]'")
    for name in ("dense", form):
        assert command(place, save=tmp_path / name, results=tmp_path / f"{name}.runs", quantise=text, format=name,
                       quantiser="rtn") == 0
    want, got = logits(tmp_path / "dense"), logits(tmp_path / form)
    assert (got - want).norm() <= 1e-5 * want.norm()
    capsys.readouterr()
    twin = [] if form == "compressed-tensors" else ["--twin", str(tmp_path / "dense")]
    assert verify.main([str(tmp_path / form), *twin]) == 0 and "all proved" in capsys.readouterr().out
    data = checkpoint.read_manifest(tmp_path / form)
    if form == "packed":
        assert data["packed"]["bytes"] == data["record"]["bytes"]["stored"]
    else:
        groups = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]["config_groups"]
        assert [g["weights"]["num_bits"] for g in groups.values()] == [8, 3, 4]
        assert {n: t for t, g in groups.items() for n in g["targets"]}.keys() == {
            n for n in data["tensors"] if expected(n)}
        config = json.loads((tmp_path / form / "config.json").read_text())
        config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
        (tmp_path / form / "config.json").write_text(json.dumps(config))
        assert [str(f) for f in checkpoint.compressed.faults(tmp_path / form, data)] == [
            "config.json: its quantization_config has another ignore than int8:row and int3:16 and int4:16 needs"]


def test_a_group_that_vllm_joins_is_a_warning(place, tmp_path):  # noqa: F811
    pytest.importorskip("compressed_tensors", reason="pip install 'oneshot[compressed]'")
    found = {}
    for name, text in {"torn": "int4:16,*.1.*.k_proj=int8:row", "whole": "int4:16,*.o_proj=int8:row"}.items():
        assert command(place, save=tmp_path / name, results=tmp_path / f"{name}.runs", quantise=text,
                       format="compressed-tensors", quantiser="rtn") == 0
        found[name] = [w for w in the_record(tmp_path / f"{name}.runs")["warnings"] if "vLLM" in w]
    assert not found["whole"] and "model.layers.1.self_attn (q_proj, k_proj, v_proj)" in found["torn"][0]


@pytest.mark.parametrize(("form", "text", "says"), [
    ("packed", "int4:64,*.o_proj=int3:row", "--format packed: holds int8:row and int4:64, not --quantise int4:64,*.o_"),
    ("compressed-tensors", "int4:16,*.o_proj=q8_0", "--format compressed-tensors: goes with --quantise int2 to int8"),
    ("gguf:q8_0", "q8_0,*.o_proj=q4_0", "--format gguf:q8_0: holds what --quantise q8_0 rounded")])
def test_what_a_format_cannot_say_is_refused(place, tmp_path, capfd, form, text, says):  # noqa: F811
    assert command(place, save=tmp_path / "out", results=tmp_path / "runs", quantise=text, format=form) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: {says}"), line


@pytest.mark.parametrize("grid", [{"model.layers.0.self_attn.q_proj": "int3"}, {"nope": "int8:row"}, ["int8:row"], 4])
def test_a_config_that_says_something_else_is_refused(grid):
    with pytest.raises(ValueError, match="no grid or dtype"):
        checkpoint.packed.PackedConfig(["model.layers.0.self_attn.q_proj"], grid=grid, stored="float32")


@needs_compiler
def test_each_linear_gets_the_kernel_of_its_form(place, tmp_path):  # noqa: F811
    assert command(place, save=tmp_path / "out", results=tmp_path / "runs", quantiser="rtn",
                   quantise="int4:64,model.layers.0.*=int8:row,*.o_proj=none,*.up_proj=int3:16") == 0
    runs, held = forms.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for weight in models.all_weights(held):
        layer = runs.get_submodule(weight.name)
        plain = weight.name.endswith(("o_proj", "up_proj"))  # no kernel for int3: its weights as they are
        assert isinstance(layer, Sparse24Linear if plain else integers.IntegerLinear), weight.name
        assert plain or layer.bits == (8 if ".layers.0." in weight.name else 4)
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        want, got = held(ids).logits, runs(ids).logits
    assert (got - want).norm() <= 1e-4 * want.norm()
