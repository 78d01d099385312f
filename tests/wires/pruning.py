"""Flags of what is loaded, done and written."""

import tiny
import torch
import transformers
from jobs import BYTE

from oneshot import calibrate, models
from oneshot.models import OnDisk
from oneshot.pipeline import idle
from oneshot.prune import linear, loop, shared_inputs
from oneshot.quantise import scaling
from wires import differ, wire, zeros
from wires.text import hub


@wire("model")
def _(b):
    other = tiny.save_model(b.tmp / "other", seed=1)
    assert b.record(model=other)["model"]["fingerprint"] == models.fingerprint(models.load(other)[0])
    assert b.record()["model"]["fingerprint"] != models.fingerprint(models.load(other)[0])


@wire("dtype")
def _(b):
    assert {W.dtype for W in b.weights(dtype="bfloat16").values()} == {torch.bfloat16}
    assert {W.dtype for W in b.weights().values()} == {torch.float32}


@wire("model_revision", "cache_dir", "trust_remote_code")
def _(b):
    asked = {"revision": "abc", "cache_dir": str(b.tmp), "trust_remote_code": True}
    for library in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        with b.monkeypatch.context() as patch, \
                b.seen(library, "from_pretrained", lambda args, kwargs, _: {k: kwargs.get(k) for k in asked}) as found:
            patch.delitem(idle.RULES, "model_revision")  # refused for a folder; a hub name goes the same way
            b.record("--trust-remote-code", model_revision="abc", cache_dir=b.tmp)
        assert found == [asked]
    hub(b, "cache_dir", str(b.tmp))


@wire("method")
def _(b):
    assert differ(b.weights(method="wanda"), b.weights(method="magnitude"))


@wire("effort")
def _(b):
    assert b.record(method="best", effort=1)["settings"]["method"] == "sparsegpt+refit"
    assert b.record(method="best", effort=2)["settings"]["method"] == "alps"


@wire("pattern")
def _(b):
    for pattern, share in (("0.25", 0.25), ("1:4", 0.75)):
        assert all(zero.float().mean() == share for zero in zeros(b.weights(pattern=pattern)).values())


@wire("group")
def _(b):
    def rows_alike(group):
        return all(len(set(zero.sum(1).tolist())) == 1 for zero in zeros(b.weights(group=group)).values())
    assert rows_alike("row") and not rows_alike("matrix")


@wire("allocate")
def _(b):
    counts = {name: float(zero.float().mean()) for name, zero in zeros(b.weights(allocate="owl")).items()}
    assert len(set(counts.values())) > 1


@wire("keep_dense")
def _(b):
    found = zeros(b.weights(keep_dense="*.o_proj"))
    assert {name for name, zero in found.items() if not zero.any()} == {n for n in found if n.endswith("o_proj")} != {}


@wire("heal")
def _(b):
    plain, healed = b.weights(), b.weights(heal="distil", **{"distil.steps": 2, "distil.lr": 1e-4})
    assert differ(plain, healed) and all((healed[f"{n}.weight"] == 0)[zero].all() for n, zero in zeros(plain).items())


@wire("quantise")
def _(b):
    """As many values in a row as there are codes, beside zeros where they were."""
    plain, rounded = b.weights(), b.weights(quantise="int3:row")
    for name, zero in zeros(plain).items():
        W = rounded[f"{name}.weight"]
        assert (W[zero] == 0).all() and all(2 < len(row.unique()) <= 8 for row in W)


@wire("quantiser")
def _(b):
    found = [b.weights(quantise="int3:row", quantiser=name) for name in ("gptq", "rtn", "joint")]
    assert differ(found[0], found[1]) and differ(found[0], found[2]) and differ(found[1], found[2])


@wire("scale_columns")
def _(b):
    for on, calls in ((True, tiny.BLOCKS), (False, 0)):
        with b.seen(scaling, "scale", lambda *_: 1) as found:
            b.weights(quantise="int3:row", scale_columns=on)
        assert len(found) == calls


@wire("shared_inputs")
def _(b):
    for more, calls in ((["--shared-inputs"], (0, 1)), ([], (1, 0))):
        with b.seen(loop, "prune_model", lambda *_: 1) as own, \
                b.seen(shared_inputs, "prune_shared", lambda *_: 1) as shared:
            b.record(*more)
        assert (len(own), len(shared)) == calls


@wire("true_sequential")
def _(b):
    """q,k,v; o; gate,up; down: four passes over each block."""
    assert passes(b) == tiny.BLOCKS and passes(b, "--true-sequential") == 4 * tiny.BLOCKS
    assert differ(b.weights(), b.weights("--true-sequential"))


@wire("gram_budget")
def _(b):
    """Room for one matrix: as many passes as different inputs, on the model's own inputs and on shared ones."""
    for more in ((), ("--shared-inputs",)):
        assert passes(b, *more) == tiny.BLOCKS and passes(b, *more, gram_budget=BYTE) == 4 * tiny.BLOCKS


def passes(b, *more, **changed):
    """How often statistics are collected in a run."""
    with b.seen(calibrate, "collect", lambda *_: 1) as found:
        b.record(*more, **changed)
    return len(found)


@wire("dense_target")
def _(b):
    with b.seen(linear, "towards_dense", lambda args, *_: args[2]) as shares:
        b.record(dense_target=0.3)
        assert set(shares) == {0.3}
        del shares[:]
        b.record()
        assert not shares


@wire("stop_on_collapse")
def _(b):
    worse = {"method": "magnitude", "pattern": "0.95"}
    assert (b.code("--stop-on-collapse", **worse), b.code(**worse)) == (2, 0)


@wire("save", "overwrite")
def _(b):
    out = b.tmp / "out"
    assert b.code(save=out) == 0 and (out / "oneshot.json").is_file()
    assert (b.code(save=out, nsamples=3), b.code("--overwrite", save=out, nsamples=3)) == (2, 0)


@wire("format")
def _(b):
    two_of_four = {"pattern": "2:4"}
    assert any(name.endswith("metadata") for name in b.weights(format="packed", **two_of_four))
    assert not any(name.endswith("metadata") for name in b.weights(**two_of_four))


@wire("results")
def _(b):
    assert b.code(results=b.tmp / "here") == 0 and len(list((b.tmp / "here").glob("*.json"))) == 1


@wire("dense")
def _(b):
    both = tiny.flags(b.place, results=b.tmp / "both", evaluate="none")
    assert tiny.main(*both) == 0 and ("dense", "dense") in tiny.records(b.tmp / "both")
    assert ("dense", "dense") not in b.records()


@wire("quantised")
def _(b):
    assert {key for key in b.records("--quantised") if key[0] == "rtn"} == {("rtn", f"int{n}") for n in (8, 4)}
    assert len(b.records()) == 1


@wire("offload")
def _(b):
    """Blocks are read one by one, and the same comes out."""
    with b.seen(OnDisk, "present", lambda args, *_: args[1]) as reached:
        away = b.weights(offload="disk")
    assert set(reached) == {0, 1, 2} and not differ(b.weights(), away)
