"""Checks before anything is computed: contradictory settings, unwritable folders, unusable devices and models.

Each raises ValueError naming the flag.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import checkpoint, heal, measure, models
from ..checkpoint import compressed, gguf, packed
from ..heal import lora
from ..heal.options import TENSORBOARD
from ..heal.text import sharded
from ..models.source import check_kind, check_parameters
from ..prune import patterns
from ..prune.solvers import KEEP, chain
from ..runtime import distributed, environment
from ..runtime.flag import listed
from ..settings import RunConfig
from . import offloading, rounding


def check(configs: Sequence[RunConfig]) -> None:
    """Reject what can be rejected before a model is loaded. Raises ValueError naming the flag."""
    for cfg in configs:
        for flag, path in (("--model", cfg.model), ("--save", cfg.save), ("--results", cfg.results),
                           ("--task-path", cfg.task_path)):
            environment.check_name(path, flag)
        check_devices(cfg)
        check_target(cfg)
        offloading.check(cfg)
        if cfg.format == "packed" and cfg.prunes and (cfg.pattern != "2:4" or not cfg.save):
            raise ValueError("--format packed: goes with --pattern 2:4 and --save")
        if cfg.format == "packed" and cfg.quantise is not None and not {*map(str, cfg.grids.kinds)} <= {*packed.GRIDS}:
            raise ValueError(f"--format packed: holds {' and '.join(packed.GRIDS)}, not --quantise {cfg.quantise}")
        if cfg.format == compressed.METHOD and cfg.prunes:
            compressed.check_flags(cfg.grids if cfg.save else None)
        if cfg.format in gguf.FORMS and cfg.prunes:
            gguf.check_flags(cfg.format, cfg.grids, bool(cfg.save))
        if cfg.save:
            checkpoint.owner_of(cfg.save)
            environment.check_writable(cfg.save, "--save")
            if Path(cfg.save).resolve() == Path(cfg.model).expanduser().resolve():
                raise ValueError(f"--save {cfg.save}: is the model's own folder; choose another")
            if Path(cfg.results).resolve().is_relative_to(Path(cfg.save).resolve()):
                raise ValueError(f"--results {cfg.results}: lies in the folder of --save {cfg.save}, which holds one "
                                 "checkpoint and nothing else; choose another")
        environment.check_writable(cfg.results, "--results")
    measure.refuse(configs[0])


def check_target(cfg: RunConfig) -> None:
    """Reject contradictory settings of what to aim at. Raises ValueError naming the flag."""
    if cfg.prunes:
        check_text(cfg)
    if cfg.prunes and cfg.dense_target and not any(module.updates for module in chain(cfg.method)):
        raise ValueError(f"--dense-target {cfg.dense_target:g}: --method {cfg.method} leaves the weights it keeps "
                         f"unchanged, so it cannot aim at a target; use {cfg.method}+refit or sparsegpt")
    spreads = isinstance(patterns.parse(cfg.pattern), patterns.Unstructured) if cfg.prunes else True
    if not spreads and cfg.allocate not in ("uniform", "mix"):
        raise ValueError(f"--allocate {cfg.allocate}: spreads a sparsity such as --pattern 0.5; {cfg.pattern} is the "
                         "same everywhere (--allocate mix mixes patterns)")
    if cfg.method == KEEP and cfg.allocate != "uniform":
        raise ValueError(f"--allocate {cfg.allocate}: --method keep takes the zeros as they are")
    rounding.check(cfg)
    if cfg.prunes and cfg.shrinks:
        check_shrink(cfg)
    own = {"--dense-target": cfg.dense_target, "--heal": cfg.heals, "--true-sequential": cfg.true_sequential,
           "--stop-on-collapse": cfg.stop_on_collapse}
    for flag, value in own.items():
        if cfg.prunes and cfg.shared_inputs and value:
            whole = f" (part of {cfg.preset})" if cfg.preset else ""
            raise ValueError(f"{flag}{whole}: needs each run's own pruned inputs, so it does not go with "
                             "--shared-inputs")


def check_shrink(cfg: RunConfig) -> None:
    """Reject what does not go with a smaller model. Raises ValueError naming the flag."""
    if cfg.shared_inputs:
        raise ValueError("--shared-inputs: looks at the dense model alone, so it does not go with --shrink")
    if cfg.format not in (None, "dense") and (cfg.uneven or any(part for part, _ in cfg.dropped_parts)):
        raise ValueError(f"--format {cfg.format}: layers that differ (--uneven, --drop mlp:3) are stored dense; leave "
                         "out one")
    if cfg.sensitivity != "none":
        raise ValueError("--sensitivity: looks at linears of the model before it gets smaller; measure it without "
                         "--shrink")
    if cfg.shrink_target and not any(module.updates for module in chain(cfg.shrink_method)):
        raise ValueError(f"--shrink-target {cfg.shrink_target:g}: --shrink-method {cfg.shrink_method} leaves the "
                         "weights it keeps unchanged, so it cannot aim at a target; use obs")


def rounded_to(model: str) -> str | None:
    """The `--quantise` that a checkpoint of oneshot's was saved with."""
    try:
        return checkpoint.read_manifest(model)["record"]["settings"].get("quantise")
    except (ValueError, OSError, LookupError, TypeError, AttributeError):
        return None  # no such checkpoint


