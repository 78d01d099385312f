"""The device's table: exact where parts add up, says where they do not, measured once, refused where it is none."""

import json

import families
import pytest
import tiny
import torch
from oneshot_kernels import decoder_of
from oneshot_kernels.cpu import build
from transformers import AutoConfig, AutoModelForCausalLM
from variants import needs_compiler

from oneshot.measure import latency
from oneshot.models import blocks, config_of
from oneshot.pipeline import device_table, forms, latency_command
from oneshot.runtime import environment

real = latency.one


def additive(model, kind, device, graph=False, twist=0.0):
    """Seconds of a model by its shapes: 5 ms and, for each block, 1 ms a KV group and 1/16 ms a neuron."""
    config, L = config_of(model), len(blocks(model)[1])
    k, w = config.num_key_value_heads, config.intermediate_size / 16
    return (5 + L * (k + w + twist * k * w) + twist * L**2) / 1000


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A model whose times are made up, and a cache of its own for tables; the kernels that are compiled stay."""
    compiled = build.cache_folder()
    compiled.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(compiled)
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "one", additive)
    monkeypatch.setattr(device_table, "LARGE", 0)
    monkeypatch.setattr(forms, "runnable", lambda device: [])  # nothing is compiled
    return high(6)


def high(blocks_in_all):
    """A random Mistral of so many blocks."""
    config = AutoConfig.for_model("mistral", **families.COMMON | {"num_hidden_layers": blocks_in_all,
                                                                  "sliding_window": None})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_gpu_all_variants_are_timed_by_graphs_or_none_with_a_warning(model, allowed, monkeypatch):
    seen, asked = set(), []
    monkeypatch.setattr(latency, "on_gpu", lambda device: True)
    monkeypatch.setattr(latency, "captured", lambda made, ids: asked.append(made) or allowed or len(asked) < 3)
    monkeypatch.setattr(latency, "one", lambda made, kind, device, graph: seen.add(graph) or additive(made, kind, ""))
    found = device_table.table(model, "cpu", rounds=1, progress=False)
    assert seen == {allowed} and found["graph"] is allowed
    assert device_table.warnings(found) == ([] if allowed else [latency.NO_GRAPHS])


def test_parts_that_add_up_are_foretold_exactly(model):
    found = device_table.table(model, "cpu", rounds=1, progress=False)
    own = found["parts"]["decode1"]
    assert own["rest"] == pytest.approx(5) and own["block"] == pytest.approx(2 + 3)
    assert own["saved"] == {"KV groups": {"1": pytest.approx(1)}, "query heads": {"1": pytest.approx(0)},
                            "neurons": {"36": pytest.approx(0.75), "24": pytest.approx(1.5), "12": pytest.approx(2.25)}}
    assert not device_table.warnings(found) and set(found["checks"]) == {"whole model", "both kinds"}
    for blocks_left, k, w in ((6, 2, 48), (3, 1, 24), (5, 2, 30), (1, 1, 4)):
        want = 5 + blocks_left * (k + w / 16)
        got = device_table.foretell(found, "decode1", blocks_left, {"KV groups": k, "neurons": w})
        assert got == pytest.approx(want)


def test_parts_that_do_not_add_up_are_a_warning(model, monkeypatch):
    monkeypatch.setattr(latency, "one", lambda *args: additive(*args, twist=2.0))
    told = device_table.warnings(device_table.table(high(12), "cpu", rounds=1, progress=False))
    assert any(line.startswith("whole model, decode1: the parts add up to") for line in told)
    assert any(line.startswith("both kinds") for line in told)


def test_it_is_measured_once_for_the_same_shapes_and_again_for_others(model, monkeypatch):
    first, calls = device_table.table(model, "cpu", rounds=1, progress=False), []
    monkeypatch.setattr(device_table, "measured", lambda *args: calls.append(args) or {"other": 1})
    assert device_table.table(model, "cpu", rounds=1, progress=False) == first and not calls
    assert device_table.table(high(5), "cpu", rounds=1, progress=False) == {"other": 1} and len(calls) == 1


def test_small_models_are_larger_than_a_cache(model, monkeypatch):
    """As many blocks as have LARGE bytes, at most half of them; at least FEW, or all."""
    L, one = len(blocks(model)[1]), sum(p.numel() * 4 for p in blocks(model)[1][0].parameters())
    for few, large, want in ((4, 0, 4), (9, 0, L), (1, 2 * one, 2), (1, 2 * one + 1, 3), (2, 100 * one, L // 2)):
        monkeypatch.setattr(device_table, "FEW", few)
        monkeypatch.setattr(device_table, "LARGE", large)
        assert device_table.height(model) == want


def test_one_that_was_measured_on_a_busy_machine_says_so_and_is_measured_again(model, monkeypatch):
    monkeypatch.setattr(environment, "others", lambda: 1.26)
    busy = device_table.table(model, "cpu", rounds=1, progress=False)
    assert "measured while other processes took 1.3 cores" in device_table.warnings(busy)[-1]
    monkeypatch.setattr(environment, "others", lambda: 0.2)
    idle = device_table.table(model, "cpu", rounds=1, progress=False)
    assert idle["busy"] == 0.2 and not device_table.warnings(idle)
    monkeypatch.setattr(latency, "one", None)
    assert device_table.table(model, "cpu", rounds=1, progress=False) == idle


def test_other_kernels_are_measured_again(model, tmp_path, monkeypatch):
    before = device_table.key(model, "cpu", 1)
    (tmp_path / "kernel.cpp").write_text("// another one")
    with monkeypatch.context() as patch:
        patch.setattr(device_table.oneshot_kernels, "__file__", str(tmp_path / "__init__.py"))
        device_table.kernels.cache_clear()
        other = device_table.key(model, "cpu", 1)
    device_table.kernels.cache_clear()
    assert other != before == device_table.key(model, "cpu", 1)


BARE = {kind: {"rest": 1.0, "block": 1.0} for kind in ("prefill", "decode1", "decode8")}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": {"prefill": {"rest": "x"}}, "blocks": 2}',
                                  json.dumps({"blocks": 2, "parts": BARE}),
                                  json.dumps({"blocks": 2, "parts": BARE, "units": {"neurons": 8}}),
                                  json.dumps({"blocks": 2, "parts": BARE, "units": {}, "family": "llama"})])
def test_a_file_that_is_no_table_is_refused(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"^--device .*table\.json: is no table"):
        device_table.read(tmp_path / "table.json")
    with pytest.raises(ValueError, match="FileNotFoundError"):
        device_table.read(tmp_path / "nowhere.json")


def test_the_command_measures_prints_and_writes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "STEPS", 2)
    monkeypatch.setattr(forms, "runnable", lambda device: [])
    place = tiny.make(tmp_path / "place")
    out = tmp_path / "table.json"
    words = [str(place / "model"), "--device", "cpu", "--rounds", "1", "--no-progress", "--out", str(out)]
    assert latency_command.main(words) == 0
    shown = capfd.readouterr().out
    assert all(kind in shown for kind in latency.KINDS) and "foretold" in shown and "with 1 KV groups" in shown
    read = device_table.read(out)
    assert read == json.loads(out.read_text()) and read["blocks"] == tiny.BLOCKS and read["dtype"] == "float32"
    assert all(row["measured"] > 0 for row in read["checks"]["whole model"].values())
    assert latency_command.main([str(tmp_path / "nowhere")]) == 2
    assert latency_command.main([*words[:3], "--rounds", "0"]) == 2 and "--rounds 0" in capfd.readouterr().err


def test_a_damaged_table_in_the_cache_is_measured_again(model, tmp_path):
    found = device_table.table(model, "cpu", rounds=1, progress=False)
    [file] = (tmp_path / "cache").rglob("*.json")
    for damage in (file.read_text()[:50], file.read_text().replace("5.0", "6.0", 1)):
        file.write_text(damage)
        assert device_table.table(model, "cpu", rounds=1, progress=False)["parts"] == found["parts"]


def test_out_that_cannot_be_written_is_one_line(model, tmp_path, capsys):
    tiny.save_model(tmp_path / "saved")
    for out in (tmp_path, tmp_path / "saved" / "config.json" / "t.json"):
        assert latency_command.main([str(tmp_path / "saved"), "--rounds", "1", "--no-progress", "--out", str(out)]) == 2
        assert f"--out {out}: " in capsys.readouterr().err


def test_forms_with_a_kernel_are_timed_and_others_gain_nothing(model, monkeypatch):
    """A block in a form takes half a ms less; what a form gains scales with what is left of a block."""
    def timed(made, kind, device, graph):
        stored = sum(type(m).__name__ in ("IntegerLinear", "Sparse24Linear") for m in made.modules())
        return additive(made, kind, device) - stored / 7 / 2000
    monkeypatch.setattr(latency, "one", timed)
    monkeypatch.setattr(forms, "runnable", lambda device: ["int8"])
    found = device_table.table(model, "cpu", rounds=1, progress=False)
    assert found["parts"]["decode1"]["forms"] == {"int8": pytest.approx(0.5)}
    told = [device_table.foretell(found, "decode1", 4, {}, forms_) for forms_ in ([], ["int8"] * 3, ["2:4"] * 3)]
    assert told == [pytest.approx(25), pytest.approx(23.5), pytest.approx(25)]
    narrow = device_table.foretell(found, "decode1", 4, {"KV groups": 1}, ["int8"])
    assert narrow == pytest.approx(5 + 4 * 4 - 0.5 * 4 / 5)
    assert "in int8" in latency_command.shown(found)
    monkeypatch.setattr(forms, "runnable", lambda device: [])
    assert device_table.table(model, "cpu", rounds=1, progress=False)["parts"]["decode1"]["forms"] == {}


@needs_compiler
def test_a_token_is_one_compiled_call_where_the_family_allows_it(model, monkeypatch):
    """For the small models as for the whole one; the model that was given decodes as before."""
    seen = []

    def one(made, kind, device, graph):
        before = getattr(decoder_of(made), "tokens", 0)
        real(made, kind, device, graph)
        seen.append((kind, getattr(decoder_of(made), "tokens", 0) - before))
        return additive(made, kind, device)
    monkeypatch.setattr(latency, "one", one)
    monkeypatch.setattr(latency, "STEPS", 2)
    monkeypatch.setattr(forms, "runnable", lambda device: ["int8"])
    found = device_table.table(model, "cpu", rounds=1, progress=False)
    assert found["decoding"] == "one compiled call" and len(seen) > 20
    assert set(seen) == {("decode1", 2), ("decode8", 0), ("prefill", 0)}
    assert decoder_of(model) is None and "decodes_fast" not in vars(type(model))
    assert "decode1 by one compiled call" in latency_command.shown(found)
    seen.clear()
    other = families.tiny("phi3")
    how = device_table.table(other, "cpu", rounds=1, progress=False)["decoding"]
    assert how.startswith("transformers (phi3 is not among")
    assert not any(tokens for _, tokens in seen)
    monkeypatch.setattr(forms, "runnable", lambda device: [])
    assert forms.decoding(model, "cpu") == (model, "transformers")


@needs_compiler
def test_what_is_timed_computes_what_the_model_computes():
    own = high(2)
    made, how = forms.decoding(own, "cpu")
    ids = torch.arange(9)[None] % 60 + 2
    with torch.no_grad():
        out = made(input_ids=ids[:, :8], use_cache=True)
        got = made(input_ids=ids[:, 8:], past_key_values=out.past_key_values, use_cache=True).logits
        want = own(input_ids=ids).logits[:, -1:]
    assert how == "one compiled call" and decoder_of(made).tokens > 0
    assert (got - want).norm() <= 1e-4 * want.norm()
