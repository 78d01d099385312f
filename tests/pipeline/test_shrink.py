"""`oneshot shrink` and `--shrink`: budget met, record and manifest, verify, Python, kill and resume, bad input."""

import json

import pytest
import tiny
import torch
from tiny import flags, main, place, plain_pages, said  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM

import oneshot
from oneshot import checkpoint, models
from oneshot.checkpoint import verify
from oneshot.pipeline import compress, shrink_command
from oneshot.structured import origin, search, spread

pytestmark = pytest.mark.usefixtures("plain_pages")


def shrink(place, *more, **changed):  # noqa: F811
    """The command line of `oneshot shrink` on what `tiny.make` wrote; exit code."""
    given = {"method": None, "pattern": None, "tries": 3} | changed
    return shrink_command.main(flags(place, "--no-dense", *more, **given))


def blocks_of(model):
    return sum(p.numel() for p in models.blocks(model)[1].parameters())


@pytest.mark.parametrize("to", [0.8, 0.5])
@pytest.mark.parametrize("method", ["obs", "flap", "wanda", "taylor", "alps"])
def test_the_budget_is_met(place, tmp_path, to, method):  # noqa: F811
    """flap: Llama without biases gets some; all others keep the class and its config."""
    assert shrink(place, to=to, method=method, save=tmp_path / "out", results=tmp_path) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(place / "model")
    assert 0.6 * to < blocks_of(model) / blocks_of(dense) <= to + (0.02 if method == "flap" else 0)
    [record] = tiny.records(tmp_path).values()
    shrunk = record["shrunk"]
    assert shrunk["parameters"] == blocks_of(model) and shrunk["parameters_before"] == blocks_of(dense)
    assert len(shrunk["tried"]) > 1 and shrunk["cut"] == {k: min(shrunk["tried"], key=lambda t: t["kl"])[k]
                                                         for k in ("dropped", "kept", "own")}
    assert record["settings"].get("shrink_method", "obs") == method and record["metrics"]
    assert model.config.attention_bias == (method == "flap")
    found = verify.verify(tmp_path / "out", original=str(place / "model"))
    assert not found.faults and found.rows


def test_the_manifest_says_of_every_tensor_whether_it_is_as_it_was(place, tmp_path):  # noqa: F811
    assert shrink(place, to=0.7, tries=1, save=tmp_path / "out", results=tmp_path) == 0
    data = checkpoint.read_manifest(tmp_path / "out")
    states = {name: entry["state"] for name, entry in data["origin"]["tensors"].items()}
    assert {states[n] for n in states if "down_proj" in n} == {"refit"}
    assert {states[n] for n in states if "gate_proj" in n or "norm" in n or "embed" in n} == {"original"}
    before, after = tiny.weights(place / "model"), tiny.weights(tmp_path / "out")
    kept = origin.numbers(data["origin"]["units"]["model.layers.1.mlp.down_proj"])
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"][kept])


def test_verify_finds_what_is_not_as_recorded(place, tmp_path, capsys):  # noqa: F811
    assert shrink(place, to=0.7, tries=1, save=tmp_path / "out", results=tmp_path) == 0
    out, name = tmp_path / "out", "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"--original .*: is not the model"):
        verify.verify(out, original=str(tiny.save_model(tmp_path / "other", seed=3)))
    assert verify.main([str(out), "--original", "./nowhere"]) == 2
    assert "error: --original ./nowhere: no such folder" in capsys.readouterr().err
    manifest = json.loads((out / "oneshot.json").read_text())

    def faults(change, original=None):
        data = json.loads(json.dumps(manifest))
        change(data)
        (out / "oneshot.json").write_text(json.dumps(data))
        return [f for f in verify.verify(out, original=original).faults if "changed after" not in f]

    def swap(data):
        units = data["origin"]["units"]
        units["model.layers.1.mlp.down_proj"] = units["model.layers.0.mlp.down_proj"]
    assert faults(lambda data: data["origin"]["blocks"].pop())
    assert faults(lambda data: data["origin"]["tensors"].pop(name))
    assert faults(lambda data: data.pop("origin"))
    assert faults(lambda data: data["record"].pop("settings")) and faults(lambda data: data["record"].update(
        settings=None))
    assert not faults(swap) and any(f.startswith(name) for f in faults(swap, str(place / "model")))


