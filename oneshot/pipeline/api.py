"""`oneshot prune` from Python: `oneshot.prune(model, ...)` on a model that is already loaded."""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models, report
from ..data import choose
from ..measure import Subject
from ..models import Tokenizer
from ..models.source import undo_quantisation, was_dequantised
from ..runtime import distributed
from ..settings import flags, presets, values
from ..settings.known import known, part_names, python_names, todays_names
from ..structured.options import shrinks
from . import checks, lesson, rounding, run
from .command import Command
from .fit import command as fit_command
from .identity import describe, identify
from .lesson import GIVEN, needs_teacher
from .plan import make_plan


def prune(model: nn.Module, tokenizer: Tokenizer | None = None, *, method: str = "sparsegpt",
          pattern: str | float = "2:4", calibration: str | torch.Tensor = "builtin",
          parts: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Prune a loaded transformers model in place; returns the record of the run, as `oneshot prune` writes it.

    tokenizer: needed unless token ids are given. method, pattern: as for `--method` and `--pattern`, but one of each.
    calibration: as for `--calibration`, or token ids, int64 (n, seqlen). parts: settings of solvers, refiners,
    allocation and healing methods, such as {"sparsegpt.damping": 0.1, "block.steps": 100}. settings: the other flags by
    name, such as nsamples=64, device="cuda", keep_dense="*.down_proj"; and `teacher`, the model that healing on
    text aims at (default: a copy of this one as it is before pruning).

    Raises ValueError naming the setting, with the same message as the command line.
    """
    distributed.check()
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    name = "demo" if Path(name) == models.DEMO else name
    given = isinstance(calibration, torch.Tensor)
    if isinstance(tokenizer, str):
        raise ValueError(f"tokenizer: {tokenizer} is a name; give the tokenizer itself, such as oneshot.load returns")
    if not given and tokenizer is None:
        raise ValueError("tokenizer: needed to read --calibration; or give token ids as `calibration`")
    teacher = settings.pop("teacher", None)
    settings = todays_names(settings) | ({"heal_teacher": GIVEN} if teacher is not None else {})
    refuse_unknown(settings, python_names(), "no such setting here")
    refuse_unknown(parts or {}, part_names(), "no such setting of a part")
    asked = values.plain({**settings, **(parts or {}), "model": name, "pattern": str(pattern), "evaluate": "none",
                          "method": method, "calibration": "given" if given else calibration})
    if method == "dense" and asked.get("quantise"):
        asked = flags.rounded_dense(asked)
    method = asked["method"]
    presets.check_effort([method], asked)
    whole = presets.expand(method, flags.with_fold(method, asked))
    flags.check_parts({method: whole}, asked)
    cfg = flags.build(whole)
    checks.check_devices(cfg)
    checks.check_target(cfg)
    checks.check_model(model)
    if models.on_disk(model):
        raise ValueError("model: its blocks are on disk, where only `oneshot prune --offload disk` changes them; load "
                         "it without `offload`")
    rounding.check_model(cfg, model)
    checks.check_heal(cfg, model)
    checks.check_shared(cfg, model)
    plan = make_plan(cfg, model)
    dense = copy.deepcopy(model) if needs_teacher(cfg) else teacher
    if was_dequantised(model):
        undo_quantisation(model)
    with at_rest(model), models.computing(cfg.compute == "stored", model):
        if given:
            tokens = choose.given(calibration, model, tokenizer)
        else:
            tokens = Command([cfg]).calibration(cfg, model, tokenizer)
        named = lesson.check(cfg, model, tokenizer)
        weights, run_id = identify(cfg, model, tokens, {}, named)
        record = run.work(Subject(model, tokenizer, cfg, {}, tokens, lambda: dense, teacher=named), plan)
    return report.storable(record | {"run_id": run_id, "model": describe(cfg, model, weights)})


def shrink(model: nn.Module, tokenizer: Tokenizer | None = None, *, to: float | None = 0.75, method: str = "obs",
           **settings: Any) -> dict[str, Any]:
    """Make a loaded model smaller in place, as `oneshot shrink` does; returns the record of the run.

    The object `model` is the smaller model afterwards: its class and config may be others. to: the share of the blocks
    that is left; None with `layers` or `drop`. method: the solver that chooses and refits units. settings: as for
    `oneshot.prune`, such as calibration, nsamples, layers, drop, tries, heal.

    Raises ValueError naming the setting.
    """
    if not shrinks(settings | {"shrink": to}):
        raise ValueError("to: None leaves the model as it is; give the share that is left, or layers or drop")
    return prune(model, tokenizer, **{"method": method, "pattern": "dense", "shrink": to, "shrink_method": method,
                                      **settings})


def heal(model: nn.Module, tokenizer: Tokenizer, *, data: str, tokens: str = "1M",
         teacher: nn.Module | str | None = None, method: str = "full", **settings: Any) -> dict[str, Any]:
    """Train what a pruned or smaller model has left, in place, as `oneshot heal` does; returns the record of the run.

    Every weight that is zero stays zero. data, tokens: as for `--heal-data` and `--heal-tokens`. teacher: the dense
    model, or its folder or name; needed unless heal_loss="next". method: full or lora. settings: as for
    `oneshot.prune`, such as heal_batch, heal_seqlen, heal_held_out, seed, device, parts={"lora.r": 32}.

    Raises ValueError naming the setting.
    """
    own = {"heal_teacher": teacher} if isinstance(teacher, str) else {"teacher": teacher}
    return prune(model, tokenizer, **{"method": "keep", "pattern": "dense", "heal": method, "heal_data": data,
                                      "heal_tokens": tokens, **own, **settings})


def fit(model: nn.Module | str, tokenizer: Tokenizer | None = None, *, target: str, save: str | Path,
        floor: str | Iterable[str] = (), **settings: Any) -> dict[str, Any]:
    """Make a model smaller step by step, as `oneshot fit` does, until targets are met or a floor stands in the way.

    model: a folder or name, or a loaded model, which is saved into the folder `save` first and is not changed. target:
    as for `--target`, such as "latency=0.6x,bytes=0.5x". floor: one or several, as for `--floor`. settings: the other
    flags of `oneshot fit` (step, allow, budget, device, data, tokens, final, method) and of `oneshot prune`, by name.

    Returns {"result": its folder, "met": whether the targets are, "stopped": why not, "shares", "rounds": as in
    fit.json, "text": what the command says}. Raises ValueError naming the setting.
    """
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("tokenizer: needed, as the model is saved with it")
        folder = Path(save) / "model"
        if not folder.is_dir():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            there, _ = models.load(str(folder), trust_remote_code=bool(settings.get("trust_remote_code")))
            if models.fingerprint(there) != models.fingerprint(model):
                raise ValueError(f"save: {save} holds the rounds of another model; choose another folder")
        model = str(folder)
    floors = [floor] if isinstance(floor, str) else floor
    own = [word for name, value in {"model": model, "target": target, "save": save}.items()
           for word in (f"--{name}", str(value))]
    found, text = fit_command.fitted(*fit_command.parser().parse_known_args(
        [*own, *(word for one in floors for word in ("--floor", one)), *as_words(settings)]))
    return {"result": found.state.result, "met": found.met(found.shares), "stopped": found.stopped,
            "shares": found.shares, "rounds": [asdict(r) for r in found.ledger.rounds], "text": text}


def as_words(settings: dict[str, Any]) -> list[str]:
    """{name: value} as words of a command line. A switch at its default value is left out."""
    found = []
    for name, value in settings.items():
        flag = known().get(name)
        if flag and flag.is_switch:
            found += [flag.option] * (value != flag.default)
        elif value is not None:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within the context, the model is in evaluation mode without gradients, as `models.load` returns it."""
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


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError naming the settings in `given` that are not among the `known` ones. what: what they are not."""
    if unknown := sorted(map(str, set(given) - set(known))):
        raise ValueError(f"{', '.join(unknown)}: {what}; there are {', '.join(known) or 'none'}")
