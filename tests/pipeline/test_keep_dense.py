"""`--keep-dense`: named linears stay dense, whatever else is asked for; the record and `oneshot verify` say so."""

import json

import families
import jobs
import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401

import oneshot
from oneshot import checkpoint, models
from oneshot.checkpoint import verify
from oneshot.pipeline.plan import kept_dense
from oneshot.prune import loop

pytestmark = pytest.mark.usefixtures("plain_pages")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{b}.{linear}" for b in range(tiny.BLOCKS) for linear in LINEARS]


@pytest.fixture
def run(place, tmp_path, capfd):  # noqa: F811
    """`run(keep, *more, **changed)`: (record, checkpoint's tensors) of a run that keeps these linears dense."""
    def command(keep, *more, **changed):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        argv = tiny.flags(place, "--no-dense", *more, **{"evaluate": "none", "keep_dense": keep, "save": out,
                                                         "results": out.with_suffix(".runs")} | changed)
        assert tiny.main(*argv) == 0, capfd.readouterr().err
        return checkpoint.read_manifest(out)["record"], tiny.weights(out), out
    return command


def assert_kept(record, weights, dense, kept):
    """Exactly these linears are dense: bit by bit the dense model's, without a zero, and so in the record."""
    rows = {row["name"]: row for row in record["layers"]}
    assert set(rows) == set(NAMES) and {name for name, row in rows.items() if row["pattern"] == "dense"} == set(kept)
    for name, row in rows.items():
        W = weights[f"{name}.weight"]
        assert torch.equal(W, dense[f"{name}.weight"]) == (name in kept), name
        assert row["zeros"] == int((W == 0).sum()) and (row["target_zeros"] == 0) == (name in kept)
        assert (row["relative_error"] == 0) == (name in kept)
    share = sum(W.numel() for name, W in weights.items() if name.removesuffix(".weight") in kept) / \
        sum(weights[f"{name}.weight"].numel() for name in NAMES)
    assert [w for w in record["warnings"] if w.startswith("--keep-dense: ")] == [
        f"--keep-dense: {len(kept)} of {len(NAMES)} linears stay dense, {share:.1%} of the prunable weights"]


# ---------------------------------------------------------------- what is named

@pytest.mark.parametrize("spec, kept", [
    ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
    ("model.layers.2.*", [n for n in NAMES if ".2." in n]),
    ("*.down_proj", [n for n in NAMES if n.endswith("down_proj")]),
    ("*.[qk]_proj, model.layers.?.mlp.up_proj", [n for n in NAMES if n.endswith(("q_proj", "k_proj", "up_proj"))]),
    (" model.layers.0.*,,*.0.mlp.* ", [n for n in NAMES if ".0." in n])])
def test_globs_of_full_names(place, run, spec, kept):  # noqa: F811
    record, weights, _ = run(spec)
    assert_kept(record, weights, tiny.weights(place / "model"), kept)
    assert record["settings"]["keep_dense"] == spec


@pytest.mark.parametrize("spec, named", [
    ("*.x_proj", "*.x_proj"), ("*.q_proj,mlp.up_proj", "mlp.up_proj"),  # a full name is asked for
    ("model.layers.9.*", "model.layers.9.*"), ("MODEL.*", "MODEL.*"), ("lm_head", "lm_head")])
def test_an_entry_that_matches_nothing_is_named(place, tmp_path, capfd, spec, named):  # noqa: F811
    argv = tiny.flags(place, keep_dense=spec, save=tmp_path / "out", results=tmp_path / "runs")
    assert tiny.main(*argv) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert error == (f"error: --keep-dense {named}: matches none of the model's {len(NAMES)} linears, such as "
                     f"{NAMES[0]}")
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("spec", ["*", "*.self_attn.*,*.mlp.*"])
def test_keeping_all_is_refused(place, tmp_path, capfd, spec):  # noqa: F811
    assert tiny.main(*tiny.flags(place, keep_dense=spec, results=tmp_path / "runs")) == 2
    [error] = tiny.said(capfd.readouterr().err)
    assert error == f"error: --keep-dense {spec}: keeps all linears dense, nothing is left to prune"


def test_nothing_asked_for_is_nothing_kept():
    assert kept_dense(None, NAMES) == kept_dense("", NAMES) == kept_dense(" , ", NAMES) == set()


# ---------------------------------------------------------------- the most harmful of a record

@pytest.fixture(scope="module")
def measured(place):  # noqa: F811
    """{unit: (file, record)} of runs with `--sensitivity`."""
    found = {}
    for unit in ("linear", "kind"):
        results = place / f"measured-{unit}"
        assert tiny.main(*tiny.flags(place, "--no-dense", sensitivity=unit, results=results, eval_windows=4)) == 0
        [file] = results.glob("*.json")
        found[unit] = file, json.loads(file.read_text())
    return found