@pytest.mark.parametrize("more, flag", [
    ({"to": 1.2}, "--shrink 1.2"), ({"to": 0.001}, "--shrink"), ({"layers": 3}, "--layers 3"),
    ({"layers": 0}, "--layers 0"), ({"drop": "7"}, "--drop 7"), ({"drop": "x"}, "--drop x"),
    ({"drop": "0,1,2"}, "--drop 0,1,2"), ({"drop": "1", "layers": 2}, "--drop"), ({"to": 0.5, "tries": 0}, "--tries 0"),
    ({"to": 0.5, "method": "nope"}, "--method nope"), ({"to": 0.5, "method": "refit"}, "--method refit"),
    ({"to": 0.5, "shrink_target": 2}, "--shrink-target 2"),
    ({"drop": "1", "keep_dense": "model.layers.1.*"}, "--drop 1"),
    ({"to": 0.5, "method": "wanda", "shrink_target": 0.5}, "--shrink-target 0.5"),
    ({"to": 0.5, "keep_dense": "*"}, "--keep-dense *"), ({"drop": "1", "order": "influence"}, "--order"),
    ({"pattern": "2:4", "shrink_method": "wanda", "method": "dense"}, "--")])
def test_bad_input_is_one_line(place, tmp_path, capfd, more, flag):  # noqa: F811
    assert shrink(place, results=tmp_path, **{"tries": None} | more) == 2
    [line] = said(capfd.readouterr().err)
    assert line.startswith(f"error: {flag}") and "\n" not in line


def test_a_family_that_cannot_lose_enough_says_so(tmp_path, capfd):
    folder = tmp_path / "place"
    folder.mkdir()
    tiny.save_model(folder / "model", "gpt2")
    tiny.save_text(folder / "calibration.txt", 1)
    tiny.save_text(folder / "evaluation.txt", 2)
    assert shrink(folder, to=0.8, results=tmp_path) == 0
    assert shrink(folder, to=0.2, tries=1, results=tmp_path) == 2
    assert "--shrink" in said(capfd.readouterr().err)[-1]


def test_layers_drop_and_what_is_protected(place, tmp_path):  # noqa: F811
    assert shrink(place, drop="1", tries=None, save=tmp_path / "a", results=tmp_path) == 0
    assert checkpoint.read_manifest(tmp_path / "a")["origin"]["blocks"] == [0, 2]
    assert shrink(place, layers=1, tries=None, order="influence", save=tmp_path / "b", results=tmp_path) == 0
    assert len(checkpoint.read_manifest(tmp_path / "b")["origin"]["blocks"]) == 1
    kept = "model.layers.2.self_attn.*"
    assert shrink(place, to=0.6, keep_dense=kept, save=tmp_path / "c", results=tmp_path) == 0
    data = checkpoint.read_manifest(tmp_path / "c")["origin"]
    assert 2 in data["blocks"] and all("down_proj" in name for name in data["units"])


def test_smaller_and_then_pruned(place, tmp_path):  # noqa: F811
    """One command, one record, one manifest: fewer neurons, then 2:4, healed."""
    assert shrink(place, to=0.8, tries=1, pattern="2:4", method="sparsegpt", heal="block", save=tmp_path / "out",
                  results=tmp_path, **{"block.steps": 2}) == 0
    found = verify.verify(tmp_path / "out", original=str(place / "model"))
    assert not found.faults and {row["pattern"] for row in found.rows} == {"2:4"}
    data = checkpoint.read_manifest(tmp_path / "out")
    assert {e["state"] for n, e in data["origin"]["tensors"].items() if "proj" in n} == {"trained"}
    assert data["record"]["sparsity"] == 0.5


