"""Lesson: what healing on text needs: the text, the dense model's predictions, a place for checkpoints."""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .. import checkpoint, heal, models
from ..data import choose, training
from ..data.sample_self import sample_from_model
from ..heal.options import count
from ..heal.text import HELD, damaged, sharded, teacher
from ..heal.text.student import Lesson, keeps_apart
from ..measure import Subject
from ..models import Tokenizer
from ..prune.job import Result
from ..runtime import distributed, products, sealed, together
from ..runtime.files import writing
from ..runtime.flag import listed
from ..settings import RunConfig
from .command import load
from .plan import circumstances

TOP_K = 64  # with a cache
GIVEN = "given"  # the teacher of a call from Python that has a model in its hands
SAME = 0.01  # share of an evaluation text's 13-grams in the training text from which on it is a warning
OFTEN = 0.1  # the same of the held-out text, from the same pages, which share some


def heal_on_text(subject: Subject, result: Result, folder: checkpoint.Folder | None) -> None:
    """Let the methods that train on text heal the pruned model in place; what they report goes into the result.

    Raises ValueError naming the flag when the text, the dense model or the memory is not there.
    """
    cfg, model, dense = subject.cfg, subject.model, subject.teacher or teacher_of(subject)
    for name in cfg.text_heals:
        began = time.perf_counter()
        with working(folder) as work, writing(*place(cfg, work)):
            warnings = same_start(cfg, model, work / name)
            lesson = replace(make_lesson(subject, work, dense), work=work / name)
            share(subject, work, name)
            warnings += overlap_warnings(subject, lesson.text) + changed_warnings(cfg, subject.teacher)
            if not keeps_apart(model):
                warnings.append("in this family, tokens see the documents before theirs in a window of training text")
            healer = heal.module(name).Heal(cfg.healing[name], cfg.seed, cfg.progress)
            with products.float32(cfg.tf32), distributed.answered():
                info = healer.on_text(model, lesson)
        result.warnings += [f"--heal {name}: {w}" for w in [*warnings, *info.pop("warnings")]]
        earlier = info.pop("earlier")
        result.heal[name] = info | {"seconds": time.perf_counter() - began + earlier}
        if folder:
            folder.earlier += earlier
    dense.free()


def share(subject: Subject, work: Path, name: str) -> None:
    """Let the other processes of torchrun take part: they load the pruned model and make the same lesson."""
    if distributed.world() == 1:
        return
    options = subject.cfg
    if options.heal_batch // options.heal_seqlen % distributed.world():
        raise ValueError(f"--heal-batch {options.heal_batch}: {options.heal_batch // options.heal_seqlen} windows of "
                         f"{options.heal_seqlen} a step cannot be shared by {distributed.world()} processes")
    subject.model.save_pretrained(work / "start")
    subject.tokenizer.save_pretrained(work / "start")
    together.beside(take_part, subject.cfg, str(work), name)


def take_part(cfg: RunConfig, work: str, name: str) -> None:
    """What all processes but rank 0 do to heal on text."""
    cfg = cfg.here
    model, tokenizer = models.load(str(Path(work) / "start"), trust_remote_code=cfg.trust_remote_code)
    subject = Subject(model, tokenizer, cfg, {}, None, lambda: load(cfg)[0])
    with writing(*place(cfg, work)):
        lesson = replace(make_lesson(subject, Path(work), teacher_of(subject)), work=Path(work) / name)
        with products.float32(cfg.tf32), distributed.answered():
            heal.module(name).Heal(cfg.healing[name], cfg.seed).on_text(model, lesson)


def place(cfg: RunConfig, work: str | Path) -> tuple[str, str | Path]:
    """(the flag, or else the variable, that says where checkpoints are written, its value). work: that place."""
    return ("--save", cfg.save) if cfg.save else ("TMPDIR", work)


@contextlib.contextmanager
def working(folder: checkpoint.Folder | None) -> Iterator[Path]:
    """The folder for checkpoints: a temporary one, or among the work files of `--save`, which stay until the end."""
    if folder:
        yield folder.heal_folder()
        return
    with tempfile.TemporaryDirectory(prefix="oneshot-heal-") as work:
        yield Path(work)


def same_start(cfg: RunConfig, model: nn.Module, work: Path) -> list[str]:
    """Warnings of a run that resumes. What was trained from other weights is removed."""
    note, now = work / "start.json", {"weights": models.fingerprint(model), "with": circumstances(cfg, None) | (
        {"sharded": distributed.world()} if sharded.asked() else {})}
    before = sealed.kept(note)
    warnings = []
    if damaged(work) or (not before and any(work.glob("*.json"))):
        shutil.rmtree(work)
        warnings = ["the work files of the interrupted run are damaged, so healing began again"]
    elif before and before["weights"] != now["weights"]:
        shutil.rmtree(work)
        warnings = ["the weights to continue from are not those that were healed before, so healing began again"]
    elif before:
        return checkpoint.other_circumstances("it was trained in part and", before["with"], now["with"])
    work.mkdir(parents=True, exist_ok=True)
    sealed.keep(now, note)
    return warnings


