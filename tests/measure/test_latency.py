"""Latency: what is timed, that models take turns, and what a speedup is made of; no absolute times."""

import contextlib
from types import SimpleNamespace

import families
import pytest
import torch

from oneshot.measure import latency


def test_models_take_turns_and_ratios_are_of_one_round(monkeypatch):
    order, values = [], iter(range(1, 1000))

    def one(model, kind, device, graph):
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
        assert latency.one(model, kind, "cpu", False) > 0
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


# ---------------------------------------------------------------- graphs of a GPU, captured here by running them

def played(work):
    """What `graphed` gives, without a GPU: the same work, done as often before."""
    for _ in range(latency.WARM):
        work()
    return work


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3", "gemma2"])
def test_replays_decode_what_the_model_does_with_its_own_cache(name, monkeypatch):
    """A static cache, whose place moves on by itself, and a token that each replay writes where the next one reads."""
    model, tokens = families.tiny(name), []
    ids = latency.prompt(model, "decode2", "cpu")[:, :8]
    monkeypatch.setattr(latency, "graphed", lambda work: played(work))
    handle = model.register_forward_pre_hook(
        lambda m, a, k: tokens.append(k["input_ids"].clone()), with_kwargs=True)
    replay = latency.captured(model, ids)
    for _ in range(3):
        replay()
    handle.remove()
    wanted = ids
    for _ in range(latency.WARM + 3):
        wanted = torch.cat([wanted, model(input_ids=wanted).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(tokens[1:], 1), wanted[:, ids.shape[1]:])
    assert len(tokens) == 1 + latency.WARM + 3


@pytest.mark.parametrize("allowed", [True, False])
def test_on_a_gpu_all_models_are_timed_by_graphs_or_none(allowed, monkeypatch):
    model, dense = families.tiny("llama"), families.tiny("llama")
    asked, replays = [], []

    def graphed(work):
        if not allowed and len(asked) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        asked.append(work)
        return lambda: replays.append(work())
    monkeypatch.setattr(latency, "graphed", graphed)
    monkeypatch.setattr(latency, "on_gpu", lambda device: True)
    monkeypatch.setattr(latency, "synchronize", lambda device: None)
    rows = latency.compare({"model": model, "dense": dense}, "cpu", rounds=1)
    assert [row["graph"] for row in rows.values()] == [allowed] * 2
    assert len(replays) == (2 * 2 * 2 * latency.STEPS if allowed else 0)  # rounds, models, kinds
    subject = SimpleNamespace(model=model, dense=dense, cfg=SimpleNamespace(row="pruned", device="cpu"))
    asked.clear()
    said = latency.measure(subject).warnings
    assert bool(said) is not allowed and all("without CUDA graphs" in line for line in said)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_does_the_work_again():
    total = torch.zeros((), device="cuda")
    replay = latency.graphed(lambda: total.add_(1))
    torch.cuda.synchronize()
    assert total.item() == latency.WARM
    replay()
    torch.cuda.synchronize()
    assert total.item() == latency.WARM + 1
