"""Compress: prune a model according to its plan, or round it, and prove the result."""

import time

from torch import nn

from .. import heal
from ..checkpoint import Folder, packed
from ..data import Tokens
from ..models import all_weights
from ..prune import loop
from ..prune.job import Result, skipped_rows
from ..quantise import grids, rtn
from ..runtime import environment
from ..runtime.proof import prove
from ..settings import RunConfig
from .plan import Plan, allocated, job_of


def compress(cfg: RunConfig, model: nn.Module, plan: Plan, calibration: Tokens | None,
             folder: Folder | None = None) -> Result:
    """Prune and heal, or round, the model in place as the settings ask; the dense model is left unchanged.

    folder: save each finished block there, and resume after those that are already saved.
    """
    if cfg.row != "pruned":
        warnings = rtn.quantise_model(model, grids.parse(cfg.pattern)) if cfg.row == "rounded" else []
        return Result(skipped=skipped_rows(model), warnings=warnings)
    kept = folder.kept_plan() if folder else None
    [plan] = [kept] if kept else allocated([cfg], model, [plan], calibration)
    if folder:
        folder.computed_with = circumstances(cfg, calibration)
        folder.plan = plan if cfg.allocate != "uniform" else None
    job = job_of(cfg, plan, calibration)
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    finished, on_block = (folder.blocks(), folder.save_block) if folder else ((), None)
    result = loop.prune_model(model, ids, mask, job, finished=finished, on_block=on_block)
    result.warnings += folder.warnings() if folder else []
    heal_model(cfg, model, job.healers, result)
    prove_patterns(model, plan, result.layers)
    return result


def circumstances(cfg: RunConfig, calibration: Tokens | None) -> dict:
    """What the bits of a block depend on beside the run's settings: a run that resumes with others says so."""
    found = environment.environment(cfg.device)
    return {key: found[key] for key in ("threads", "device", "torch", "transformers", "oneshot", "commit")} | {
        "calibration": calibration.sha256[:12] if calibration else None}


def heal_model(cfg: RunConfig, model: nn.Module, healers: tuple[heal.Heal, ...], result: Result) -> None:
    """Let the healing methods train the whole model; what they report goes into the result."""
    for name, healer in zip(cfg.heals, healers, strict=True):
        began = time.perf_counter()
        with loop.float32_products(cfg.tf32):
            info = healer.after_model(model, result.dense)
        if info is not None:
            result.warnings += [f"--heal {name}: {w}" for w in info.pop("warnings", [])]
            result.heal[name] = info | {"seconds": time.perf_counter() - began}
    result.dense = None  # frees the hidden states of the whole calibration set


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
        zeros += linear.rows * linear.in_features - int(linear.weight.count_nonzero())
    return zeros / total if total else 0.0