def pruned_before(model: str) -> bool:
    """Whether a checkpoint of oneshot's was pruned, by the patterns of its linears."""
    try:
        return any(entry["pattern"] != "dense" for entry in checkpoint.read_manifest(model)["tensors"].values())
    except (ValueError, OSError, LookupError, TypeError, AttributeError):
        return False  # no such checkpoint


def check_text(cfg: RunConfig) -> None:
    """Reject what does not go with healing on text. Raises ValueError naming the flag."""
    if cfg.text_heals and sharded.asked() and ("lora" in cfg.text_heals or distributed.world() == 1):
        why = "is not divided among processes" if "lora" in cfg.text_heals else "needs several processes (torchrun)"
        raise ValueError(f"{sharded.VARIABLE}: is set, and --heal {cfg.text_heals[0]} {why}; unset it")
    if cfg.text_heals and cfg.heal_data is None:
        raise ValueError(f"--heal {cfg.heal}: {cfg.text_heals[0]} trains on text; give --heal-data, such as c4 or "
                         "a file")
    if cfg.method == "keep" and not cfg.shrinks and not cfg.heal_teacher and cfg.text_heals and (
            set(listed(cfg.heal_loss)) & {"kl", "hidden"}):
        raise ValueError(f"--heal-loss {cfg.heal_loss}: aims at the dense model, and nothing says which one --model "
                         f"{cfg.model} was made from; name it by --heal-teacher, or use --heal-loss next")
    if cfg.method == "keep" and cfg.text_heals and cfg.quantise is None and (grid := rounded_to(cfg.model)):
        raise ValueError(f"--model {cfg.model}: its weights are rounded ({grid}), which training undoes; heal the one "
                         f"that was rounded, or give --quantise {grid} to round the result again")
    if cfg.text_heals and importlib.util.find_spec("accelerate") is None:
        raise ValueError(f"--heal {cfg.text_heals[0]}: needs accelerate; pip install 'oneshot[heal]'")
    if cfg.text_heals and os.environ.get(TENSORBOARD) and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(f"{TENSORBOARD}: is set, and tensorboard is not installed; pip install tensorboard, or unset "
                         "it")
    if "lora" in cfg.heals and cfg.healing["lora"].adapter:
        check_adapter(cfg, f"--lora.adapter {cfg.healing['lora'].adapter}")
    if cfg.heal_data is not None and not cfg.text_heals:
        raise ValueError(f"--heal-data {cfg.heal_data}: goes with --heal full or --heal lora")


