"""Weights divided among processes (FSDP): steps as of one process, memory, what cannot be divided is refused."""

import families
import processes
import pytest
import torch
from torch import nn

from oneshot import models
from oneshot.heal import Run, full
from oneshot.heal.options import HealOptions
from oneshot.heal.text import memory, sharded
from oneshot.heal.train import Trainable
from oneshot.pipeline import checks
from oneshot.runtime import distributed
from oneshot.settings import flags

FAMILIES = (("llama", torch.float32), ("gpt2", torch.bfloat16), ("mixtral", torch.bfloat16))


def example(family, dtype):
    """(a model with zeros, what Trainable needs to know)."""
    model = families.tiny(family, dtype=dtype)
    _, block_list = models.blocks(model)
    for p in block_list.parameters():
        if p.ndim > 1:
            p.data[torch.rand(p.shape, generator=torch.Generator().manual_seed(p.numel())) < 0.5] = 0
    leave = {f"{block.number}.{name}" for block in models.walk(model) for name in models.untouched(block.module)}
    return model, {name: p.dtype for name, p in block_list.named_parameters()}, leave


def step(model, trainable, optimizer):
    """One update on the windows of all processes."""
    ids = torch.randint(3, families.VOCAB, (6, 12), generator=torch.Generator().manual_seed(0))
    with distributed.joined():
        own = ids[list(distributed.part(6))]
    optimizer.zero_grad()
    model(input_ids=own, labels=own, use_cache=False).loss.backward()
    trainable.mask_gradients()
    optimizer.step()


def adam(trainable):
    """Adam whose steps are about as large as the gradients, and so do not hang on the last bits of small ones."""
    return sharded.Adam(trainable.groups(0.1), weight_decay=0.0, eps=0.1)


def values(trainable):
    return {name: sharded.whole(p).clone() for name, p in trainable.parameters.items()}


def pieces(folder):
    """In each of three processes: two steps, the second by an optimiser that was given the state of the first."""
    distributed.start()
    for family, dtype in FAMILIES:
        model, stored, leave = example(family, dtype)
        with sharded.Sharded(model, torch.device("cpu"), stored, leave) as trainable:
            start, first = trainable.snapshot(), adam(trainable)
            rates = [group["lr"] for group in first.param_groups]
            step(trainable.model, trainable, first)
            second = adam(trainable)
            second.load_state_dict(first.state_dict())
            step(trainable.model, trainable, second)
            there = values(trainable)
            trainable.restore(start)
            back, again = values(trainable), None
            if family == "llama":
                trainable.model.train().gradient_checkpointing_enable()
                third = adam(trainable)
                for _ in range(2):
                    step(trainable.model, trainable, third)
                again = values(trainable)
            for name, p in trainable.parameters.items():
                sharded.fill(p, there[name])
            trainable.round()
            rounded = values(trainable)
        end = {name: p.data for name, p in models.blocks(model)[1].named_parameters()}
        torch.save((rates, there, back, rounded, end, again), folder / f"{family}-{distributed.rank()}.pt")
    distributed.end()


def test_three_processes_step_as_one(tmp_path):
    """Uneven parts, 16 bits, Conv1D, experts in one tensor: rates, steps, what is kept and what comes back."""
    assert processes.together(3, tmp_path, pieces, tmp_path) == [0, 0, 0], processes.said(tmp_path)[-2000:]
    for family, dtype in FAMILIES:
        model, stored, leave = example(family, dtype)
        start = {name: p.data.clone() for name, p in models.blocks(model)[1].named_parameters()}
        every = [torch.load(tmp_path / f"{family}-{rank}.pt") for rank in range(3)]
        with models.resident(model, "cpu", dtype=torch.float32), Trainable(
                models.blocks(model)[1], stored, leave) as trainable:
            optimizer = adam(trainable)
            assert every[0][0] == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-6)
            for _ in range(2):
                step(model, trainable, optimizer)
            want = values(trainable)
        _, there, back, rounded, end, again = every[0]
        assert again is None or all(torch.equal(again[name], there[name]) for name in there)
        assert there.keys() == want.keys() and end.keys() == start.keys()
        for name, t in want.items():
            assert not torch.equal(t, start[name].float()), name
            torch.testing.assert_close(there[name], t, rtol=1e-4, atol=1e-5)
            assert torch.equal(back[name], start[name].float())
            assert torch.equal(rounded[name], there[name].to(dtype).float())
            assert torch.equal(end[name], there[name].to(dtype)) and end[name].dtype == dtype
            assert t.ndim < 2 or torch.equal(end[name] == 0, start[name] == 0)
        assert all(torch.equal(end[name], start[name]) for name in end.keys() - want.keys())
        for other in every[1:]:
            assert all(torch.equal(end[name], other[4][name]) for name in end)


def test_models_that_cannot_be_sharded(monkeypatch):
    single, shared, run = families.tiny("llama"), families.tiny("zamba2"), Run("cpu", HealOptions())
    models.blocks(single)[1][0].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    for model in (single, shared):
        full.check_model(model, None, run)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    full.check_model(families.tiny("mixtral"), None, run)
    for model, why in ((single, "experts are linears"), (shared, "share weights")):
        with pytest.raises(ValueError, match=f"^ACCELERATE_USE_FSDP: is set, and --model cannot .*{why}"):
            full.check_model(model, None, run)


def test_what_a_process_takes_when_sharded(monkeypatch):
    model, _, _ = example("llama", torch.float32)
    cfg = flags.build({"method": "wanda", "pattern": "2:4", "heal": "full", "heal_data": "c4", "heal_seqlen": 16,
                       "heal_batch": 64})
    task = memory.Task("full", cfg, torch.device("cuda"), memory.Held(1000, 1000))
    trained, total = 1000, sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in models.blocks(model)[1][0].parameters())

    def beside_activations():
        fit = memory.fit(model, task, 2**50)
        return fit.bytes - fit.windows * 16 * memory.per_token(model, fit.checkpointing)
    assert beside_activations() == 4 * total + 13 * trained
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert beside_activations() == 4 * total + 17 * trained
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert beside_activations() == (4 * total + 13 * trained) // 2 + 8 * block + 2 * trained


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "on"])
def test_what_cannot_be_sharded_is_refused(word, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", word)
    for name, why in (("full", "needs several processes"), ("lora", "is not divided")):
        with pytest.raises(ValueError, match=f"^ACCELERATE_USE_FSDP: is set, and --heal {name} {why}"):
            checks.check_text(flags.build({"method": "wanda", "pattern": "2:4", "heal": name, "heal_data": "c4"}))
