"""Compress: prune a model according to its plan, or round it, and prove the result."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from oneshot_kernels import Rounded24Linear
from torch import nn

from ..checkpoint import Folder, packed
from ..measure import Subject
from ..models import all_weights, on_disk
from ..models import blocks as all_blocks
from ..prune import loop
from ..prune.job import Job, Result, skipped_rows
from ..prune.solvers import magnitude
from ..quantise import grids, rtn
from ..runtime.proof import prove
from . import offloading, rounding
from .lesson import heal_on_text
from .plan import Plan, allocated, circumstances, kept_dense, make_plan, pruning_job
from .shrink import gradients, heal_model, shrink


def compress(subject: Subject, plan: Plan, folder: Folder | None = None) -> Result:
    """Prune and heal, or round, the subject's model in place as its settings ask.

    folder: save each finished block there, and resume after those that are already saved.
    """
    cfg, model, calibration = subject.cfg, subject.model, subject.calibration
    if cfg.row != "pruned":
        warnings = rtn.quantise_model(model, grids.parse(cfg.pattern)) if cfg.row == "rounded" else []
        return Result(skipped=skipped_rows(model), warnings=warnings)
    finished, on_block = (folder.blocks(), folder.save_block) if folder else (iter(()), None)
    if folder:
        folder.computed_with, folder.disk = circumstances(cfg, calibration), on_disk(model)
    offloading.check_space(model, folder)
    smaller = None
    if cfg.shrinks:
        blocks = len(all_blocks(model)[1])
        names = [weight.name for weight in all_weights(model)]
        kept = kept_dense(cfg.keep_dense, names) if cfg.keep_dense else set()
        smaller = shrink(cfg, model, calibration, folder, finished, on_block)
        cfg = replace(cfg, keep_dense=renamed(kept, model, smaller.shrunk["kept_blocks"]), quantise=rounding.renamed(
            cfg, model, smaller.shrunk["kept_blocks"]))
        plan = make_plan(cfg, model)
        rounding.check_model(cfg, model)
        on_block = (lambda number, *rest: folder.save_block(blocks + number, *rest)) if folder else None
    result = pruned(replace(subject, cfg=cfg), plan, folder, finished, on_block)
    return joined(smaller, result) if smaller else result


def pruned(subject: Subject, plan: Plan, folder: Folder | None, finished: Iterator,
           on_block: Callable | None) -> Result:
    """Prune, heal and round the model in place by its plan. finished, on_block: as for `loop.prune_model`."""
    cfg, model, calibration = subject.cfg, subject.model, subject.calibration
    kept = folder.kept_plan() if folder else None
    [plan] = [kept] if kept else allocated([cfg], model, [plan], calibration)
    if folder:
        folder.plan = plan if cfg.allocate != "uniform" else None
    job, rest = rounding.at_once(cfg, pruning_job(cfg, plan, calibration)), finished
    if rounding.only_kept(cfg, job, plan):  # nothing to look at any more
        job, on_block, finished = Job(plan, [(magnitude, magnitude.Config())], replace(
            cfg, layer_errors=False, dense_target=0.0)), None, iter(())
    elif "gradient" in job.needs:
        job = replace(job, gradients=gradients(cfg, model, calibration, job))
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    result = loop.prune_model(model, ids, mask, job, finished=finished, on_block=on_block)
    heal_model(cfg if job.healers else replace(cfg, heal="none"), model, job.healers, result)
    heal_on_text(subject, result, folder)
    rounding.round_model(cfg, model, plan, calibration, folder, rest, result)
    result.warnings += folder.warnings() if folder else []
    prove_patterns(model, plan, result.layers)
    return result


def renamed(kept: set[str], model: nn.Module, blocks: list[int]) -> str | None:
    """`--keep-dense` for the smaller model: the names in it of linears that were to stay dense; None for none."""
    path, _ = all_blocks(model)
    before = {f"{path}.{number}.": f"{path}.{place}." for place, number in enumerate(blocks)}
    found = [new + name.removeprefix(old) for name in sorted(kept) for old, new in before.items()
             if name.startswith(old)]
    return ",".join(found) or None


def joined(smaller: Result, result: Result) -> Result:
    """The Result of both steps: the blocks' rows of the first, the linears' of the second, all warnings."""
    result.shrunk = smaller.shrunk
    result.shrunk["walked"] = smaller.blocks
    result.heal = smaller.heal | {(f"{name}.pruned" if name in smaller.heal else name): info
                                  for name, info in result.heal.items()}
    result.warnings = smaller.warnings + result.warnings
    return result


def prove_patterns(model: nn.Module, plan: Plan, rows: list[dict]) -> None:
    """Prove every pattern on the stored weights once more, after all healing, and update the zeros in the rows.

    Raises ProofError naming the linear whose pattern is broken.
    """
    by_name = {row["name"]: row for row in rows}
    for weight in all_weights(model):
        W, name = weight.get(), weight.name
        prove(name not in plan or plan[name].holds(W), f"{name}: pattern {plan.get(name)} broken")
        if row := by_name.get(name):
            row["zeros"] = W.numel() - int(W.count_nonzero())
            row["surplus"] = row["zeros"] - row["target_zeros"]


def sparsity(model: nn.Module) -> float:
    """The share of zeros among all prunable weights, packed ones included, in their stored dtype."""
    zeros = total = 0
    for weight in all_weights(model):
        total += weight.size
        zeros += weight.size - int(weight.get().count_nonzero())
    for linear in packed.linears(model):
        total += linear.rows * linear.in_features
        kept = linear.dense() if isinstance(linear, Rounded24Linear) else linear.weight
        zeros += linear.rows * linear.in_features - int(kept.count_nonzero())
    return zeros / total if total else 0.0
