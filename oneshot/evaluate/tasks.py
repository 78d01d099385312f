"""Zero-shot tasks through lm-eval (EleutherAI), on the model in memory: no second copy, standard errors kept."""

from .. import models

ZEROSHOT7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # wanda, sparsegpt
GROUPS = {"zeroshot7": ZEROSHOT7}


def evaluate(model, tokenizer, names, *, task_path=None, batch_size=8, device="cpu", limit=None):
    """({"task/metric": value}, {"task/metric": {"stderr", "samples"}}) of lm-eval tasks.

    names: lm-eval's task or group names, or "zeroshot7" for the papers' seven. task_path: a folder of task YAMLs of
    your own, used instead of lm-eval's when given. limit: measure on at most so many samples a task.

    Raises ValueError naming `--tasks` when lm-eval is missing, a task is unknown, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("--tasks: needs lm-eval; pip install lm-eval") from None
    names = [task for name in names for task in GROUPS.get(name, (name,))]
    manager = TaskManager(include_path=task_path, include_defaults=task_path is None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--tasks {','.join(unknown)}: lm-eval knows no such task"
                         + (f" in --task-path {task_path}" if task_path else "; `lm-eval ls tasks` lists them"))
    with models.resident(models.tensors_of(model), device):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(device))
        try:
            found = simple_evaluate(wrapped, tasks=names, task_manager=manager, limit=limit, log_samples=False)
        except (OSError, ConnectionError, FileNotFoundError) as error:
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