def test_keep_dense_names_the_larger_models_layers(place, tmp_path):  # noqa: F811
    assert shrink(place, drop="0", tries=None, pattern="2:4", method="wanda", keep_dense="model.layers.2.mlp.*",
                  save=tmp_path / "out", results=tmp_path) == 0
    rows = verify.verify(tmp_path / "out").rows
    assert {row["name"] for row in rows if row["pattern"] == "dense"} == {
        f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}


@pytest.mark.parametrize("after", [1, 2, 4])
def test_killed_and_resumed_it_is_bit_identical(place, tmp_path, monkeypatch, after):  # noqa: F811
    """3 blocks are walked, then 2 or 3 are pruned: killed in either, the same command ends with the same files."""
    more = {"to": 0.7, "pattern": "2:4", "method": "sparsegpt", "results": tmp_path}
    assert shrink(place, save=tmp_path / "whole", **more) == 0
    with tiny.interrupted(after):
        assert shrink(place, save=tmp_path / "cut", **more) == 130
    with monkeypatch.context() as patch:
        patch.setattr("oneshot.pipeline.shrink.choose", None)  # the cut is kept, not chosen again
        assert shrink(place, save=tmp_path / "cut", **more) == 0
    whole, cut = tiny.weights(tmp_path / "whole"), tiny.weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert verify.main([str(tmp_path / "cut"), "--quiet"]) == 0


@pytest.mark.parametrize("after, own", [(1, []), (3, []), (2, ["--uneven"])])
def test_killed_in_its_search_it_looks_no_cut_up_twice(place, tmp_path, monkeypatch, after, own):  # noqa: F811
    """--uneven: two mixtures, then widths by layer; what these cost is not measured again either."""
    more = {"to": 0.7, "tries": 2 if own else 5, "results": tmp_path}
    looked, measured = [], search.measured

    def look(model, ids, mask, job, cut):
        if len(looked) == after:
            raise KeyboardInterrupt
        looked.append(cut)
        return measured(model, ids, mask, job, cut)
    with monkeypatch.context() as patch:
        patch.setattr(search, "measured", look)
        assert shrink(place, *own, save=tmp_path / "cut", **more) == 130
    assert len(looked) == after
    after = -1
    with monkeypatch.context() as patch:
        patch.setattr(search, "measured", look)
        patch.setattr("oneshot.pipeline.shrink.order_of", None)  # found before the first mixture
        if own:
            patch.setattr(spread, "curves", None)
        assert shrink(place, *own, save=tmp_path / "cut", **more) == 0
    assert shrink(place, *own, save=tmp_path / "whole", **more) == 0
    record = checkpoint.read_manifest(tmp_path / "whole")["record"]
    assert len(looked) == len(set(looked)) == len(record["shrunk"]["tried"])
    whole, cut = tiny.weights(tmp_path / "whole"), tiny.weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert checkpoint.read_manifest(tmp_path / "cut")["record"]["shrunk"]["tried"] == record["shrunk"]["tried"]


def test_a_search_elsewhere_is_said(place, tmp_path, monkeypatch):  # noqa: F811
    """Continued with other versions or threads, the record says what the search was computed with."""
    more = {"to": 0.7, "tries": 2, "results": tmp_path, "save": tmp_path / "cut"}
    with tiny.interrupted(1):
        assert shrink(place, **more) == 130
    real = compress.circumstances
    monkeypatch.setattr(compress, "circumstances", lambda *given: real(*given) | {"threads": 99})
    assert shrink(place, **more) == 0
    [said] = [w for w in checkpoint.read_manifest(tmp_path / "cut")["record"]["warnings"] if "search" in w]
    assert said.startswith("resumed: its search was computed with threads") and "(now 99)" in said


