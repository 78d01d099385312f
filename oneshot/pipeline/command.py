"""What the runs of one command share, computed once: text sampled from the model, solutions from shared inputs."""

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import checkpoint, models
from ..data import Tokens, choose
from ..measure import compared
from ..models import Tokenizer
from ..prune import shared_inputs
from ..prune.job import Job, Result
from ..settings import RunConfig
from . import checks
from .plan import allocated, make_plan, needs_data, pruning_chain

Solution = tuple[Result, dict[str, torch.Tensor]]


def load(cfg: RunConfig) -> tuple[nn.Module, Tokenizer]:
    """(model, tokenizer) as they are on disk. Raises ValueError naming `--model`."""
    model, tokenizer = models.load(cfg.model, dtype=cfg.dtype, revision=cfg.model_revision, cache_dir=cfg.cache_dir,
                                   trust_remote_code=cfg.trust_remote_code, offload=cfg.offload)
    models.compute_as_stored(model, cfg.compute == "stored")
    return model, tokenizer


def held(cfg: RunConfig) -> nn.Module:
    """The model that one of the other processes of torchrun holds."""
    models.quiet()
    return load(cfg)[0]


@dataclass
class Command:
    """The runs of one command, in order."""

    configs: Sequence[RunConfig]
    _sampled: Tokens | None = field(default=None, repr=False)
    _dense: nn.Module | None = field(default=None, repr=False)
    _locks: dict[str, checkpoint.FolderLock] = field(default_factory=dict, repr=False)

    def locked(self, configs: Sequence[RunConfig]) -> contextlib.AbstractContextManager[None]:
        """Keep other processes out of all folders that these runs save into.

        Raises ValueError naming `--save` where one is at work.
        """
        return checkpoint.locked([cfg.save for cfg in configs if cfg.save], self._locks)

    def folder(self, cfg: RunConfig, run_id: str) -> checkpoint.Folder | None:
        """The locked folder that a run saves into; None where it saves nothing."""
        return checkpoint.Folder(cfg.save, run_id, cfg.overwrite, self._locks[cfg.save]) if cfg.save else None

    @property
    def saves(self) -> bool:
        """Whether any run saves a checkpoint; the dense run is then not repeated either, if its record exists."""
        return any(cfg.save for cfg in self.configs)

    @property
    def resumes(self) -> bool:
        """Whether repeating the same command resumes what was interrupted."""
        return any(cfg.save and not cfg.shared_inputs for cfg in self.configs)

    def calibration(self, cfg: RunConfig, model: nn.Module, tokenizer: Tokenizer) -> Tokens | None:
        """A run's calibration Tokens; None if nothing needs them. Text sampled for `--calibration self` is reused."""
        if not needs_data(cfg):
            return None
        if cfg.calibration != "self":
            return choose.calibration(cfg, model, tokenizer)
        if self._sampled is None:
            self._sampled = choose.calibration(cfg, model, tokenizer)
        return self._sampled

    def dense(self, cfg: RunConfig) -> nn.Module:
        """The dense model, loaded once for all runs of the command (on a CPU, its weights are mapped from the file)."""
        if self._dense is None:
            self._dense = load(cfg)[0]
            compared.constant(self._dense)
        return self._dense

    def solved(self, cfg: RunConfig) -> Solution | None:
        """A run's solution with `--shared-inputs`; None for a run that is solved on its own inputs."""
        return self._solutions[self.configs.index(cfg)] if cfg.prunes and cfg.shared_inputs else None

    @functools.cached_property
    def _solutions(self) -> dict[int, Solution]:
        """{place of the run in the command: its solution}, computed in one pass over the data on first use.

        An allocation that needs data takes one more pass, shared by all runs.
        """
        runs = {i: cfg for i, cfg in enumerate(self.configs) if cfg.prunes and cfg.shared_inputs}
        cfg = next(iter(runs.values()))
        model, tokenizer = load(cfg)
        checks.check_model(model)
        calibration = self.calibration(next((c for c in runs.values() if needs_data(c)), cfg), model, tokenizer)
        began = time.perf_counter()
        plans = allocated(list(runs.values()), model, [make_plan(c, model) for c in runs.values()], calibration)
        ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
        jobs = [Job(plan, pruning_chain(c), c) for plan, c in zip(plans, runs.values(), strict=True)]
        solved = shared_inputs.prune_shared(model, ids, mask, jobs)
        for result, _ in solved:
            result.seconds = (time.perf_counter() - began) / len(runs)
        return dict(zip(runs, solved, strict=True))


def seconds(found: dict[str, float], times: tuple[float, float, float], folder: checkpoint.Folder | None) -> dict:
    """The record's `seconds`: those found of pruning and evaluating, of loading and data, and in all.

    times: when the run began, when it had loaded the model, when it had its data. With `earlier`, the seconds of the
    processes that this one has continued, where there were any: pruning and all of it count them.
    """
    began, loaded, prepared = times
    found = found | {"load": loaded - began, "data": prepared - loaded, "total": time.perf_counter() - began}
    if earlier := folder.earlier if folder else 0.0:
        found |= {"prune": found["prune"] + earlier, "total": found["total"] + earlier, "earlier": earlier}
    return found