def check_adapter(cfg: RunConfig, said: str) -> None:
    """Reject an adapter whose model would have zeros to keep, or not be what `--model` names. Raises ValueError.

    said: the flag and its value, the start of the message.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{said}: needs peft; pip install 'oneshot[heal]'")
    if cfg.pattern != "dense" or cfg.allocate != "uniform" or pruned_before(cfg.model):
        raise ValueError(f"{said}: the model has zeros, {lora.FILLS}")
    if cfg.shrinks or cfg.heals != ["lora"]:
        raise ValueError(f"{said}: an adapter fits a model that is saved, and this command changes it first; save that "
                         "one without --heal lora, then give its folder to `oneshot heal` --method lora")


def check_devices(cfg: RunConfig) -> None:
    """Raise ValueError naming the flag when a device does not exist."""
    environment.check_device(cfg.device)
    if distributed.world() > 1 and ":" in cfg.device:
        raise ValueError(f"--device {cfg.device}: is one GPU for all processes of torchrun; give cuda")
    if cfg.activations:
        environment.check_device(cfg.activations, "--activations")


def check_heal(cfg: RunConfig, model: nn.Module) -> None:
    """Raise ValueError naming the flag when this model cannot be healed on this device by the chosen methods."""
    known = cfg.shrink if cfg.by == "parameters" and cfg.shrink else 0.0
    asked = heal.Run(cfg.device, cfg, known if cfg.shrinks else 1.0)
    for name, own in cfg.healing.items():
        getattr(heal.module(name), "check_model", lambda *args: None)(model, own, asked)


def check_model(model: nn.Module) -> None:
    """Raise ValueError naming `--model` for a model that cannot be pruned.

    That is: no decoder-only transformers model; one with an adapter; with a parameter that is offloaded, not finite or
    not floating-point; that does not predict the next token; or whose experts cannot be observed one by one.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("--model: is a PeftModel; merge the adapter first (merge_and_unload), give the merged model")
    check_kind(model, "--model")
    check_parameters(model, "--model")
    _, block_list = models.blocks(model)
    said = [getattr(m, name, None) for m in block_list.modules() for name in ("is_causal", "is_decoder")]
    if False in said and True not in said:  # AutoModelForCausalLM silently loads BERT
        raise ValueError(f"--model: {type(model).__name__} attends to later tokens, so it is an encoder; only "
                         "decoder-only models can be pruned")
    for name, p in models.stored(model):
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise ValueError(f"--model: {name} holds weights that are not finite; the checkpoint is damaged, "
                             "fetch or convert it again")
    for name, _, owner in models.unreached(model):
        if "expert" in type(owner).__name__.lower():
            raise ValueError(f"--model: {name} holds experts ({type(owner).__name__}) that cannot be seen one by one, "
                             "so most of the model would stay dense; this family is not supported")


def check_format(cfg: RunConfig, model: nn.Module, tokenizer: models.Tokenizer) -> None:
    """Raise ValueError naming `--format` for a model that a GGUF file cannot hold."""
    if cfg.format in gguf.FORMS and cfg.prunes:
        gguf.check_model(cfg.format, model, tokenizer, cfg.shrinks)


def check_shared(cfg: RunConfig, model: nn.Module) -> None:
    """Raise ValueError for settings that need each block's dense weights if blocks share weights (Zamba2)."""
    for flag, value in {"--heal": cfg.heals, "--dense-target": cfg.dense_target}.items():
        if cfg.prunes and value and models.shares_weights(model):
            raise ValueError(f"{flag}: blocks of this model share weights, so no block is dense once an earlier one is "
                             "pruned; leave it out")


def unreached_warnings(model: nn.Module) -> list[str]:
    """A warning about weights in the blocks that look prunable but are not, if they exceed 0.1 % of the blocks."""
    found = models.unreached(model)
    total = sum(p.numel() for p in models.blocks(model)[1].parameters())
    share = sum(p.numel() for _, p, _ in found) / total
    return [f"{len(found)} matrices in the blocks stay dense ({share:.1%} of the blocks' weights), such as "
            f"{found[0][0]}: no linear this program knows"] if share > 0.001 else []
