"""Flags of healing on text: how each is seen."""

import functools

from oneshot.data import training
from oneshot.heal.text import student, teacher
from wires import CHECKS, differ, text_healing, wire
from wires.parts import reaches


@wire("heal_data", "heal_tokens", "heal_seqlen", "heal_batch")
def _(b):
    info = b.record(**text_healing(b))["heal"]["full"]
    assert info["text"]["sources"][0]["source"].startswith("calibration.txt") and info["text"]["tokens"] == 208
    assert info["steps"] <= 6 and info["tokens"] == 32 * info["steps"]
    changed = {"heal_data": b.place / "evaluation.txt", "heal_tokens": "300", "heal_batch": 64}
    other = b.record(**text_healing(b, **changed))["heal"]["full"]
    assert other["text"]["sources"][0]["source"].startswith("evaluation.txt") and other["text"]["tokens"] == 304
    assert other["tokens"] == 64 * other["steps"]
    with b.seen(training, "prepare", lambda args, kwargs, text: text.train.seqlen) as found:
        b.record(**text_healing(b, heal_seqlen=24))
    assert found == [24]


@wire("heal_held_out")
def _(b):
    with b.seen(training, "prepare", lambda args, kwargs, text: (bytes(text.train.ids), bytes(text.held.ids))) as found:
        b.record(**text_healing(b))
        b.record(**text_healing(b, heal_held_out=b.place / "evaluation.txt"))
    (_, held), (_, other) = found
    assert held != other


@wire("heal_loss")
def _(b):
    seen = []
    for name in ("next", "kl", "hidden"):
        with b.seen(student.losses, {"next": "next_token"}.get(name, name), lambda *_: 1) as found:
            b.record(**text_healing(b, heal_loss=name))
        seen.append(len(found))
    assert all(seen)


@wire("heal_temperature")
def _(b):
    assert differ(b.weights(**text_healing(b)), b.weights(**text_healing(b, heal_temperature=3.0)))
    for more in ({"heal_top_k": 5}, {"heal_cache": b.tmp / "cache"}):
        with b.seen(student.losses.TopK, "of", lambda args, *_: args[2]) as found:
            b.record(**text_healing(b, heal_temperature=3.0, **more))
        assert set(found) == {3.0}


@wire("heal_top_k")
def _(b):
    with b.seen(student.losses.TopK, "of", lambda args, kwargs, top: top.ids.shape[-1]) as found:
        b.record(**text_healing(b, heal_top_k=5))
    assert set(found) == {5}


@wire("heal_cache")
def _(b):
    """The second run reads what the first has written, and loads no dense model to heal."""
    for loads in (1, 0):
        with b.seen(teacher.Live, "__post_init__", lambda *_: 1) as found:
            b.record(**text_healing(b, heal_cache=b.tmp / "cache"))
        assert len(found) == loads
    assert (b.tmp / "cache" / "train" / "log_p.npy").is_file()


@wire("heal_teacher")
def _(b):
    """Another model as teacher (here: the pruned one itself) teaches something else."""
    b.record(method="magnitude", pattern="0.5", save=b.tmp / "other")
    assert differ(b.weights(**text_healing(b)), b.weights(**text_healing(b, heal_teacher=b.tmp / "other")))


def of_part(b, name, value, heal):
    reaches(b, name, value, text_healing(b, heal=heal))


CHECKS["full.lr"] = functools.partial(of_part, name="full.lr", value=0.001, heal="full")
for field, value in {"r": 4, "alpha": 8.0, "dropout": 0.5, "targets": "q_proj", "lr": 0.0001}.items():
    CHECKS[f"lora.{field}"] = functools.partial(of_part, name=f"lora.{field}", value=value, heal="lora")


@wire("lora.adapter")
def _(b):
    b.record(**text_healing(b, method="magnitude", pattern="dense", heal="lora", **{"lora.adapter": b.tmp / "adapter"}))
    assert (b.tmp / "adapter" / "adapter_model.safetensors").is_file()
