"""Flags of how it is computed: devices, batches, dtypes, precision."""

import importlib

import pytest
import tiny
import torch

from oneshot import calibrate, models
from oneshot.data import sample_self
from oneshot.heal import train
from oneshot.heal.text import Course, teacher
from oneshot.prune import solvers
from oneshot.runtime import environment, products
from oneshot.structured import depth, ragged, spread
from wires import SMALLER, text_healing, wire
from wires.text import suite, task


@wire("device")
def _(b):
    """Every step asks for it. Another name of the CPU tells it from a default."""
    blocks = importlib.import_module("oneshot.models.blocks")

    def note(args, *_):
        return str(args[1])
    with b.seen(blocks, "resident", note) as walked, b.seen(models, "resident", note) as others, \
            b.seen(environment, "peak_memory", lambda args, *_: args[0]) as measured:
        b.record("--divergence", "--latency", "--say", "the", device="cpu:0", evaluate=b.place / "evaluation.txt",
                 eval_windows=2, sensitivity="linear", calibration="self", allocate="owl", heal="block,distil",
                 prompts=suite(b), **{"block.steps": 1, "distil.steps": 1})
        with b.monkeypatch.context() as patch:
            patch.setattr(ragged, "check", lambda *_: None)  # runs 16 tokens on the CPU, wherever the rest is
            b.record("--uneven", device="cpu:0", **SMALLER)
    assert {*walked, *others, *measured} == {"cpu:0"} and len(walked) > 6 and len(others) > 6
    with b.seen(models, "resident", note) as trained, \
            b.seen(teacher.Live, "__post_init__", lambda args, *_: str(args[0].device)) as taught:
        b.record(device="cpu:0", **text_healing(b))
    assert set(trained) == set(taught) == {"cpu:0"}


@wire("batch_size")
def _(b):
    """To calibrate, on the way to an allocation or a smaller model too, to sample, and by default to measure."""
    for allocate, passes in (("uniform", 1), ("owl", 2)):
        with b.batches() as sizes:
            b.record(nsamples=5, batch_size=2, allocate=allocate)
        assert sizes == [2, 2, 1] * passes
    with b.batches() as sizes:
        b.record(nsamples=7, batch_size=3, **SMALLER)
    assert max(sizes) == 3
    with b.seen(sample_self, "_sample_batch", lambda args, *_: len(args[1])) as sizes:
        b.record(nsamples=6, calibration="self", batch_size=3)
    assert sizes == [3, 3, 2]
    assert measured_in(b, batch_size=2) == {2}


@wire("eval_batch_size")
def _(b):
    for how in ({}, {"divergence": True}, {"damage": True}, {"sensitivity": "kind"}):
        assert measured_in(b, batch_size=2, eval_batch_size=3, **how) == {3}, how
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    with b.seen(HFLM, "__init__", lambda args, kwargs, _: kwargs["batch_size"]) as sizes:
        b.record(eval_batch_size=3, tasks="letters", task_path=task(b))
    assert sizes == [3]


def measured_in(b, **changed):
    """How many windows at a time a run measures six on, one that looks at no calibration data."""
    with b.batches() as sizes:
        b.record("--no-layer-errors", method="magnitude", evaluate=b.place / "evaluation.txt", eval_windows=6,
                 **changed)
    return set(sizes)


@wire("activations")
def _(b):
    """They wait where it says, whatever that is: here another name of the CPU, and for `put` no device at all."""
    with b.seen(calibrate, "capture", lambda args, kwargs, found: found) as found:
        b.record(activations="cpu:0", device="cpu")
    assert {(str(a.place), str(a.device)) for a in found} == {("cpu:0", "cpu")}
    [activations] = found
    activations.place = torch.device("meta")
    activations.put(0, activations.hidden[0])
    assert activations.hidden[0].is_meta


@wire("activation_dtype")
def _(b):
    def waiting(activations):
        return {h.dtype for h in activations.hidden}
    for dtype, want in (("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.float32)):
        with b.seen(calibrate, "capture", lambda args, kwargs, found: waiting(found)) as first, \
                b.seen(calibrate, "replay", lambda args, *_: waiting(args[1])) as later:
            b.record(activation_dtype=dtype)
        assert first + later == [{want}] * (1 + tiny.BLOCKS)


@wire("compute")
def _(b):
    """Wherever the model runs, but where it is trained: a linear sees one dtype."""
    given = {"dtype": "bfloat16", "evaluate": b.place / "evaluation.txt", "eval_windows": 2, "prompts": suite(b)}
    for compute, want in (("auto", torch.float32), ("stored", torch.bfloat16)):
        with b.monkeypatch.context() as patch, \
                b.seen(torch.nn.Linear, "forward", lambda args, *_: args[1].dtype) as found:
            b.records("--latency", "--say", "the", "--divergence", compute=compute, calibration="self",
                      sensitivity="linear", allocate="owl", **given)
            b.records("--shared-inputs", compute=compute, **given)
            patch.setattr(ragged, "check", lambda *_: None)  # in float32, wherever the rest is
            b.records("--uneven", "--damage", compute=compute, **given | SMALLER | {"heal": "none"})
        assert set(found) == {want}
    with b.seen(torch.nn.Linear, "forward", lambda args, *_: args[1].dtype) as found:
        b.record(compute="stored")
    assert set(found) == {torch.float32}  # as it is stored


@wire("tf32")
def _(b):
    """Wherever there are products: solving, also on shared inputs, healing, making the model smaller."""
    b.monkeypatch.setattr(products, "by_onednn", lambda: False)
    healing = {"heal": "block,distil", "block.steps": 1, "distil.steps": 1}
    for more, precision in (((), "highest"), (("--tf32",), "high")):
        with b.precisions(solvers, "solve") as solved, b.precisions(train.Fitting, "descend") as healed:
            b.record(*more, **healing)
        with b.precisions(solvers, "solve") as shared, b.precisions(calibrate, "collect") as collected:
            b.record(*more, "--shared-inputs")
        with b.precisions(depth, "influences") as order, b.precisions(spread, "curve") as curves:
            b.record(*more, "--uneven", **SMALLER)
        with b.precisions(Course, "train") as trained:
            b.record(*more, **text_healing(b))
        assert [solved, healed, shared, collected, order, curves, trained] == [{precision}] * 7
        assert torch.get_float32_matmul_precision() == "highest"


@wire("layer_errors")
def _(b):
    for more, there in (((), True), (("--no-layer-errors",), False)):
        assert {row["relative_error"] is not None for row in b.record(*more)["layers"]} == {there}


@wire("progress")
def _(b):
    for more, there in (([], False), ([""], True)):
        argv = [a for a in b.argv() if not (more and a == "--no-progress")]
        b.capfd.readouterr()
        assert tiny.main(*argv) == 0
        assert ("prune (sparsegpt)" in b.capfd.readouterr().err) == there
