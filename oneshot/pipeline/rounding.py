"""Rounding: what `--quantise` adds to a run, after pruning and healing: checks, the second walk, its rows."""

from collections.abc import Iterator, Sequence

from torch import nn

from .. import models, quantise
from ..checkpoint import Folder, compressed, gguf
from ..data import Tokens
from ..prune import loop, solvers
from ..prune.job import Job, Result
from ..prune.patterns import Dense
from ..quantise import head, walk
from ..settings import RunConfig
from ..structured import origin
from .plan import Plan

SAID = ("grid", "rounded_to_zero")  # what quantise/walk.py says of a linear in its row's `info`


def joint(cfg: RunConfig) -> bool:
    """Whether pruning itself rounds."""
    return cfg.quantise is not None and hasattr(quantise.module(cfg.quantiser), "prune")


def check(cfg: RunConfig) -> None:
    """Reject settings that do not go with `--quantise`. Raises ValueError naming the flag."""
    if cfg.scale_columns and (cfg.quantise is None or joint(cfg)):
        raise ValueError("--scale-columns: scales before rounding; give --quantise, with --quantiser gptq or rtn")
    if cfg.quantise is None:
        return
    if cfg.shared_inputs:
        raise ValueError("--shared-inputs: looks at the dense model alone, so it does not go with --quantise")
    if joint(cfg):
        solver = quantise.module(cfg.quantiser).solver
        others = {"--heal": cfg.heals, "--dense-target": cfg.dense_target}
        if cfg.method != solver or cfg.pattern == "dense":
            raise ValueError(f"--quantiser {cfg.quantiser}: rounds while --method {solver} prunes; with --method "
                             f"{cfg.method} --pattern {cfg.pattern} use gptq")
        for flag, value in others.items():
            if value:
                raise ValueError(f"{flag}: does not go with --quantiser {cfg.quantiser}, which prunes and rounds at "
                                 "once; use gptq")


def check_model(cfg: RunConfig, model: nn.Module) -> None:
    """Raise ValueError naming `--quantise` for names that the model does not have, or shapes that fit no grid."""
    if cfg.quantise is not None:
        try:
            own = head.named(model, cfg.grids)
            cfg.grids.check({weight.name: weight.shape for weight in models.all_weights(model)} | own)
            head.check(model, cfg.grids)
        except ValueError as error:
            known = models.output_head(model)
            more = f"; the output head is {known[0]}" if known and not own and "matches none" in str(error) else ""
            raise ValueError(f"--quantise {error}{more}") from None
        if cfg.format not in ("dense", *gguf.FORMS) and own and any(map(cfg.grids.named, own)):
            raise ValueError(f"--format {cfg.format}: holds linears of blocks alone; leave the output head out of "
                             f"--quantise {cfg.quantise}, or use --format dense or gguf")
        if cfg.scale_columns and not any(cfg.grids.of(weight.name) for weight in models.all_weights(model)):
            raise ValueError(f"--scale-columns: is for linears of blocks, and --quantise {cfg.quantise} rounds none of "
                             "them; leave it out")
    if cfg.format == compressed.METHOD and cfg.prunes:
        compressed.check_model(model, cfg.grids)


def renamed(cfg: RunConfig, model: nn.Module, kept: Sequence[int]) -> str | None:
    """`--quantise` for the smaller model, in which blocks have other numbers. kept: the numbers of those that stay.

    Raises ValueError when none of its linears would be rounded.
    """
    if cfg.quantise is None:
        return None
    path, _ = models.blocks(model)
    before = {weight.name: origin.name_before(weight.name, path, kept) for weight in models.all_weights(model)}
    before |= {name: name for name in head.named(model, cfg.grids)}  # it has the same name
    if not any(map(cfg.grids.of, before.values())):
        raise ValueError(f"--quantise {cfg.quantise}: rounds none of the linears that are left in the smaller model; "
                         "leave it out, or name others")
    return str(cfg.grids.renamed(before))


def at_once(cfg: RunConfig, job: Job) -> Job:
    """The job of pruning, which rounds as well where the quantiser does both in one pass."""
    method = quantise.module(cfg.quantiser)
    return walk.together(job, method, cfg.rounding[cfg.quantiser], cfg.grids) if joint(cfg) else job


def round_model(cfg: RunConfig, model: nn.Module, plan: Plan, calibration: Tokens | None, folder: Folder | None,
                finished: Iterator, result: Result) -> None:
    """Round the pruned and healed model in place, unless that is done; the result gets what the record says of it.

    finished: the blocks that an interrupted run has rounded, as for `loop.prune_model`.
    """
    if cfg.quantise is None:
        return
    result.head, scales, warnings = head.round_head(model, cfg.grids)
    result.warnings += warnings
    if not joint(cfg):
        job = walk.rounding(plan, cfg, quantise.module(cfg.quantiser), cfg.rounding[cfg.quantiser], cfg.grids,
                            cfg.scale_columns)
        ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
        on_block = (lambda number, *rest: folder.save_block(folder.next_block, *rest)) if folder else None
        join(result, loop.prune_model(model, ids, mask, job, finished=finished, on_block=on_block), job.label)
        if cfg.scale_columns and not any(block["rounding"]["scaling"] for block in result.blocks):
            result.warnings.append("--scale-columns: changed nothing; no scaling of this model's columns, which its "
                                   "norms, v_proj and up_proj can undo, lowers the error of rounding")
    result.scales |= scales
    if folder:
        folder.scales = result.scales
    for row in result.layers:
        row |= {key: row["info"].pop(key) for key in SAID if key in row["info"]}


def join(result: Result, rounded: Result, label: str) -> None:
    """Add what the second walk reports to the rows of the first."""
    rows = {row["name"]: row for row in rounded.layers}
    for row in (row for row in result.layers if row["name"] in rows):
        own = rows[row["name"]]
        row["info"] |= {key if key in SAID else f"{label}.{key}": x for key, x in own["info"].items()}
        row["rounding_error"], row["seconds"] = own["relative_error"], row["seconds"] + own["seconds"]
    for block, own in zip(result.blocks, rounded.blocks, strict=True):
        block["rounding"] = {key: x for key, x in own.items() if key not in ("block", "seconds")}
        block["seconds"]["round"] = sum(own["seconds"].values())
    result.warnings += rounded.warnings
    result.scales = rounded.scales


def only_kept(cfg: RunConfig, job: Job, plan: Plan) -> bool:
    """Whether the walk that prunes would change nothing."""
    kept = cfg.method == solvers.KEEP or (cfg.shrinks and all(isinstance(p, Dense) for p in plan.values()))
    return kept and not (cfg.method == solvers.KEEP and job.healers)