def make_lesson(subject: Subject, work: Path, dense: teacher.Teacher) -> Lesson:
    """The lesson of a run. dense: its teacher. Raises ValueError naming the flag of what cannot be used."""
    cfg, model, device = subject.cfg, subject.model, torch.device(subject.cfg.device)
    seqlen = choose.window(model, cfg.heal_seqlen, "--heal-seqlen")
    options = choose.training_options(cfg, model, subject.tokenizer)
    of = dense.fingerprint if cfg.heal_cache else None

    def live() -> teacher.Live:
        same_tokens(cfg, dense.model, model)
        return dense.live(device)

    def sample(n: int) -> list[list[int]]:
        return sample_from_model(live().model, subject.tokenizer, n, seqlen, cfg.seed, cfg.batch_size,
                                 cfg.progress)[0].tolist()
    text = training.prepare(cfg.heal_data, subject.tokenizer, work / "text", tokens=count(cfg.heal_tokens),
                            held=min(HELD, count(cfg.heal_tokens)), seqlen=seqlen, seed=cfg.seed, options=options,
                            held_out=cfg.heal_held_out, sample=sample, progress=cfg.progress)
    top_k = cfg.heal_top_k or (TOP_K if cfg.heal_cache else None)
    top_k = top_k and min(top_k, models.config_of(model).vocab_size)
    lesson = Lesson(text, None, work, replace(cfg, heal_top_k=top_k), device, cfg.seed, cfg.progress)
    if not set(listed(cfg.heal_loss)) & {"kl", "hidden"}:
        return lesson
    if cfg.heal_cache is None:
        return replace(lesson, teacher=live())
    cached = {part: teacher.cache(Path(cfg.heal_cache) / part, live, windows, {"teacher": of, "text": windows.sha256},
                                  k=top_k, temperature=cfg.heal_temperature, progress=cfg.progress)
              for part, windows in (("train", text.train), ("held", text.held))}
    dense.free()
    return replace(lesson, teacher=cached)


def needs_teacher(cfg: RunConfig) -> bool:
    """Whether healing on text needs the model as it is before pruning."""
    return bool(cfg.text_heals and set(listed(cfg.heal_loss)) & {"kl", "hidden"} and not cfg.heal_teacher)


def check(cfg: RunConfig, model: nn.Module, tokenizer: Tokenizer | None) -> teacher.Teacher | None:
    """Raise, before anything is pruned, what would be raised when healing on text begins. Names the flag.

    Returns the model of `--heal-teacher`, None where that names none.
    """
    if not cfg.text_heals:
        return None
    if tokenizer is None:
        raise ValueError(f"tokenizer: needed to read --heal-data {cfg.heal_data}")
    choose.window(model, cfg.heal_seqlen, "--heal-seqlen")
    training.check(cfg.heal_data, tokenizer, choose.training_options(cfg, model, tokenizer), cfg.heal_held_out)
    if cfg.heal_teacher in (None, GIVEN):
        return None
    dense = teacher.Teacher(lambda: named(cfg))
    same_tokens(cfg, dense.model, model)
    return dense


def teacher_of(subject: Subject) -> teacher.Teacher:
    """The model to heal towards: the one that is named; else the dense one, from Python that in the caller's hands."""
    cfg = subject.cfg
    return teacher.Teacher(lambda: subject.dense if cfg.heal_teacher in (None, GIVEN) else named(cfg))


def named(cfg: RunConfig) -> nn.Module:
    """The model of `--heal-teacher`. Raises ValueError naming the flag."""
    return models.load(cfg.heal_teacher, dtype=cfg.dtype, cache_dir=cfg.cache_dir,
                       trust_remote_code=cfg.trust_remote_code, flag="--heal-teacher")[0]


def same_tokens(cfg: RunConfig, dense: nn.Module, model: nn.Module) -> None:
    """Raise ValueError naming `--heal-teacher` if the two models have other vocabularies."""
    sizes = [models.config_of(m).vocab_size for m in (dense, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"--heal-teacher {cfg.heal_teacher}: has {sizes[0]} token ids and the model {sizes[1]}; give "
                         "the model that this one was made from")


def changed_warnings(cfg: RunConfig, dense: teacher.Teacher | None) -> list[str]:
    """A warning if the model of `--heal-teacher` has other weights than when the model to heal was made from it."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        made = checkpoint.read_manifest(cfg.model)["record"]
        before, name = made["model"], checkpoint.models_of(made)["model"]
        same = models.absolute(name) == models.absolute(cfg.heal_teacher)
        changed = dense and same and before["fingerprint"] != dense.fingerprint
        if changed and before["dtype"] == str(dense.model.dtype).removeprefix("torch."):  # by --dtype it is no other
            return [f"--heal-teacher {cfg.heal_teacher}: its weights have changed since {cfg.model} was made from it"]
    return []


def overlap_warnings(subject: Subject, text: training.TrainingText) -> list[str]:
    """A warning for each evaluation text that occurs in the training text, and for what is held out of it."""
    found, held = [], training.overlap(text.train.ids, text.held.ids.reshape(-1, text.held.seqlen))
    if held > OFTEN:
        found.append(f"{held:.0%} of the {training.GRAM}-grams of what is held out occur in what is trained on: the "
                     "loss by which the best state is kept flatters")
    for name, tokens in subject.texts.items():
        share = training.overlap(text.train.ids, tokens.ids.numpy())
        if share > SAME:
            found.append(f"{share:.0%} of the {training.GRAM}-grams of the evaluation text {name} occur in "
                         "--heal-data: its perplexity flatters")
    for line in found:
        print(f"warning: {line}", file=sys.stderr)
    return found


def mark(cfg: RunConfig, dense: teacher.Teacher | None) -> list[str]:
    """What identifies the training text and the model of `--heal-teacher` beside their names: the sha256 of every file
    that is named, and the fingerprint of the model's weights."""
    found = [sealed.digest(file) for file in training.files_of(cfg.heal_data, cfg.heal_held_out)]
    return [*found, dense.fingerprint] if dense else found
