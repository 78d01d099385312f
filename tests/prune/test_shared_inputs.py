"""Shared inputs: many jobs solved from one pass over the dense model's inputs (`--shared-inputs`)."""

import copy

import families
import pytest
import tiny
import torch
from jobs import BYTE, job_of, prune, tokens
from tiny import plain_pages  # noqa: F401

from oneshot import calibrate, models
from oneshot.prune import linalg, shared_inputs

pytestmark = pytest.mark.usefixtures("plain_pages")


class Calls:
    """Counts the calls of a function that stands where it stood."""

    def __init__(self, monkeypatch, owner, name):
        self.n, self.real = 0, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.n += 1
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_shared_inputs_solve_each_linear_on_the_dense_models_inputs(name):
    """The first block sees the same inputs either way; further up every job is solved as if it were alone."""
    asked = [("sparsegpt", "2:4"), ("wanda", "0.6"), ("sparsegpt", "0.5")]
    model = families.tiny(name)
    before = copy.deepcopy(model.state_dict())
    jobs = [job_of(model, *a) for a in asked]
    solved = shared_inputs.prune_shared(model, tokens(), None, jobs)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for a, job, (result, weights) in zip(asked, jobs, solved, strict=True):
        own = families.tiny(name)
        prune(own, *a)
        [(_, alone)] = shared_inputs.prune_shared(model, tokens(), None, [job])
        assert len(result.layers) == len(weights) == len(list(models.all_weights(own)))
        for block in models.walk(own):
            for weight in block.weights:
                assert torch.equal(weights[weight.name], alone[weight.name])
                if block.number == 0:
                    torch.testing.assert_close(weights[weight.name], weight.get(), rtol=1e-4, atol=1e-5)


def test_jobs_share_the_pass_and_the_factorisations(monkeypatch):
    """Two blocks, three batches, four tensors that feed seven linears, whatever the number of jobs."""
    model = families.tiny("llama")
    jobs = [job_of(model, method, pattern) for method, pattern in (
        ("sparsegpt", "2:4"), ("sparsegpt", "0.5"), ("sparsegpt+refit", "0.6"), ("wanda+refit", "0.7"))]
    for n in (1, len(jobs)):
        with monkeypatch.context() as patch:
            captured, collected = Calls(patch, calibrate, "capture"), Calls(patch, calibrate, "collect")
            passed = [Calls(patch, block, "forward") for block in models.blocks(model)[1]]
            factored, scaled = Calls(patch, linalg, "_upper_factor"), Calls(patch, linalg, "_unit_gram")
            shared_inputs.prune_shared(model, tokens(), None, jobs[:n])
        assert (captured.n, collected.n) == (1, 2)
        assert [p.n for p in passed] == [2 * 3 + 1, 2 * 3]  # to collect, to carry on; what the first one returns
        assert factored.n == 2 * 4 and scaled.n == (0 if n == 1 else 2 * 4)


def test_the_dense_pass_sees_the_dense_model():
    model = families.tiny("llama")
    first = calibrate.capture(model, tokens(), batch_size=4)
    want = {}
    for block in models.walk(model):
        statistics, _, _ = calibrate.collect(block.module, first, block.number, block.weights, {"outer"})
        want |= {n: m.outer.clone() for n, m in statistics.items()}
        calibrate.replay(block.module, first, block.number)
    tight = job_of(model, gram_budget=BYTE).options  # one Gram matrix at a time
    found, portions = {}, []
    for block, weights, statistics in shared_inputs.dense_pass(model, tokens(), None, {"outer"}, tight):
        portions.append(block.name)
        found |= {w.name: statistics[w.name].outer.clone() for w in weights}
    assert portions == [f"model.layers.{b}" for b in (0, 1) for _ in range(4)]  # four inputs a block
    assert found.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(found[key], want[key])


@pytest.mark.parametrize("allocate", ["owl", "error"])
def test_one_dense_pass_allocates_for_all_shared_runs(tmp_path, monkeypatch, allocate):
    """One pass to allocate and one to solve for three patterns, and each gets the plan that it gets alone."""
    place = tiny.make(tmp_path)
    alone = {}
    for pattern in ("0.5", "0.6", "0.7"):
        assert tiny.main(*tiny.flags(place, "--no-dense", "--shared-inputs", pattern=pattern, allocate=allocate,
                                     results=place / f"alone-{pattern}")) == 0
        [record] = tiny.records(place / f"alone-{pattern}").values()
        alone[pattern] = [row["pattern"] for row in record["layers"]]
    passes = Calls(monkeypatch, shared_inputs, "start")
    assert tiny.main(*tiny.flags(place, "--no-dense", "--shared-inputs", pattern="0.5,0.6,0.7", allocate=allocate)) == 0
    assert passes.n == 2
    found = tiny.records(place / "runs")
    assert {p: [row["pattern"] for row in found["wanda", p]["layers"]] for p in alone} == alone


def test_shared_inputs_by_command_give_every_row_and_checkpoint(tmp_path):
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--shared-inputs", method="wanda,sparsegpt", pattern="2:4,0.6", save=place / "out")
    assert tiny.main(*argv) == 0
    records = tiny.records(place / "runs").values()
    assert len(records) == 5
    assert all(r["settings"]["shared_inputs"] for r in records if r["settings"]["method"] != "dense")
    assert {p.name for p in (place / "out").iterdir()} == {"wanda-2of4", "sparsegpt-2of4", "wanda-0.6", "sparsegpt-0.6"}
    again = {p: p.read_bytes() for p in (place / "runs").glob("*.json")}
    assert tiny.main(*argv) == 0
    assert again == {p: p.read_bytes() for p in (place / "runs").glob("*.json")}


@pytest.mark.parametrize("flag", ["--true-sequential", "--heal=block", "--dense-target=0.5", "--stop-on-collapse"])
def test_shared_inputs_refuse_what_needs_a_runs_own(tmp_path, capsys, flag):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--shared-inputs", flag, method="sparsegpt")) == 2
    assert "does not go with --shared-inputs" in capsys.readouterr().err


def test_a_finished_shared_command_solves_nothing_again(tmp_path, monkeypatch):
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--no-dense", "--shared-inputs", method="wanda", save=place / "out")
    assert tiny.main(*argv) == 0
    monkeypatch.setattr(shared_inputs, "prune_shared", lambda *args: pytest.fail("solved again"))
    assert tiny.main(*argv) == 0


def test_a_method_that_looks_at_no_data_can_share_inputs(tmp_path):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", "--shared-inputs", "--no-layer-errors", method="magnitude")) == 0