def test_from_python(place):  # noqa: F811
    model, tokenizer = oneshot.load(place / "model")
    before = blocks_of(model)
    record = oneshot.shrink(model, tokenizer, to=0.7, calibration=str(place / "calibration.txt"), nsamples=8,
                            seqlen=tiny.WINDOW, tries=2, progress=False)
    assert blocks_of(model) <= 0.7 * before == pytest.approx(0.7 * record["shrunk"]["parameters_before"])
    assert model(input_ids=torch.arange(3, 9).unsqueeze(0)).logits.isfinite().all()
    assert record["shrunk"]["blocks"] == model.config.num_hidden_layers
    with pytest.raises(ValueError, match=r"^to: None leaves the model as it is"):
        oneshot.shrink(model, tokenizer, to=None)
    record = oneshot.shrink(model, tokenizer, to=None, layers=record["shrunk"]["blocks"] - 1, pattern="0.5",
                            calibration=str(place / "calibration.txt"), nsamples=4, seqlen=tiny.WINDOW, progress=False)
    assert {row["pattern"] for row in record["layers"]} == {"0.5"}


def test_dense_and_smaller_runs_have_ids_of_their_own():
    from oneshot.settings import flags as settings
    ids = {cfg.run_id("x") for argv in ([], ["--shrink", "0.7"], ["--shrink", "0.7", "--tries", "1"], ["--layers", "2"])
           for cfg in settings.parse(["--method", "wanda", "--pattern", "0.5", "--no-dense", *argv])}
    assert len(ids) == 4


def test_packed_and_uneven(place, tmp_path, capfd):  # noqa: F811
    more = {"pattern": "2:4", "method": "sparsegpt", "results": tmp_path}
    assert shrink(place, to=0.8, tries=1, format="packed", save=tmp_path / "packed", **more) == 0
    assert verify.main([str(tmp_path / "packed"), "--original", str(place / "model"), "--quiet"]) == 0
    assert shrink(place, drop="mlp:1", tries=None, save=tmp_path / "uneven", **more) == 0
    assert {row["pattern"] for row in verify.verify(tmp_path / "uneven").rows} == {"2:4"}
    again = flags(place, "--no-dense", model=tmp_path / "uneven", save=tmp_path / "again", results=tmp_path)
    assert main(*again) == 0 and verify.main([str(tmp_path / "again"), "--quiet"]) == 0
    capfd.readouterr()
    assert shrink(place, drop="mlp:1", tries=None, format="packed", save=tmp_path / "none", **more) == 2
    assert shrink(place, model=tmp_path / "uneven", to=0.9, results=tmp_path) == 2
    one, other = said(capfd.readouterr().err)
    assert one.startswith("error: --format packed") and other.startswith("error: --model")
    for own in ["--drop", "mlp:1"], ["--shrink", "0.8", "--uneven"]:
        assert main(*flags(place, "--no-dense", *own, pattern="2:4", method="sparsegpt", format="compressed-tensors",
                           quantise="int8:row", save=tmp_path / "none")) == 2
        assert capfd.readouterr().err.startswith("error: --format compressed-tensors: layers that differ")


def test_experts_then_neurons_of_a_mixture(tmp_path, monkeypatch, capfd):
    sizes = {**tiny.SIZES["llama"], "num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(tiny.SIZES, "mixtral", sizes)
    folder = tmp_path / "place"
    folder.mkdir()
    tiny.save_model(folder / "model", "mixtral")
    tiny.save_text(folder / "calibration.txt", 1)
    tiny.save_text(folder / "evaluation.txt", 2)
    assert shrink(folder, experts=3, to=0.6, tries=2, save=tmp_path / "out", results=tmp_path) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == 3
    dense = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert blocks_of(model) <= 0.6 * blocks_of(dense)
    assert verify.main([str(tmp_path / "out"), "--original", str(folder / "model"), "--quiet"]) == 0
    capfd.readouterr()
    assert shrink(folder, experts=1, tries=None, results=tmp_path) == 2
    assert "uses 2 experts for each token" in said(capfd.readouterr().err)[-1]
