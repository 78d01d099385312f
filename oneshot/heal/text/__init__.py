"""Heal on text: train the kept weights on a text by transformers' Trainer, for the methods `full` and `lora`.

Trainer does the batches, Adam, the schedule, gradient accumulation and checkpointing, checkpoints, resuming and
torchrun. Ours are the loss, the zeros that stay zero, and the learning rate:

    rate      where none is given, the first steps are done at a few (rates.py), and the best one begins
    look      the loss on held-out windows, LOOKS times in all
    attempt   training at one learning rate. Where a look is worse than before healing ("harm"), or the last PATIENCE
              looks gained nothing ("no gain"), the rate is too high, or the text does harm: the attempt ends, and
              another begins from the best state, with half the rate and the remaining windows. That is the end if an
              attempt gained nothing at all, after FALLS of them, or where few windows remain.

The state with the best look is kept, rounded to the stored dtype; where that is no better than before, the weights are
left as they were. A checkpoint is saved at every look. A run that was killed continues from the last one and ends with
the same bits (on the same device, with as many threads).

    WORK/text/                  the packed text (data/training.py)
    WORK/attempts.json          the rates that were tried, the attempts (learning rate, first window, state they began
                                with, looks), and the hashes of their states
    WORK/attempt-N.safetensors  the best state of an attempt, if it was the best so far
    WORK/attempt-N/             Trainer's checkpoints, each with the hashes of its files; a damaged one is not used. The
                                last and the best stay until the next is whole (`Seals`)

The files here: losses, rates, student (the model as Trainer sees it), teacher (the dense model's predictions), memory
(how a step is made to fit), sharded (FSDP2), trainer (transformers' Trainer).
"""

import contextlib
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Subset

from ...runtime import distributed, sealed
from ..train import FALL, WARM_UP
from . import memory, rates, sharded
from .student import Lesson, Student, Trained, counted
from .teacher import Live

LOOKS = 10  # evaluations of the held-out loss, and checkpoints
PATIENCE = 3  # looks in a row without gain after which training ends
FALLS = 6  # how often the learning rate is halved at most
HELD = 8192  # tokens held out
ATTEMPTS = "attempts.json"
WEIGHTS, SEAL = "model.safetensors", "sealed.json"  # in Trainer's checkpoints
CLIP = 1.0  # norm of the gradient, at most


