"""Idle flags: what was given on a command line and would change nothing in any of its runs is refused.

A run that silently does without a flag is taken for one that used it. A flag that does something in one of several runs
is fine, and so are those that scripts give to every command alike (--cache-dir, --nsamples, --seed, --tf32 ...).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import HUB_SETS, choose, files, sources, training
from ..prune import allocate
from ..prune.patterns import Unstructured, parse
from ..runtime.flag import listed
from ..settings import RunConfig
from ..settings.known import known, todays_names
from .plan import needs_data, pruning_chain

TABLES = (".json", ".jsonl", ".csv", ".parquet")


def check(given: Mapping[str, Any], configs: Sequence[RunConfig]) -> None:
    """Raise ValueError naming the first flag of {flag: value} that no run of the command uses."""
    for name, value in todays_names(dict(given)).items():
        changes = name in known() and value != known()[name].default
        if changes and (why := idle(name, configs)):
            raise ValueError(f"{known()[name].option}: would do nothing, {why}; leave it out")


def idle(name: str, configs: Sequence[RunConfig]) -> str | None:
    """Why a flag does nothing in any of the runs; None if it does something."""
    cfg, pruned = configs[0], [c for c in configs if c.prunes]
    if name in RULES:
        why, used = RULES[name]
        return None if used(cfg, configs) else why
    about = known()[name].metadata
    recipe = about.get("section") in ("what", "smaller") and about["bears_on"] == "pruning"
    return "as nothing is pruned" if recipe and not pruned else None


def texts(cfg: RunConfig, configs: Sequence[RunConfig]) -> list[str]:
    """The texts that the command reads: for calibration, if any run needs it, for evaluation, and to heal on."""
    calibration = [cfg.calibration] if any(needs_data(c) for c in configs) else []
    healing = [text for c in configs if c.text_heals for text in (c.heal_data, c.heal_held_out) if text]
    names = [*calibration, *(name for text in healing for _, name in training.mixture(text))]
    return [name for name in names if name != "self"] + list(choose.named(cfg).values())


def kinds(cfg: RunConfig, configs: Sequence[RunConfig]) -> list[str]:
    """What the texts are: "papers" (wikitext2 ...), "hub", or a file's suffix; "" for what is built in."""
    return [kind(spec) for spec in texts(cfg, configs)]


def kind(spec: str) -> str:
    """What one text is, see `kinds`."""
    if files.is_known(Path(spec)):
        return files.kind(Path(spec))
    return "papers" if spec in HUB_SETS else "hub" if sources.is_hub(spec) else ""


def measures_text(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether there is a text to evaluate on."""
    return bool(cfg.evaluations)


def has_tasks(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether there are tasks."""
    return bool(cfg.task_names)


def waits(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether any run needs calibration data, so that activations are kept between blocks."""
    return any(needs_data(c) for c in configs)


def gathers_grams(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether any run gathers Gram matrices."""
    return any(c.prunes and (c.dense_target or {"outer", "cross"} & set(allocate.module(c.allocate).needs)
                             or any({"outer", "cross"} & set(module.needs) for module, _ in pruning_chain(c)))
               for c in configs)


def calibrates_on_the_hub(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether the calibration text is a data set on the hub."""
    return waits(cfg, configs) and kind(cfg.calibration) in ("hub", "papers")


def reads(*wanted: str) -> Callable[[RunConfig, Sequence[RunConfig]], bool]:
    """The rule whether a text of one of these kinds is read."""
    return lambda cfg, configs: bool(set(wanted) & set(kinds(cfg, configs)))


def shrinks(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether any run makes the model smaller."""
    return any(c.prunes and c.shrinks for c in configs)


def chooses(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether any run chooses among mixtures."""
    return any(c.prunes and c.shrink is not None and not c.says_what_goes for c in configs)


def compares(cfg: RunConfig, configs: Sequence[RunConfig]) -> bool:
    """Whether any run heals on text towards the dense model's predictions."""
    return any(c.text_heals and "kl" in listed(c.heal_loss) for c in configs)


NO_KL = "as nothing is healed by --heal-loss kl"
NO_TEXT, NO_TASK = "as nothing is evaluated (--evaluate none)", "as there are no --tasks"
RULES = {  # flag: (why it is idle, whether it is used: called with a run and all runs of the command)
    "eval_seqlen": (NO_TEXT, measures_text),
    "eval_windows": (NO_TEXT, measures_text),
    "robustness": (NO_TEXT, measures_text),
    "eval_batch_size": ("as nothing is evaluated", lambda cfg, _: bool(cfg.evaluations or cfg.task_names)),
    "task_path": (NO_TASK, has_tasks),
    "task_limit": (NO_TASK, has_tasks),
    "trust_task_code": ("as there is no --task-path", lambda cfg, _: bool(cfg.task_path and cfg.task_names)),
    "column": ("as no text has columns", reads(*TABLES, "hub")),
    "data_config": ("as no text is a data set owner/name of the hub", reads("hub")),
    "split": ("as the calibration text is not a data set on the hub", calibrates_on_the_hub),
    "revision": ("as the calibration text is not a data set on the hub", lambda cfg, configs: kind(cfg.calibration) in (
        "hub", "papers") and cfg.calibration in texts(cfg, configs)),
    "per_line": ("as no text is a .txt file", reads(".txt")),
    "documents": ("as no text is read", lambda cfg, configs: bool(texts(cfg, configs))),
    "bos": ("as no text is read", lambda cfg, configs: bool(texts(cfg, configs))),
    "activations": ("as no run looks at calibration data", waits),
    "activation_dtype": ("as no run looks at calibration data", waits),
    "gram_budget": ("as none of these methods collects Gram matrices", gathers_grams),
    "group": ("as only a sparsity such as --pattern 0.5 has comparison groups", lambda cfg, configs: any(
        isinstance(parse(c.pattern), Unstructured) for c in configs if c.prunes)),
    "quantiser": ("as there is no --quantise", lambda cfg, configs: any(c.quantise is not None for c in configs)),
    "format": ("as nothing is pruned", lambda cfg, configs: any(c.prunes for c in configs)),
    "by": ("as there is no --shrink", lambda cfg, configs: any(c.prunes and c.shrink is not None for c in configs)),
    "order": ("as no run chooses blocks that go (--shrink, --layers)", lambda cfg, configs: any(
        c.prunes and (c.layers is not None or (c.shrink is not None and not c.says_what_goes and c.tries > 1))
        for c in configs)),
    "tries": ("as no run chooses a mixture (--shrink without --layers or --drop)", chooses),
    "uneven": ("as there is no --shrink to spread over the layers",
               lambda cfg, configs: any(c.prunes and c.shrink is not None for c in configs)),
    "shrink_method": ("as the model is not made smaller (--shrink)", shrinks),
    "shrink_target": ("as the model is not made smaller (--shrink)", shrinks),
    "overwrite": ("as nothing is saved (--save)", lambda cfg, configs: any(c.save for c in configs)),
    "model_revision": ("as the model is a local folder", lambda cfg, _: cfg.model != "demo"
                       and not os.path.exists(os.path.expanduser(cfg.model))),
    "sensitivity": ("as nothing is pruned", lambda cfg, configs: any(c.prunes for c in configs)),
    "heal_cache": (NO_KL, compares),
    "heal_temperature": (NO_KL, compares),
    "heal_top_k": (NO_KL, compares),
    "divergence": ("as there is only the dense model", lambda cfg, configs: any(c.row != "dense" for c in configs)),
    "damage": ("as there is only the dense model", lambda cfg, configs: any(c.row != "dense" for c in configs)),
}
