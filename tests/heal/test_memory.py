"""Memory of healing on text: the plan against what a process really takes, what is chosen to fit, what is refused."""

import json
from dataclasses import replace

import numpy as np
import processes
import pytest
import tiny
import torch
from healing_on_text import T, argv, healed, pruned
from tiny import place, plain_pages  # noqa: F401
from transformers import LlamaConfig, LlamaForCausalLM

from oneshot import heal, models
from oneshot.data.training import TrainingText, Windows
from oneshot.heal.options import HealOptions
from oneshot.heal.text import memory, teacher
from oneshot.heal.text.student import Lesson
from oneshot.prune import loop
from oneshot.prune.patterns import parse
from oneshot.runtime import environment

pytestmark = pytest.mark.usefixtures("plain_pages")
CPU = torch.device("cpu")
LONG = 128  # tokens of a window


def larger(dtype):
    """4 million weights, half of them zero: more than what else a process takes and leaves while it trains."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                                         num_attention_heads=8)).to(dtype).requires_grad_(False).eval()
    for weight in models.all_weights(model):
        weight.set(weight.get() * parse("2:4").keep(weight.get().abs()))
    return model


def measured(folder, way, dtype, checkpointing):
    """In a process of its own: writes [the plans' bytes, those it took at its peak beside what it took before]."""
    module, options = heal.module(way), HealOptions(heal_data="given", heal_seqlen=LONG, heal_batch=4 * LONG)
    real, plans = memory.fit, []

    def fit(model, task, free):
        found = real(model, task, free)
        found = replace(found, checkpointing=True, bytes=int(sum(memory.parts_of(model, task)[::2]) + found.windows * (
            LONG * memory.per_token(model, True)))) if checkpointing else found
        plans.append(found.bytes)
        return found
    memory.fit = fit
    healed(way, folder / "first", dtype=dtype)  # now all that is needed is in memory
    plans.clear()
    environment.reset_peak_memory("cpu")
    before = environment.peak_memory("cpu")
    model = larger(dtype)
    module.check_model(model, module.Config(), heal.Run("cpu", options))
    draw = np.random.default_rng(0)
    train, held = (Windows(draw.integers(3, 512, n * LONG).astype(np.uint32), np.arange(n) * LONG, LONG)
                   for n in (8, 4))
    live = teacher.Live(larger(dtype), CPU)
    module.Heal(module.Config()).on_text(model, Lesson(TrainingText(train, held, {"warnings": []}), live,
                                                       folder, options, CPU))
    (folder / "bytes").write_text(json.dumps([plans, environment.peak_memory("cpu") - before]))


@pytest.mark.parametrize("way, dtype, checkpointing", [("full", torch.float32, False), ("full", torch.bfloat16, True),
                                                       ("lora", torch.float32, False), ("lora", torch.bfloat16, True)])
def test_the_plan_is_what_a_process_takes_up_to_a_factor_of_three(way, dtype, checkpointing, tmp_path):
    codes = processes.together(1, tmp_path / "said", measured, tmp_path, way, dtype, checkpointing)
    assert codes == [0], processes.said(tmp_path / "said")
    (early, late), took = json.loads((tmp_path / "bytes").read_text())
    print(early, late, took)
    assert took <= early <= 3 * took and abs(early - late) < 0.1 * early


OPTIONS = HealOptions(heal_data="given", heal_seqlen=T, heal_batch=4 * T)


def test_memory_prefers_many_windows_then_checkpointing_then_refuses():
    model, one = pruned(), T * memory.per_token(pruned(), False)

    def fit(windows_free, name="full", teacher=0):
        task = memory.Task(name, OPTIONS, CPU, memory.Held(1000, 1000), teacher)
        there = sum(p.nbytes for p in model.parameters())
        return memory.fit(model, task, int((memory.parts_of(model, task)[0] - there + windows_free * one)
                                           / memory.SPARE) + 1)
    assert [(fit(k).windows, fit(k).parts, fit(k).checkpointing) for k in (4, 2, 1)] == [
        (4, 1, False), (2, 2, False), (1, 4, False)]
    assert fit(0.9).checkpointing
    with pytest.raises(ValueError, match=r"^--heal full: .*; lower --heal-seqlen, or use --heal lora"):
        fit(0)
    with pytest.raises(ValueError, match=r"^--heal lora: .*; give --heal-cache.*smaller model"):
        fit(0, "lora", 8)


def test_a_model_that_is_yet_to_be_cut_takes_what_is_left_of_it():
    model, own = pruned(), memory.Held(1000, 1000, stored=8000)
    whole, half, none = (memory.fit(model, memory.Task("full", OPTIONS, CPU, own, left=left), None).bytes
                         for left in (1.0, 0.5, 0.0))
    assert whole > half > none and abs(whole - 2 * half + none) < 4


@pytest.mark.parametrize("way", ["full", "lora"])
def test_too_little_memory_is_said_before_anything_is_pruned(place, way, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setattr(loop, "prune_model", lambda *args, **kwargs: pytest.fail("pruned"))
    monkeypatch.setattr(environment, "free_memory", lambda device: 2**20)
    assert tiny.main(*argv(place, tmp_path / "out", heal=way)) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: --heal {way}: takes at least 0.1 GiB on cpu, where 0.0 are free for it; give "
                           "--heal-cache")
