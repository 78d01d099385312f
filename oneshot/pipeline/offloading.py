"""Offloading: what goes with `--offload disk`, and whether the pruned blocks fit on the disk."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

from torch import nn

from .. import measure, models
from ..checkpoint import Folder
from ..prune import solvers
from ..settings import RunConfig
from .plan import pruning_chain

WHOLE = {"tasks", "prompts", "say", "latency", "sensitivity"}  # measurements that need the whole model in memory
HEALERS = {"block"}  # those that need one block alone


def check(cfg: RunConfig) -> None:
    """Reject what needs the whole model in memory. Raises ValueError naming the flag."""
    if cfg.offload == "none":
        return
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("--offload disk: needs accelerate; pip install 'oneshot[offload]'")
    if found := whole(cfg):
        raise ValueError(f"{found[0]}: needs the whole model in memory, so it does not go with --offload disk; leave "
                         "out one of them")


def whole(cfg: RunConfig) -> list[str]:
    """The flags of a run that need the whole model in memory."""
    pruned = {
        "--shrink": cfg.shrinks, f"--heal {cfg.heal}": set(cfg.heals) - HEALERS,
        f"--quantise {cfg.quantise}": cfg.quantise is not None, f"--format {cfg.format}": cfg.format != "dense",
        "--shared-inputs": cfg.shared_inputs, "--calibration self": cfg.calibration == "self",
        f"--method {cfg.method}": cfg.prunes and (cfg.method == solvers.KEEP or any(
            "gradient" in module.needs for module, _ in pruning_chain(cfg)))}
    found = [flag for flag, given in pruned.items() if cfg.prunes and given]
    found += ["--quantised"] if cfg.row == "rounded" else []
    return found + [f"--{name}" for name in sorted(WHOLE) if measure.module(name).asked(cfg)]


def check_space(model: nn.Module, folder: Folder | None) -> None:
    """Raise ValueError if the pruned blocks of a model on disk, of which those saved are there, have no room."""
    if not (disk := models.on_disk(model)):
        return
    sizes = [sum(p.numel() * p.element_size() for p in block.module.parameters()) for block in models.walk(model)]
    rest = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if disk.block_of(name) is None)
    needed = sum(sizes[folder.next_block:]) + rest if folder else sum(sizes)
    place = existing(folder.path) if folder else Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(place).free) < needed:
        where = f"--save {folder.path}: its disk" if folder else \
            f"--offload disk: without --save the pruned blocks wait in {place}, which"
        raise ValueError(f"{where} has {free / 1e9:.3g} GB free, and {needed / 1e9:.3g} GB are needed; "
                         + ("free some, or choose another folder" if folder else "give --save, or set TMPDIR"))


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
