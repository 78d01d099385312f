"""Attempt: a run that ends in a record whatever happens, for sweeps.

A failed run has a record too, with status "failed" and its error in one line, in a separate file next to the others.
That file is removed when a later attempt succeeds.
"""

import time
from pathlib import Path

from .. import report
from ..runtime import environment
from ..runtime.inputs import one_line
from ..settings import RunConfig
from . import checks, run


def attempt(cfg: RunConfig) -> dict:
    """The record of one configuration: the stored one, a new one, or one that reports the failure."""
    began = time.perf_counter()
    try:
        checks.check([cfg])
        record = run.run(cfg, reuse=stored)
    except Exception as error:  # errors of the user and bugs of oneshot alike, so that the other runs continue
        return failed(cfg, f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{one_line(error)}",
                      time.perf_counter() - began)
    failure_file(cfg).unlink(missing_ok=True)
    return record


def stored(file: Path) -> dict | None:
    """The finished record in a file; None if there is none that this version can read."""
    try:
        record = report.read(file) if file.is_file() else None
    except ValueError:
        return None
    return record if record and record.get("status") == "finished" else None


def failed(cfg: RunConfig, why: str, seconds: float) -> dict:
    """Write and return the record of a failed run. why: the error. seconds: time spent."""
    why = report.clean(why)
    record = {"schema": report.SCHEMA, "run_id": failure_file(cfg).stem, "status": "failed", "error": why,
              "settings": cfg.settings(), "model": {"name": Path(cfg.model.rstrip("/")).name},
              "environment": environment.environment("cpu") | {"device": cfg.device}, "metrics": {},
              "warnings": [f"failed: {why}"], "seconds": {"total": seconds}}
    return report.write(record, failure_file(cfg))


def failure_file(cfg: RunConfig) -> Path:
    """The file for the record of a failure of this configuration."""
    return Path(cfg.results) / f"{cfg.run_id('failed')}-failed.json"
