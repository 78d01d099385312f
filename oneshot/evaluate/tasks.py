"""Zero-shot tasks through lm-eval (EleutherAI), on the model in memory: no second copy, standard errors kept."""

import os
from pathlib import Path

from .. import models, sources

ZEROSHOT7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # wanda, sparsegpt
GROUPS = {"zeroshot7": ZEROSHOT7}


def prepare(names, task_path=None):
    """(task names, lm-eval's task manager), after all that can be refused before a model is loaded was refused.

    names: lm-eval's task or group names, or "zeroshot7" for the papers' seven. task_path: a folder of task YAMLs of
    your own, used instead of lm-eval's.

    Raises ValueError naming `--tasks` when lm-eval is missing, a task is unknown, or the hub cannot be reached.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("--tasks: needs lm-eval; pip install lm-eval") from None
    if task_path and not Path(task_path).is_dir():
        raise ValueError(f"--task-path {task_path}: no such folder")
    names = [task for name in names for task in GROUPS.get(name, (name,))]
    if not task_path and not offline() and (why := sources.hub_away()):
        raise ValueError(f"--tasks {','.join(names)}: the hub with their data cannot be reached ({why}); use "
                         "--task-path with local files, or HF_HUB_OFFLINE=1 if they are in the cache")
    manager = TaskManager(include_path=task_path, include_defaults=not task_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"--tasks {','.join(unknown)}: lm-eval knows no such task"
                         + (f" in --task-path {task_path}" if task_path else "; `lm-eval ls tasks` lists them"))
    return names, manager


def offline():
    """Whether the user has told the Hugging Face libraries to stay with their cache."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def evaluate(model, tokenizer, names, *, task_path=None, batch_size=8, device="cpu", limit=None):
    """({"task/metric": value}, {"task/metric": {"stderr", "samples"}}) of lm-eval tasks.

    names, task_path: see `prepare`. limit: measure on at most so many samples a task.

    Raises ValueError naming `--tasks` when a task's data cannot be had.
    """
    names, manager = prepare(names, task_path)
    from lm_eval.evaluator import evaluate as lm_evaluate  # simple_evaluate would ask pip for every package first
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import get_task_dict

    with models.resident(models.tensors_of(model), device):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(device))
        try:
            found = lm_evaluate(wrapped, get_task_dict(names, manager), limit=limit, log_samples=False)
        except OSError as error:  # ConnectionError and FileNotFoundError among them
            line = str(error).strip().split("\n")[0]
            raise ValueError(f"--tasks {','.join(names)}: their data cannot be had ({line}); "
                             "use --task-path with local files") from error
    return flatten(found)


def flatten(found):
    """lm-eval's results as one flat pair of dicts; every metric without a filter suffix of its own."""
    metrics, info = {}, {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, (int, float)) or name in ("alias", "sample_len"):
                continue
            metric = f"{task}/{name}" + (f",{filtered}" if filtered not in ("", "none") else "")
            stderr = values.get(f"{name}_stderr,{filtered}")
            metrics[metric] = float(value)
            info[metric] = {"stderr": stderr if isinstance(stderr, (int, float)) else None,
                            "samples": found.get("n-samples", {}).get(task, {}).get("effective")}
    return metrics, info
