"""The output head in `oneshot fit`: its time in the device's table, its loss, the plan, the runs, plain rounding."""

import json

import pytest
import tiny
import torch
from oneshot_kernels.cpu import integers
from tiny import plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM
from variants import needs_compiler

from oneshot.measure import latency
from oneshot.pipeline import device_table, forms
from oneshot.pipeline.fit import candidates, command, ending
from oneshot.pipeline.fit.plans import Costs, Plan

pytestmark = [pytest.mark.usefixtures("plain_pages"), needs_compiler]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def timed(monkeypatch, tmp_path):
    """Times as they are made up: a block 1 ms, a head 10 ms; half of it with integers, nothing less of a block."""
    def one(model, kind, device, graph):
        head = 0.005 if isinstance(model.lm_head, integers.IntegerLinear) else 0.01
        return 0.001 + 0.001 * len(model.model.layers) + head
    monkeypatch.setattr(latency, "one", one)
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ending.figures, "save", lambda figure, path: path.write_text("drawn"))


def test_the_table_says_what_the_head_gains(place):
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    found = device_table.table(model, "cpu", rounds=1, progress=False)
    assert found["parts"]["decode1"]["head"] == {"int8": pytest.approx(5), "int4": pytest.approx(5)}
    told = [device_table.foretell(found, "decode1", 2, {}, head=key) for key in (None, "int8")]
    assert told == [pytest.approx(13), pytest.approx(8)]
    costs = Costs(model, found)
    assert costs.of(Plan())["latency"] - costs.of(Plan(output="int8"))["latency"] == pytest.approx(5)


def test_its_loss_is_that_of_the_head_alone(place):
    from oneshot.data.windows import Tokens
    from oneshot.pipeline.fit.steps import Steps

    words = ("--calibration", str(place / "calibration.txt"), "--nsamples", "8", "--seqlen", "16", "--device", "cpu",
             "--no-progress")
    own = Steps(words, str(place / "model"), "model.layers", "obs", (), place / "out")
    model, ids = AutoModelForCausalLM.from_pretrained(place / "model").eval(), torch.arange(64).view(4, 16) % 30
    looks = candidates.Looks(own.cutting, own.sparsening, model, Tokens(ids, None, "", ""))
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = looks.in_head(model, "int4:16")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    other = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    from oneshot.quantise import head, mixed
    head.round_head(other, mixed.parse("none,lm_head=int4:16"))
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (model, other))
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3) and found > 0


def test_a_target_that_the_head_alone_meets(place, tmp_path, capfd):
    """The plan rounds it and nothing else; the run, its record, plain rounding beside it and the table say so."""
    out = tmp_path / "out"
    asked = ["--model", place / "model", "--save", out, "--evaluate", place / "evaluation.txt", "--calibration",
             place / "calibration.txt", "--nsamples", "8", "--seqlen", "16", "--eval-windows", "4", "--no-progress",
             "--target", "latency=0.7", "--step", "100%", "--allow", "int8", "--device", "cpu"]
    assert command.main(list(map(str, asked))) == 0, capfd.readouterr().err
    told = capfd.readouterr().out
    ledger = json.loads((out / "fit.json").read_text())
    [now] = ledger["rounds"]
    assert now["plan"]["output"] == "int8" and not now["plan"]["grids"] and now["told"] == "output head in int8"
    assert now["shares"]["latency"] == pytest.approx(9 / 14) == pytest.approx(now["foretold"]["latency"])
    assert now["candidates"]["output"].keys() == {"int8"} and now["candidates"]["most"] == "output"
    record = json.loads((out / "round-1" / "oneshot.json").read_text())["record"]
    assert record["head"]["grid"] == "int8:row" and not any(row.get("grid") for row in record["layers"])
    assert "int8: plain rounding, of the output head too" in told
    assert ledger["ending"]["plain"]["int8"]["shares"]["latency"] == pytest.approx(9 / 14)
    assert isinstance(forms.load(out / "round-1").lm_head, integers.IntegerLinear)
    assert command.main(list(map(str, asked))) == 0  # again for nothing
    assert capfd.readouterr().err.count("finished earlier, stored result") == 3
