"""Healing on text in the tests: a pruned random model, a lesson of random windows, the healed model."""

import families
import numpy as np
import tiny
import torch
from families import VOCAB

from oneshot import models
from oneshot.data.training import TrainingText, Windows
from oneshot.heal import full, lora
from oneshot.heal.options import HealOptions
from oneshot.heal.text import teacher
from oneshot.heal.text.student import Lesson
from oneshot.prune.patterns import parse

T = 16
SMALL = {"method": "wanda", "pattern": "2:4", "heal_tokens": "600", "heal_seqlen": 16, "heal_batch": 32}
WAYS = {"full": (full, {"lr": 0.01}), "lora": (lora, {"lr": 0.005, "r": 4})}


def pruned(name="llama", **kwargs):
    """A tiny model with 2:4 zeros."""
    model = families.tiny(name, **kwargs)
    for weight in models.all_weights(model):
        weight.set(weight.get() * parse("2:4").keep(weight.get().abs()))
    return model.requires_grad_(False)


def windows(n, seed=0, ids=None):
    """n windows of random documents, some of which share a window."""
    gen = np.random.default_rng(seed)
    ids = gen.integers(3, VOCAB, n * T).astype(np.uint32) if ids is None else ids
    return Windows(ids, np.sort(gen.choice(n * T, n, replace=False)).astype(np.int64), T)


def lesson(work, train=None, held=None, dense="llama", **options):
    """A lesson towards the dense model; by default 20 steps of two windows."""
    options = HealOptions(**{"heal_data": "given", "heal_seqlen": T, "heal_batch": 2 * T} | options)
    live = teacher.Live(families.tiny(dense).requires_grad_(False), torch.device("cpu")) if dense else None
    work.mkdir(exist_ok=True)
    found = TrainingText(train or windows(40, 1), held or windows(8, 2), {"warnings": []})
    return Lesson(found, live, work, options, torch.device("cpu"))


def healed(way, place, name="llama", dtype=torch.float32, cfg=None, **more):
    """(the healed model, what healing said)."""
    module, own = WAYS[way]
    model = pruned(name, dtype=dtype)
    said = module.Heal(module.Config(**own | (cfg or {}))).on_text(model, lesson(place, dense=name, **more))
    return model, said


def argv(place, out, *more, **changed):
    """The command line of a small run on what `tiny.make` wrote, into the folder `out`."""
    given = SMALL | {"heal": "full", "heal_data": place / "calibration.txt", "save": out,
                     "results": out.with_name("runs")} | changed
    return tiny.flags(place, "--no-dense", *more, **given)


class Killed(BaseException):
    pass


def families_text(n):
    """Text that the pruned model itself likes: its likeliest token after each token."""
    ids, model = torch.randint(3, VOCAB, (n, 1)), pruned()
    with torch.no_grad():
        for _ in range(T - 1):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids.flatten().numpy().astype(np.uint32)
