"""What a run is known by, and what its reader should know before all else."""

import hashlib
from pathlib import Path

from torch import nn

from .. import measure, models
from ..data import Tokens, choose
from ..measure import Subject
from ..prune import allocate
from ..settings import RunConfig
from . import checks
from .plan import keep_dense_warning


def warnings(subject: Subject) -> list[str]:
    """What the reader of a run's numbers should know first: of the model, of what stays dense, of the data."""
    cfg, model = subject.cfg, subject.model
    unreached = checks.unreached_warnings(model) if cfg.prunes else []
    return [*models.source_of(model).warnings, *unreached, *keep_dense_warning(cfg, model),
            *choose.warnings(cfg, model, subject.calibration, subject.texts)]


def identify(cfg: RunConfig, model: nn.Module, calibration: Tokens | None,
             texts: dict[str, Tokens]) -> tuple[str, str]:
    """(fingerprint of the weights, run_id), both of the model before anything is done to it."""
    weights = models.fingerprint(model)
    marks = [calibration.sha256 if calibration else None, *measure.identity(cfg, texts)]
    if cfg.prunes and cfg.allocate == "sensitivity":
        marks.append(digest(cfg, weights))
    return weights, cfg.run_id(weights, *marks)


def digest(cfg: RunConfig, weights: str) -> str:
    """sha256 of the record that an allocation by sensitivity reads. Raises ValueError if it is another model's."""
    file = cfg.allocation["sensitivity"].record
    _, measured = allocate.module("sensitivity").read(file)
    if measured != weights:
        raise ValueError(f"--sensitivity.record {file}: was measured on another model; measure this one with "
                         "--sensitivity linear")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def describe(cfg: RunConfig, model: nn.Module, weights: str) -> dict:
    """What the record says of the model."""
    return {"name": Path(cfg.model.rstrip("/")).name, "family": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prunable": sum(weight.size for weight in models.all_weights(model)),
            "dtype": str(model.dtype).removeprefix("torch."), "blocks": len(models.blocks(model)[1]),
            "fingerprint": weights}
