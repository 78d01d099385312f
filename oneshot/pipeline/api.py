"""`python -m oneshot.run` in Python: `oneshot.prune(model, ...)` on a model that is loaded already."""

import contextlib
import dataclasses
from pathlib import Path

import torch

from .. import models, report
from ..data import choose
from . import checks, run
from ..settings import flags, presets
from ..settings.config import RunConfig
from ..data import given as given_tokens


def prune(model, tokenizer=None, *, method="sparsegpt", pattern="2:4", calibration="builtin", parts=None, **settings):
    """Prune a loaded transformers model in place; the record of what was done, as `python -m oneshot.run` writes it.

    calibration: as `--calibration`, or token ids, int64 (n, seqlen). parts: settings of the method's, the
    allocation's and the recovery's parts, such as {"sparsegpt.damping": 0.1, "block.steps": 100}. settings: RunConfig's
    other fields, e.g. nsamples=64, device="cuda".

    Raises ValueError naming the setting as the command line would.
    """
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    name = "demo" if Path(name) == models.DEMO else name
    given = isinstance(calibration, torch.Tensor)
    if not given and tokenizer is None:
        raise ValueError("tokenizer: needed to read --calibration; or give token ids as `calibration`")
    known = [f.name for f in dataclasses.fields(RunConfig) if f.name in PYTHON_SETTINGS]
    refuse_unknown(settings, known, "no such setting here")
    refuse_unknown(parts or {}, [a.dest for a in flags.parser()._actions if "." in a.dest], "no such setting of a part")
    flags = {**settings, **(parts or {}), "model": name, "pattern": str(pattern), "evaluate": "none",
             "calibration": "given" if given else calibration}
    presets.check_effort([method], flags)
    asked = presets.expand(method, flags)
    flags.check_parts({method: asked}, flags)
    cfg = flags.build(asked)
    checks.check_devices(cfg)
    checks.check_target(cfg)
    checks.check_model(model)
    checks.check_recovery(cfg, model)
    plan = run.make_plan(cfg, model)
    with at_rest(model):
        if given:
            tokens = given_tokens(calibration)
            choose.window(model, tokens.ids.shape[1], "calibration: windows of")
        else:
            tokens = run.calibrate(cfg, model, tokenizer)
        weights, run_id = run.identify(cfg, model, tokens, {})
        record = run.work(cfg, model, tokenizer, plan, tokens, {})
    return report.storable(record | {"run_id": run_id, "model": run.describe(cfg, model, weights)})


@contextlib.contextmanager
def at_rest(model):
    """The model as `models.load` gives it: no dropout, nothing but what is trained here asks for gradients."""
    training = [m for m in model.modules() if m.training]
    asking = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for p in asking:
            p.requires_grad_(True)


PYTHON_SETTINGS = {f.name for f in dataclasses.fields(RunConfig)} - {  # the rest: arguments of its own, or the caller's
    "model", "method", "pattern", "calibration", "solver", "recovery", "allocation", "preset", "evaluate",
    "eval_seqlen", "eval_windows", "eval_batch_size", "prompts", "robustness", "divergence", "damage", "sensitivity",
    "quantised", "dtype", "model_revision", "trust_remote_code", "save", "overwrite", "format", "results", "dense",
    "shared_inputs", "tasks", "task_path", "task_limit"}


def refuse_unknown(given, known, what):
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{', '.join(unknown)}: {what}; there are {', '.join(known) or 'none'}")