@pytest.mark.parametrize("unit, n", [("linear", 1), ("linear", 5), ("kind", 1), ("kind", 2)])
def test_the_most_harmful_of_a_record(place, run, measured, unit, n):  # noqa: F811
    file, told = measured[unit]
    rows = sorted(told["sensitivity"], key=lambda row: -row["loss_increase"])[:n]
    kept = [name for name in NAMES if any(name == row["name"] or name.endswith("." + row["name"]) for row in rows)]
    assert len(kept) == n * (1 if unit == "linear" else tiny.BLOCKS)
    record, weights, _ = run(f"{file}:{n}")
    assert_kept(record, weights, tiny.weights(place / "model"), kept)


@pytest.mark.parametrize("unit", ["linear", "kind"])
def test_experts_are_kept_with_their_layer_or_their_kind(tmp_path, unit):
    names = [w.name for w in models.all_weights(families.tiny("mixtral"))]
    file = tmp_path / "record.json"
    whole = {"linear": "model.layers.1.mlp.experts.down_proj", "kind": "mlp.experts.down_proj"}[unit]
    file.write_text(json.dumps({"model": {"fingerprint": "x"}, "sensitivity": [{"name": whole}]}))
    want = {n for n in names if ".experts.down_proj." in n and (unit == "kind" or ".layers.1." in n)}
    assert kept_dense(f"{file}:1", names) == want and len(want) == (4 if unit == "linear" else 8)


RECORD = '{"sensitivity": [{"name": "mlp.up_proj"}], "model": {"fingerprint": "x"}}'


@pytest.mark.parametrize("content, entry, words", [
    (None, "r.json:2", "holds no sensitivities (No such file"), ("{}", "r.json:2", "no 'sensitivity' in it"),
    ("no", "r.json:2", "holds no sensitivities"), ("[]", "r.json:2", "holds no sensitivities"),
    ('{"sensitivity": [{"name": "mlp.up_proj"}]}', "r.json:1", "no 'model' in it"),
    ('{"sensitivity": [{"name": 3}], "model": {"fingerprint": "x"}}', "r.json:1", "entries without a name"),
    (RECORD, "r.json:0", "at least 1"), (RECORD, "r.json", "matches none"), (RECORD, "r.json:two", "matches none"),
    (RECORD.replace("up_proj", "fc"), "r.json:1", "matches none")])
def test_a_record_that_does_not_serve_is_refused(tmp_path, monkeypatch, content, entry, words):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=r"^--keep-dense r\.json") as found:
        kept_dense(entry, NAMES)
    assert words in str(found.value)


def test_a_record_that_has_changed_is_another_run(place, tmp_path, measured, capfd):  # noqa: F811
    """The same command line keeps other linears: a finished result is not taken for this one's."""
    file = tmp_path / "record.json"
    argv = tiny.flags(place, "--no-dense", evaluate="none", keep_dense=f"{file}:1", save=tmp_path / "out",
                      results=tmp_path / "runs")
    told = measured["linear"][1]
    rows = told["sensitivity"]
    file.write_text(json.dumps(told))
    assert tiny.main(*argv) == 0
    file.write_text(json.dumps(told | {"sensitivity": rows[1:]}))
    assert tiny.main(*argv) == 2 and "holds another run" in capfd.readouterr().err
    assert tiny.main(*argv, "--overwrite") == 0
    record = checkpoint.read_manifest(tmp_path / "out")["record"]
    assert [row["name"] for row in record["layers"] if row["pattern"] == "dense"] == [rows[1]["name"]]


def test_a_record_of_another_model_is_refused(place, tmp_path, measured, capfd):  # noqa: F811
    told = measured["linear"][1]
    file = tmp_path / "record.json"
    file.write_text(json.dumps(told | {"model": told["model"] | {"fingerprint": "another"}}))
    assert tiny.main(*tiny.flags(place, keep_dense=f"*.o_proj,{file}:2", results=tmp_path / "runs")) == 2
    assert "was measured on another model" in capfd.readouterr().err and not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- with all else

