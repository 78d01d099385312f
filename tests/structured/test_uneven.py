"""Widths by layer, attention or MLP alone: equal to the model with zeros, saved, loaded with oneshot only, cached."""

import families
import jobs
import pytest
import tiny
import torch
from alone import alone
from cutting import logits, zeroed
from transformers import AutoModelForCausalLM

from oneshot import models
from oneshot.checkpoint import verify
from oneshot.models import groups, uneven
from oneshot.pipeline import shrink_command
from oneshot.report import page
from oneshot.structured import Cut, cut_model, search, slices
from oneshot.structured import cut as cuts

SAMPLE = ("llama", "llama-tied-bias", "qwen2", "gemma3", "gpt_neox", "falcon", "mixtral", "qwen2_moe", "llama4")


def ragged(model, last=1):
    """Other widths in each layer; of the last block no MLP (where it is one of its own) and half of the KV groups."""
    own = []
    for block, width in cuts.consumers(model):
        name = f"{block.name}.{width.consumer}"
        if width.kind == groups.NEURONS:
            own.append((name, 0 if block.number == last else width.count - 7))
        if width.kind == groups.HEADS and block.number == last:
            own.append((name, width.count // 2))
    return Cut((), (), tuple(own))


@pytest.mark.parametrize("name", SAMPLE)
def test_it_is_the_model_with_zeros_and_loads_again(name, tmp_path):
    model = families.tiny(name)
    cut = ragged(model)
    made, report = cut_model(zeroed(model, cut), cut)
    ids = jobs.tokens(3)
    torch.testing.assert_close(logits(made, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in models.blocks(made)[1].parameters()) == cuts.parameters(model, cut)
    assert "import oneshot" in report.notes[-1]
    made.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(back, ids), logits(made, ids))
    cached = back.generate(ids[:, :6], max_new_tokens=10, do_sample=False, eos_token_id=None)
    plain = back.generate(ids[:, :6], max_new_tokens=10, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, plain)


def test_what_is_compared_with_the_zeros_computes_in_float32(monkeypatch):
    """In 16 bits SmolLM2's own sums, in another order, were taken for a fault."""
    model = families.tiny("llama", dtype=torch.bfloat16)
    models.compute_as_stored(model)
    cut, seen, real = ragged(model), set(), torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda own, x: seen.add(x.dtype) or real(own, x))
    made, _ = cut_model(zeroed(model, cut), cut)
    assert seen == {torch.float32}
    assert models.computes_as_stored(model) and models.computes_as_stored(made)


LOADS = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    print("NEXT", file=sys.stderr)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print("refused")
        print(error, file=sys.stderr)
"""


def test_without_oneshot_it_does_not_load(tmp_path):
    """Also where only an attention is gone, and every other tensor has its usual shape."""
    places = []
    for own in (("model.layers.1.self_attn.o_proj", 0), ("model.layers.1.mlp.down_proj", 40)):
        model = families.tiny("llama")
        cut = Cut((), (), (own,))
        places.append(tmp_path / own[0])
        cut_model(zeroed(model, cut), cut)[0].save_pretrained(places[-1])
        assert AutoModelForCausalLM.from_pretrained(places[-1])
    done = alone(LOADS, *places, cwd=tmp_path)
    assert done.stdout.split() == ["refused"] * 2, done.stderr[-2000:]
    assert all("size mismatch" in part.lower() for part in done.stderr.split("NEXT")[1:])


@pytest.mark.parametrize("name, own, why", [
    ("llama", ("model.layers.0.self_attn.o_proj", 0), "first attention"),
    ("gemma2", ("model.layers.1.self_attn.o_proj", 0), "first attention of type full_attention"),
    ("opt", ("model.decoder.layers.1.fc2", 0), "no part of its own"),
    ("bloom", ("transformer.h.1.mlp.dense_4h_to_h", 0), "something else"),
    ("phi3", ("model.layers.1.self_attn.o_proj", 1), "cannot differ in this way"),
    ("mixtral", ("model.layers.1.mlp.experts.down_proj.2", 8), "one parameter")])
def test_what_cannot_differ_is_refused(name, own, why):
    model = families.tiny(name)
    cut = Cut((), (), (own,))
    with pytest.raises(ValueError, match=why):
        cut_model(zeroed(model, cut), cut)


@pytest.mark.parametrize("name, differs", [("llama", True), ("gemma3", True), ("mixtral", True), ("phi3", False),
                                           ("gpt_neox", False), ("gpt_oss", False)])
def test_whether_kv_groups_can_differ_is_tried(name, differs):
    """On the family's own code; the model stays as it is."""
    model = families.tiny(name)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert slices.can_differ(model, groups.HEADS) == differs
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("shapes, gone", [({"model.layers.7.mlp.up_proj": [3, 3]}, {}), ({"model.norm": [3, 3]}, {}),
                                          ({"model.layers.0.mlp.up_proj": [-3, 3]}, {}),
                                          ({}, {"model.layers.0.mlp": "code:down_proj"})])
def test_a_config_that_does_not_fit_is_refused(shapes, gone):
    with pytest.raises(ValueError, match="quantization_config"):
        uneven.reshape(families.tiny("llama"), shapes, gone)


def test_drop_parts_and_uneven_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_pictures", lambda records: [])
    place = tiny.make(tmp_path / "place")
    given = {"method": None, "pattern": None, "results": tmp_path}
    for number, more in enumerate(({"drop": "mlp:0,attn:2,1"}, {"to": 0.7, "tries": 2, "uneven": ""})):
        flags = [word for word in tiny.flags(place, "--no-dense", save=tmp_path / str(number), **given | more) if word]
        assert shrink_command.main(flags) == 0
        assert verify.main([str(tmp_path / str(number)), "--original", str(place / "model"), "--quiet"]) == 0
        assert len(verify.verify(tmp_path / str(number)).rows) > 5


def test_kv_groups_that_cannot_differ_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_pictures", lambda records: [])
    monkeypatch.setattr(slices, "can_differ", lambda model, kind: False)
    place = tiny.make(tmp_path / "place")
    given = {"method": None, "pattern": None, "results": tmp_path, "to": 0.7, "tries": 1, "save": tmp_path / "out"}
    assert shrink_command.main(tiny.flags(place, "--no-dense", "--uneven", **given)) == 0
    [record] = tiny.records(tmp_path).values()
    assert any("as many KV groups" in warning for warning in record["warnings"])
    assert not any("o_proj" in name for name in record["shrunk"]["cut"]["own"])


@pytest.mark.parametrize("gain, taken", [(0.9, False), (0.8, True)])
def test_kv_groups_by_layer_must_be_clearly_better(gain, taken, tmp_path, monkeypatch):
    """The KL of neurons alone is more than a fifth higher, on windows of one text."""
    place = tiny.make(tmp_path)
    monkeypatch.setattr(page, "_pictures", lambda records: [])

    def kl(model, ids, mask, job, cut):
        assert all(count for _, count in cut.own)
        return 1.0 if not cut.own else 0.8 * gain if any("o_proj" in name for name, _ in cut.own) else 0.8
    monkeypatch.setattr(search, "measured", kl)
    flags = ("--to", "0.7", "--tries", "1", "--uneven", "--no-dense", "--evaluate", "none", "--nsamples", "4",
             "--seqlen", "16", "--calibration", str(place / "calibration.txt"), "--results", str(tmp_path / "runs"))
    assert shrink_command.main(["--model", str(place / "model"), *flags, "--no-progress"]) == 0
    [record] = tiny.records(tmp_path / "runs").values()
    assert sorted(row["kl"] for row in record["shrunk"]["tried"] if "kl" in row) == sorted([0.8 * gain, 0.8, 1.0])
    assert any("o_proj" in name for name in record["shrunk"]["cut"]["own"]) == taken