@dataclass
class Attempt:
    """Training at one learning rate. begins: number of its first window. state: file it starts from, or None.

    looks: [step, held-out loss] each. log: [step, loss in training] each. steps: done. seconds: they took, looks
    included, in all processes that did them one after the other. kept: file of its best state, if that was the best so
    far. ended: why it ended: "harm", "no gain" or "done"; None while it has not.
    """

    lr: float
    begins: int
    state: str | None = None
    looks: list[list[float]] = field(default_factory=list)
    log: list[list[float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    kept: str | None = None
    ended: str | None = None


def heal(model: nn.Module, lesson: Lesson, name: str, trained: Trained, given: tuple[float, ...],
         held: memory.Held) -> dict:
    """Train `model`, resident on the device in float32, and return plain values for the record.

    name: of the method. trained: the weights and how they are rounded, see `Trained`. given: the first learning rate,
    or several, from high to low, to choose among. held: what takes memory beside the model.
    """
    live = lesson.teacher.bytes if isinstance(lesson.teacher, Live) else 0
    free = memory.least_free(lesson.device)  # the dense model lies there already
    fit = memory.fit(model, memory.Task(name, lesson.options, lesson.device, held, live), free and free + live)
    with same_random():
        return Course(model, lesson, trained, given, fit).run()


@contextlib.contextmanager
def same_random() -> Iterator[None]:
    """Leave Python's, numpy's and torch's global random state, which Trainer seeds, as it was."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


class Course:
    """The attempts of one healing, see above."""

    def __init__(self, model: nn.Module, lesson: Lesson, trained: Trained, given: tuple[float, ...],
                 fit: memory.Fit) -> None:
        self.model, self.lesson, self.trained, self.given, self.fit = model, lesson, trained, given, fit
        self.windows, self.start = lesson.windows, trained.snapshot()
        if self.fit.checkpointing:
            model.gradient_checkpointing_enable()
        self.file = lesson.work / ATTEMPTS
        kept = distributed.share(sealed.kept(self.file))
        self.before: float | None = kept.get("before")
        self.tried: list[list[float]] = kept.get("tried", [])  # [rate, held-out loss] each
        self.trying: float = kept.get("trying", 0.0)  # seconds that the look before healing and the rates took
        self.attempts = [Attempt(**row) for row in kept.get("attempts", [])]
        self.earlier = self.trying + sum(a.seconds for a in self.attempts)  # seconds of earlier processes

    def run(self) -> dict:
        """All attempts, then the best state, rounded; returns what `heal` does."""
        if self.before is None:
            with self.counting():
                self.before = self.trainer(Attempt(0.0, 0)).evaluate()["eval_loss"]
            self.note()
        self.attempts = self.attempts or [Attempt(rates.best(self), 0)]
        while True:
            attempt = self.attempts[-1]
            if attempt.ended is None:
                self.train(attempt)
            left = (len(self.lesson.text.train) - attempt.begins) // self.windows - attempt.steps
            over = attempt.ended == "done" or (attempt.ended == "no gain" and attempt.kept is None)
            if over or len(self.attempts) > FALLS or left < LOOKS:
                break
            begins = attempt.begins + attempt.steps * self.windows
            self.attempts.append(Attempt(attempt.lr / FALL, begins, self.best()[1]))
            self.note()
        return self.ended()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Add the seconds spent within the context to those before training."""
        began = time.perf_counter()
        yield
        self.trying += time.perf_counter() - began

    def train(self, attempt: Attempt) -> None:
        """Do one attempt, from its last checkpoint if there is one."""
        self.set(attempt.state)
        number = self.attempts.index(attempt)
        last = distributed.share(last_checkpoint(self.folder(number)))
        if last:
            attempt.seconds = sealed.read(last / SEAL)[0].get("seconds", 0.0)
            self.earlier += attempt.seconds
        trainer, began = self.trainer(attempt), time.perf_counter() - attempt.seconds
        past = json.loads((last / "trainer_state.json").read_text())["log_history"] if last else []
        done = int(last.name.rpartition("-")[2]) if last else 0
        over = verdict([row["eval_loss"] for row in past if "eval_loss" in row], self.before)
        if over is None and done < trainer.args.max_steps:  # else Trainer would do one more step
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            past = trainer.state.log_history
        attempt.seconds = time.perf_counter() - began
        looks = [[row["step"], row["eval_loss"]] for row in past if "eval_loss" in row]
        attempt.looks, attempt.steps = looks, looks[-1][0]
        attempt.log = [[row["step"], row["loss"]] for row in past if "loss" in row]
        step, loss = min(looks, key=lambda look: look[1])
        distributed.wait()
        if loss < self.best()[0]:
            attempt.kept = f"{self.folder(number).name}.safetensors"
            if not distributed.rank():
                shutil.copyfile(self.folder(number) / f"checkpoint-{step}" / WEIGHTS, self.lesson.work / attempt.kept)
        attempt.ended = verdict([loss for _, loss in looks], self.before) or "done"
        self.note()
        if not distributed.rank():
            shutil.rmtree(self.folder(number))
        distributed.wait()

    def ended(self) -> dict:
        """Restore the best state, round it, and say what was done."""
        loss, state = self.best()
        self.set(state)
        if self.fit.checkpointing:
            self.model.gradient_checkpointing_disable()
        warnings = list(self.lesson.text.about["warnings"])
        last = self.attempts[-1]
        if state is not None:
            self.trained.round()
            loss = self.trainer(Attempt(0.0, 0)).evaluate()["eval_loss"]
        if state is None or not loss <= self.before:
            self.trained.restore(self.start)
            why = f"no gain on the held-out text at learning rates down to {last.lr:g}" if state is None else \
                "rounding to the stored dtype cost more than was gained"
            warnings.append(f"{why}: left as it was")
            loss = self.before
        elif last.lr < self.attempts[0].lr:
            warnings.append(f"learning rate lowered from {self.attempts[0].lr:g} to {last.lr:g}")
        n = len(self.lesson.text.train)  # windows: fewer than one step takes, in a tiny text
        tokens = sum(min(a.steps * self.windows, n - a.begins) for a in self.attempts) * self.lesson.options.heal_seqlen
        about = {key: value for key, value in self.lesson.text.about.items() if key != "warnings"}
        held = self.lesson.text.held
        share = float(sum(counted(held[i]["labels"]) for i in range(len(held)))) / len(held)
        attempts = [asdict(a) | {"looks": [[step, value / share] for step, value in a.looks]} for a in self.attempts]
        seconds = sum(attempt.pop("seconds") for attempt in attempts)  # 0 where an earlier version did them
        return {"tokens": tokens, "steps": sum(a.steps for a in self.attempts), "lr": last.lr, "earlier": self.earlier,
                "products": str(self.trained.products()).removeprefix("torch."), "held_out_before": self.before / share,
                "held_out_after": loss / share, "tokens_per_second": tokens / seconds if seconds else None,
                "memory": self.fit.said(), "text": about, "attempts": attempts,
                "tried": [[rate, value / share] for rate, value in self.tried],
                "warnings": warnings} | ({"sharded": distributed.world()} if sharded.asked() else {})

    def best(self) -> tuple[float, str | None]:
        """(lowest held-out loss so far, the file of that state; None for the start)."""
        kept = [(min(loss for _, loss in a.looks), a.kept) for a in self.attempts if a.kept]
        return min([(self.before, None), *kept], key=lambda entry: entry[0])

    def set(self, state: str | None) -> None:
        """Set the parameters to a saved state; None: to the start."""
        if state is None:
            self.trained.restore(self.start)
        else:
            self.student().load_state_dict(load_file(self.lesson.work / state))

    def student(self) -> Student:
        """A new one for each Trainer, as accelerate shares a module among processes the first time only."""
        return Student(self.model, self.trained.parameters, self.lesson, self.trained.products())

    def note(self) -> None:
        """Write attempts.json."""
        if not distributed.rank():
            known = {"before": self.before, "tried": self.tried, "trying": self.trying,
                     "attempts": [asdict(a) for a in self.attempts]}
            sealed.keep(known, self.file, [a.kept for a in self.attempts if a.kept])

    def folder(self, number: int) -> Path:
        """Trainer's folder for an attempt."""
        return self.lesson.work / (f"attempt-{number}" + "-sharded" * sharded.asked())

    def trainer(self, attempt: Attempt, first: int = 0) -> "TextTrainer":  # noqa: F821 - see below
        """Trainer for an attempt on what is left of the text; first: for so many steps alone, without looks."""
        from .trainer import Looks, Seals, Shards, TextTrainer, TrainingArguments, watching  # slow to import

        text, lesson = self.lesson.text, self.lesson
        steps = max(1, (len(text.train) - attempt.begins) // self.windows)
        look = max(1, steps // LOOKS)
        number = self.attempts.index(attempt) if attempt in self.attempts else len(self.attempts)
        plan = {"max_steps": steps, "lr_scheduler_type": "cosine", "warmup_steps": max(1, round(WARM_UP * steps)),
                "eval_strategy": "steps", "eval_steps": look, "save_strategy": "steps", "save_steps": look,
                "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
        arguments = TrainingArguments(
            output_dir=str(self.folder(number)), per_device_train_batch_size=self.fit.windows,
            per_device_eval_batch_size=self.fit.windows, gradient_accumulation_steps=self.fit.parts,
            train_sampling_strategy="sequential", max_grad_norm=CLIP, logging_steps=max(1, look // 5),
            report_to="none", disable_tqdm=True, seed=lesson.seed,
            use_cpu=lesson.device.type == "cpu", remove_unused_columns=False, prediction_loss_only=True,
            dataloader_pin_memory=False, **rates.schedule(first) if first else plan)
        seen = watching(lesson.work, number, lesson.progress) if attempt.lr and not first else []
        return TextTrainer(
            self.student(), arguments, train_dataset=Subset(text.train, range(attempt.begins, len(text.train))),
            eval_dataset=text.held, groups=self.trained.groups(attempt.lr), masked=self.trained.mask_gradients,
            callbacks=[Looks(self.before), *[Shards()] * sharded.asked(), Seals(attempt.seconds), *seen])


def verdict(losses: list[float], before: float) -> str | None:
    """Why an attempt with these looks ends before its last step: "harm", "no gain"; None: it goes on."""
    if losses and not losses[-1] <= before:  # a NaN is no gain
        return "harm"
    return "no gain" if losses and len(losses) - 1 - losses.index(min(losses)) >= PATIENCE else None


def last_checkpoint(folder: Path) -> Path | None:
    """The last of Trainer's checkpoints in a folder that is as it was written, and whose best one is; damaged and
    incomplete ones are removed. None in a process that is not the first."""
    if distributed.rank():
        return None
    whole = []
    for found in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        if sealed.kept(found / SEAL):
            whole.append(found)
        else:
            shutil.rmtree(found)
    while whole:
        state = json.loads((whole[-1] / "trainer_state.json").read_text())
        if Path(state["best_model_checkpoint"] or whole[-1]).name in [path.name for path in whole]:
            return whole[-1]
        shutil.rmtree(whole.pop())
    return None


def damaged(work: Path) -> bool:
    """Whether the attempts of an earlier process, in this folder, are not as they were written."""
    return (work / ATTEMPTS).is_file() and not sealed.kept(work / ATTEMPTS)
