"""Sensitivity: each linear pruned alone costs what a plain run of the model with that one weight replaced costs."""

import copy
import json

import families
import pytest
import tiny
import torch
from families import VOCAB, T

from oneshot import models, report
from oneshot.data import given
from oneshot.measure.sensitivity import sensitivity
from oneshot.prune import loop, solvers
from oneshot.prune.allocate import Linear
from oneshot.prune.allocate import sensitivity as way
from oneshot.prune.patterns import Unstructured, parse
from oneshot.report import page

QUIET = loop.Options(batch_size=4, progress=False)


def tokens(seed, n=8):
    return given(torch.randint(3, VOCAB, (n, T), generator=torch.Generator().manual_seed(seed)))


def measure(model, unit="linear", pattern="2:4", **more):
    steps = [(m, m.Config()) for m in solvers.chain("wanda")]
    return sensitivity(model, tokens(1), loop.make_plan(model, parse(pattern), steps), steps, tokens(2), unit, QUIET,
                       **more)


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
    path, block_list = models.blocks(model)
    kinds = {f"{path}.{b}.{v.kind}" for b, block in enumerate(block_list) for v in models.linears(block)[0]}
    assert {r["name"] for r in rows} == kinds
    steps = [(m, m.Config()) for m in solvers.chain("wanda")]
    [(_, weights)] = loop.prune_shared(model, tokens(1).ids, None,
                                       [(loop.make_plan(model, parse("2:4"), steps), steps)], QUIET)
    dense = plain_loss(model)
    for row in rows[:3] + rows[-2:]:
        other = families.tiny(name)
        for weight in models.linears(models.blocks(other)[1][row["block"]])[0]:
            if f"{path}.{row['block']}.{weight.kind}" == row["name"]:
                weight.set(weights[f"{path}.{row['block']}.{weight.name}"])
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


def test_by_command_and_then_as_an_allocation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "_pictures", lambda records: [])
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


@pytest.mark.parametrize("content, words", [(None, "FileNotFoundError"), ("{}", "KeyError"), ("no", "JSONDecodeError")])
def test_a_record_without_sensitivities_is_refused(tmp_path, content, words):
    file = tmp_path / "r.json"
    if content:
        file.write_text(content)
    with pytest.raises(ValueError, match=f"--sensitivity.record.*{words}"):
        way.plan({}, [{"a": Linear(4, 4, 4)}], Unstructured(0.5, "matrix"), way.Config(record=str(file)))


def test_a_record_of_other_linears_is_refused(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"sensitivity": [{"name": "b", "loss_increase": 1.0, "weights": 4}],
                                "model": {"fingerprint": "f"}}))
    with pytest.raises(ValueError, match="says nothing of a"):
        way.plan({}, [{"a": Linear(4, 4, 4)}], Unstructured(0.5, "matrix"), way.Config(record=str(file)))
