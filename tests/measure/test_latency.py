"""Latency: what is timed, that models take turns, and what a speedup is made of; no absolute times."""

import contextlib

import families
import pytest
import torch

from oneshot.measure import latency


def test_models_take_turns_and_ratios_are_of_one_round(monkeypatch):
    order, values = [], iter(range(1, 1000))

    def one(model, kind, device):
        order.append((model, kind))
        return float(next(values))
    monkeypatch.setattr(latency, "one", one)
    monkeypatch.setattr(latency, "size", lambda model: {})
    monkeypatch.setattr(latency, "parts", lambda model, device: {})
    monkeypatch.setattr(latency.models, "resident", lambda model, device: contextlib.nullcontext())
    rows = latency.compare({"model": "a", "dense": "b"}, "cpu", rounds=3)
    assert order == [(m, kind) for _ in range(4) for m in "ab" for kind in latency.KINDS]
    a, b = ([6 * n + k + 1 for n in (1, 2, 3)] for k in (0, 3))  # the first round warms up
    assert rows["model"]["prefill"]["median"] == 1000 * a[1]
    assert rows["model"]["prefill"]["speedup"] == sorted(y / x for x, y in zip(a, b, strict=True))[1]
    assert "speedup" not in rows["dense"]["prefill"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon"])
def test_every_kind_runs_and_decoding_uses_the_cache(name, monkeypatch):
    model, seen, real = families.tiny(name), [], latency.timed

    def timed(work, device):
        seen.append(device)
        return real(work, device)
    monkeypatch.setattr(latency, "timed", timed)
    lengths = []
    handle = model.register_forward_pre_hook(lambda m, a, k: lengths.append(tuple(k["input_ids"].shape)),
                                             with_kwargs=True)
    for kind in latency.KINDS:
        assert latency.one(model, kind, "cpu") > 0
    handle.remove()
    assert lengths.count((1, 1)) == latency.STEPS == lengths.count((latency.BATCH, 1))
    assert len(seen) == 1 + 2 * latency.STEPS


def test_shares_of_the_parts_add_up():
    torch.manual_seed(0)
    small, large = families.tiny("llama"), families.tiny("llama")
    rows = latency.compare({"model": small, "dense": large}, "cpu", rounds=1)
    for row in rows.values():
        assert sum(row["parts"].values()) == pytest.approx(1) and all(0 < share < 1 for share in row["parts"].values())
        assert row["parameters"] == small.num_parameters()
    assert rows["model"]["multiply_adds"] < rows["model"]["parameters"] * 2
