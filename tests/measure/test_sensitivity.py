"""Sensitivity: each linear pruned alone costs what a plain run of the model with that one weight replaced costs."""

import copy
import json

import families
import jobs
import pytest
import tiny
import torch
from tiny import plain_pages  # noqa: F401

from oneshot import models, report
from oneshot.data import given
from oneshot.measure.sensitivity import sensitivity
from oneshot.prune import shared_inputs
from oneshot.prune.allocate import Linear
from oneshot.prune.allocate import sensitivity as allocation
from oneshot.prune.patterns import Unstructured


def tokens(seed):
    return given(jobs.tokens(8, seed))


def measure(model, unit="linear", **more):
    return sensitivity(model, tokens(1), jobs.job_of(model, "wanda"), tokens(2), unit, **more)


def plain_loss(model):
    ids = tokens(2).ids
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_linear_alone_costs_what_a_plain_forward_says(name):
    model = families.tiny(name)
    before = copy.deepcopy(model.state_dict())
    rows = measure(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert rows == sorted(rows, key=lambda r: -r["loss_increase"])
    kinds = {f"{weight.block}.{weight.kind}" for weight in models.all_weights(model)}
    assert {r["name"] for r in rows} == kinds
    [(_, pruned)] = shared_inputs.prune_shared(model, tokens(1).ids, None, [jobs.job_of(model, "wanda")])
    dense = plain_loss(model)
    for row in rows[:3] + rows[-2:]:
        other = families.tiny(name)
        for weight in models.all_weights(other):
            if f"{weight.block}.{weight.kind}" == row["name"]:
                weight.set(pruned[weight.name])
        assert row["loss_increase"] == pytest.approx(plain_loss(other) - dense, abs=2e-5)


def test_a_kind_is_pruned_in_all_blocks_at_once():
    rows = measure(families.tiny("llama"), "kind")
    assert {r["name"] for r in rows} == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    sizes = {r["name"]: r["weights"] for r in rows}
    assert sizes["mlp.down_proj"] == 2 * 32 * 48


def test_batches_do_not_matter():
    model = families.tiny("llama")
    found = [measure(model, "kind", eval_batch_size=n) for n in (1, 4)]
    assert [r["loss_increase"] for r in found[0]] == pytest.approx([r["loss_increase"] for r in found[1]], abs=1e-6)


@pytest.mark.usefixtures("plain_pages")
def test_by_command_and_then_as_an_allocation(tmp_path, capsys):
    place = tiny.make(tmp_path)
    assert tiny.main(*tiny.flags(place, "--no-dense", sensitivity="linear")) == 0
    [file] = (place / "runs").glob("*.json")
    rows = report.read(file)["sensitivity"]
    assert len(rows) == 7 * tiny.BLOCKS
    assert tiny.main(*tiny.flags(place, "--no-dense", pattern="0.5", allocate="sensitivity", results=place / "two",
                                 **{"sensitivity.record": file})) == 0
    [again] = (place / "two").glob("*.json")
    sparsity = {r["name"]: float(r["pattern"]) for r in report.read(again)["layers"]}
    worst, least = (max, min)
    by_weight = {r["name"]: r["loss_increase"] / r["weights"] for r in rows}
    assert sparsity[worst(by_weight, key=by_weight.get)] < 0.5 < sparsity[least(by_weight, key=by_weight.get)]
    record = report.read(file)
    record["model"]["fingerprint"] = "another"
    report.write(record, file)
    assert tiny.main(*tiny.flags(place, "--no-dense", pattern="0.5", allocate="sensitivity",
                                 **{"sensitivity.record": file})) == 2
    assert "measured on another model" in capsys.readouterr().err


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("{}", "KeyError"), ("no", "JSONDecodeError")])
def test_a_record_without_sensitivities_is_refused(tmp_path, content, words):
    file = tmp_path / "r.json"
    if content:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"--sensitivity.record.*{words}"):
        allocation.plan({}, [{"a": Linear(4, 4, 4)}], Unstructured(0.5, "matrix"), allocation.Config(record=str(file)))


def test_a_record_of_other_linears_is_refused(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"sensitivity": [{"name": "b", "loss_increase": 1.0, "weights": 4}],
                                "model": {"fingerprint": "f"}}))
    with pytest.raises(ValueError, match="says nothing of a"):
        allocation.plan({}, [{"a": Linear(4, 4, 4)}], Unstructured(0.5, "matrix"), allocation.Config(record=str(file)))