@pytest.mark.parametrize("more", [
    {"allocate": "uniform"}, {"allocate": "owl"}, {"allocate": "arithmetic"}, {"allocate": "error"},
    {"allocate": "mix", "pattern": "2:4", "mix.budget": 0.7}, {"allocate": "sensitivity"}, {"pattern": "2:4"},
    {"method": "sparsegpt+refit"}, {"method": "magnitude"}, {"method": "sparsegpt", "dense_target": 0.5}],
    ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_with_every_allocation_and_method(place, run, measured, more, shared):  # noqa: F811
    if shared and "dense_target" in more:
        pytest.skip("they do not go together")
    if more.get("allocate") == "sensitivity":
        more = more | {"sensitivity.record": measured["linear"][0]}
    kept = [n for n in NAMES if ".1." in n or n.endswith("o_proj")]
    record, weights, _ = run("model.layers.1.*,*.o_proj", *(["--shared-inputs"] if shared else []),
                             **{"pattern": "0.6"} | more)
    if more.get("allocate") != "mix":  # which leaves others dense as well
        assert_kept(record, weights, tiny.weights(place / "model"), kept)
    dense = tiny.weights(place / "model")
    assert all(torch.equal(weights[f"{n}.weight"], dense[f"{n}.weight"]) for n in kept)
    rest = [row for row in record["layers"] if row["name"] not in kept]
    size, zeros = (sum(f(row) for row in rest) for f in (lambda r: r["shape"][0] * r["shape"][1], lambda r: r["zeros"]))
    if more.get("allocate") == "mix":
        assert 0 < zeros < size
    else:  # the others have the zeros that are asked for, within one a row
        share = {"0.6": 0.6, "2:4": 0.5}[more.get("pattern", "0.6")]
        assert abs(zeros - share * size) <= sum(row["shape"][0] for row in rest)


def test_a_shape_that_cannot_have_the_pattern_may_be_kept(place, run, tmp_path, capfd):  # noqa: F811
    """Hidden 32, MLP 48: 2:32 fits all but down_proj."""
    record, weights, _ = run("*.down_proj", pattern="2:32")
    assert_kept(record, weights, tiny.weights(place / "model"), [n for n in NAMES if n.endswith("down_proj")])
    assert tiny.main(*tiny.flags(place, pattern="2:32", keep_dense="*.up_proj", results=tmp_path / "runs")) == 2
    assert "--pattern 2:32" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_verify_proves_it(run, form, capfd):
    """What is kept is proved as dense; in a packed checkpoint it stays as it is."""
    _, weights, out = run("*.o_proj", pattern="2:4", format=form)
    capfd.readouterr()
    assert verify.main([str(out)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sum("o_proj " in line and " dense " in line and line.startswith("ok") for line in lines) == tiny.BLOCKS
    packed = {name.removesuffix(".metadata") for name in weights if name.endswith(".metadata")}
    assert packed == ({n for n in NAMES if not n.endswith("o_proj")} if form == "packed" else set())
    tiny.change_weights(out, lambda tensors: tensors["model.layers.0.self_attn.o_proj.weight"][0].zero_())
    assert verify.main([str(out), "--quiet"]) == 1
    assert "FAULT model.layers.0.self_attn.o_proj: 32 zeros, recorded 0" in capfd.readouterr().out


def test_healing_trains_it_and_leaves_it_dense(place, run):  # noqa: F811
    record, weights, _ = run("*.o_proj", heal="block", **{"block.steps": 20, "block.lr": 0.003})
    dense = tiny.weights(place / "model")
    gained = []
    for block in record["blocks"]:
        name = f"model.layers.{block['block']}.self_attn.o_proj.weight"
        told = block["heal"]["block"]
        gained.append(told["held_out_after"] < told["held_out_before"])
        assert not (weights[name] == 0).any() and torch.equal(weights[name], dense[name]) != gained[-1]
    assert any(gained)
    assert {r["pattern"] for r in record["layers"] if r["linear"] == "self_attn.o_proj"} == {"dense"}


def test_an_interrupted_run_resumes_to_the_same_bits(place, tmp_path, monkeypatch):  # noqa: F811
    def argv(name):
        return tiny.flags(place, "--no-dense", method="sparsegpt", keep_dense="*.up_proj,model.layers.2.mlp.*",
                          evaluate="none", save=tmp_path / name, results=tmp_path / "runs")
    real, calls = loop.prune_block, []

    def stop(*args, **more):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)
    monkeypatch.setattr(loop, "prune_block", stop)
    assert tiny.main(*argv("broken")) == 130
    assert tiny.main(*argv("broken")) == 0 and len(calls) == 2 + tiny.BLOCKS - 1
    monkeypatch.setattr(loop, "prune_block", real)
    assert tiny.main(*argv("whole")) == 0
    whole, broken = (tiny.weights(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[n], broken[n]) for n in whole)
    ours, theirs = (checkpoint.read_manifest(tmp_path / name)["tensors"] for name in ("broken", "whole"))
    assert ours == theirs


# ---------------------------------------------------------------- in Python

def test_in_python():
    dense, model = families.tiny("llama"), families.tiny("llama")
    record = oneshot.prune(model, method="wanda", pattern="2:4", calibration=jobs.tokens(4), progress=False,
                           keep_dense="*.down_proj")
    for old, new in zip(models.all_weights(dense), models.all_weights(model), strict=True):
        assert torch.equal(old.get(), new.get()) == new.name.endswith("down_proj")
    assert sum(row["pattern"] == "dense" for row in record["layers"]) == 2
    assert sum(w.startswith("--keep-dense: 2 of 14 linears") for w in record["warnings"]) == 1
    with pytest.raises(ValueError, match=r"^--keep-dense \*\.nothing: matches none of the model's 14 linears"):
        oneshot.prune(model, method="wanda", calibration=jobs.tokens(4), keep_dense="*.nothing")


def test_the_dense_row_and_rounded_ones_heed_it_not(place, tmp_path):  # noqa: F811
    argv = tiny.flags(place, "--quantised", keep_dense="*.up_proj", results=tmp_path)
    assert tiny.main(*argv) == 0
    for (method, _), record in tiny.records(tmp_path).items():
        assert ("keep_dense" in record["settings"]) == (method == "wanda")
        assert any(w.startswith("--keep-dense") for w in record["warnings"]) == (method == "wanda")
