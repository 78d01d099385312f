"""A run's identity: the fingerprint of its model and its run_id; and the warnings that come first in its record."""

import hashlib
from pathlib import Path

from torch import nn

from .. import measure, models
from ..data import Tokens, choose
from ..heal.text.teacher import Teacher
from ..measure import Subject
from ..prune import allocate
from ..runtime import distributed, environment
from ..settings import RunConfig
from . import checks, lesson
from .plan import keep_dense_warning, kept_mark


def warnings(subject: Subject) -> list[str]:
    """What a reader of the run's numbers should know first: about the model, what stays dense, and the data."""
    cfg, model = subject.cfg, subject.model
    unreached = checks.unreached_warnings(model) if cfg.prunes else []
    slow = models.computes_as_stored(model) and environment.slower(cfg.device, model.dtype)
    own = [f"--compute stored: this CPU is slower in {model.dtype} than in float32; leave it out"] if slow else []
    return [*models.source_of(model).warnings, *own, *unreached,
            *(() if cfg.shrinks else keep_dense_warning(cfg, model)),
            *choose.warnings(cfg, model, subject.calibration, subject.texts)]


def identify(cfg: RunConfig, model: nn.Module, calibration: Tokens | None, texts: dict[str, Tokens],
             teacher: Teacher | None = None) -> tuple[str, str]:
    """(fingerprint of the weights, run_id). Call it before the model is changed. teacher: that of `lesson.check`."""
    weights = models.fingerprint(model)
    marks = [calibration.sha256 if calibration else None, *measure.identity(cfg, texts)]
    if cfg.prunes and cfg.allocate == "sensitivity":
        marks.append(digest(cfg, weights))
    if cfg.prunes and cfg.text_heals:
        marks += lesson.mark(cfg, teacher)
    if cfg.prunes and cfg.keep_dense:
        marks.append(kept_mark(cfg, model, weights))
    if cfg.prunes and distributed.world() > 1:  # their sums differ in the last bits
        marks.append(f"{distributed.world()} processes")
    return weights, cfg.run_id(weights, *marks)


def paths(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """The record's `paths`, where it has any: the whole paths of the models that are named by relative ones."""
    found = {key: models.absolute(name) for key in ("model", "heal_teacher") if (name := getattr(cfg, key))}
    found = {key: path for key, path in found.items() if path != getattr(cfg, key)}
    return {"paths": found} if found else {}


def digest(cfg: RunConfig, weights: str) -> str:
    """sha256 (hex) of the record that `--allocate sensitivity` reads.

    Raises ValueError naming `--sensitivity.record` if it was measured on another model. weights: this one's
    fingerprint.
    """
    file = cfg.allocation["sensitivity"].record
    _, measured = allocate.module("sensitivity").read(file)
    if measured != weights:
        raise ValueError(f"--sensitivity.record {file}: was measured on another model; measure this one with "
                         "--sensitivity linear")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def describe(cfg: RunConfig, model: nn.Module, weights: str) -> dict:
    """The record's `model`: name, family, numbers of parameters and blocks, dtype, fingerprint (`weights`); what the
    name stands for, where it can mean one of several."""
    blocks, taken = models.blocks(model)[1], models.source_of(model).stands_for
    return {"name": Path(cfg.model.rstrip("/")).name, **({"stands_for": taken} if taken else {}),
            "family": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prunable": sum(weight.size for weight in models.all_weights(model)),
            "in_blocks": sum(p.numel() for p in blocks.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."), "blocks": len(blocks), "fingerprint": weights}
