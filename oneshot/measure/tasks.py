"""Zero-shot tasks through lm-eval (EleutherAI), on the model in memory: no second copy, standard errors kept.

What lm-eval says of a metric stands in `metric_info`, and with it what pairing two runs document by document takes
(report/accuracy.py): which documents were right, one bit each.
"""

import hashlib
import json
import math
from dataclasses import dataclass

from .. import models
from ..data.choose import check_least
from ..runtime.flag import flag, listed
from . import Found, Subject
from .task_list import GROUPS, check, digest, fetch, quiet
from .task_list import prepare as prepared

SCORED = ("multiple_choice", "loglikelihood")  # tasks of given continuations, scored by their log-probability


@dataclass(frozen=True)
class Config:
    tasks: str = flag("none", "lm-eval tasks to measure, separated by commas; zeroshot7: the papers' seven",
                      section="evaluation", bears_on="measuring")
    task_path: str | None = flag(None, "folder of task YAMLs of your own, instead of lm-eval's", section="evaluation",
                                 bears_on="measuring")
    task_limit: int | None = flag(None, "measure on the first so many documents of each task", section="evaluation",
                                  bears_on="measuring")

    def check(self):
        """Raise ValueError naming the flag whose value cannot be used."""
        check_least(self, {"task_limit": 1})

    @property
    def task_names(self) -> list[str]:
        """The lm-eval tasks to measure."""
        return listed(self.tasks)


def asked(cfg) -> bool:
    """Whether there is a task."""
    return bool(cfg.task_names)


def refuse(cfg) -> None:
    """Raise ValueError for tasks that cannot be measured."""
    check(cfg.task_names, cfg.task_path, cfg.task_limit)


def identity(cfg, texts) -> list[str]:
    """The hash of local tasks, the version of lm-eval's own."""
    return [digest(cfg.task_names, cfg.task_path)]


def measure(subject: Subject) -> Found:
    """What lm-eval says of every task."""
    cfg = subject.cfg
    values, how, warnings = evaluate(subject.model, subject.tokenizer, cfg.task_names, task_path=cfg.task_path,
                                     limit=cfg.task_limit, **subject.options)
    return Found(values, how, warnings=warnings)


def evaluate(model, tokenizer, names, *, task_path=None, batch_size=8, device="cpu", limit=None):
    """({"task/metric": value}, {"task/metric": how}, [warning]) of lm-eval tasks.

    names, task_path: see `prepare`; bad documents of local tasks are for `check` to refuse. limit: measure on the
    first so many documents of each task. how: see `flatten`.

    Raises ValueError naming `--tasks` when a task's data cannot be had or a choice is longer than the model's window.
    """
    asked, (names, manager) = names, prepared(names, task_path)
    from lm_eval.evaluator import evaluate as lm_evaluate  # simple_evaluate would ask pip for every package first
    from lm_eval.models.huggingface import HFLM

    loaded = fetch(names, manager)
    with models.resident(models.tensors_of(model), device), quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(device))
        try:
            found = lm_evaluate(wrapped, loaded, limit=limit, log_samples=True)
        except AssertionError:  # lm-eval asserts that every continuation fits
            refuse_long(wrapped, loaded["tasks"])
            raise
    metrics, info = flatten(found, {name: chance(task, found["samples"][name])
                                    for name, task in loaded["tasks"].items()})
    for name in GROUPS.keys() & set(asked):
        metrics[f"{name}/acc"], info[f"{name}/acc"] = mean_of(metrics, info, [f"{t}/acc" for t in GROUPS[name]])
    return metrics, info, cut_warnings(wrapped, loaded["tasks"], found["samples"])


def flatten(found, chances):
    """lm-eval's results as one flat pair of dicts; every metric without a filter suffix of its own.

    chances: {task: its chance level or None}. how of a metric: {"stderr": its standard error, "samples": documents,
    "correct": which were right, hex, the first document the highest bit (None where a document's value is not 0 or
    1), "documents": fingerprint of these documents as they were asked, "chance": expected of a guess, "group": the
    group that a task was measured for}.
    """
    metrics, info, subtasks = {}, {}, found.get("group_subtasks", {})
    parents = {child: group for group, children in subtasks.items() for child in children}
    for task, values in found["results"].items():
        leaves = leaves_of(task, subtasks)
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, (int, float)) or name in ("alias", "sample_len"):
                continue
            metric = f"{task}/{name}" + (f",{filtered}" if filtered not in ("", "none") else "")
            stderr = values.get(f"{name}_stderr,{filtered}")
            samples = [s for leaf in leaves for s in samples_of(found, leaf, filtered) if name in s]
            right = bits([s[name] for s in samples], value)
            metrics[metric] = float(value)
            info[metric] = {"stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                            "samples": len(samples), "correct": right, "documents": fingerprint(samples),
                            "chance": None, "group": parents.get(task)}
            if right is not None and name.startswith("acc") and None not in (known := [chances[x] for x in leaves]):
                counts = [len(samples_of(found, leaf, filtered)) for leaf in leaves]
                info[metric]["chance"] = sum(map(math.prod, zip(known, counts, strict=True))) / sum(counts)
    return metrics, info


def leaves_of(task, subtasks):
    """The tasks that a group consists of, in their order; of a task itself."""
    return [leaf for child in subtasks[task] for leaf in leaves_of(child, subtasks)] if task in subtasks else [task]


def samples_of(found, task, filtered):
    """A task's documents as lm-eval logged them for one filter, in their order."""
    return sorted((s for s in found["samples"].get(task, ()) if s["filter"] == filtered), key=lambda s: s["doc_id"])


def bits(values, mean):
    """Zeros and ones as hex, the first the highest bit; None if they are others, or `mean` is not theirs."""
    if not values or any(x not in (0, 1) for x in values) or not math.isclose(sum(values) / len(values), mean):
        return None
    return f"{int(''.join(str(int(x)) for x in values), 2):x}"


def fingerprint(samples):
    """16 hex digits of the documents, their prompts and their answers."""
    told = [(s["doc_hash"], s["prompt_hash"], s["target_hash"]) for s in samples]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def chance(task, samples):
    """Expected share of right answers of a uniform guess among each document's choices; None without choices."""
    if task.OUTPUT_TYPE != "multiple_choice" or not samples:
        return None
    shares = [(len(set(s["target"])) if isinstance(s["target"], list) else 1) / len(task.doc_to_choice(s["doc"]))
              for s in samples]
    return sum(shares) / len(shares)


def mean_of(metrics, info, parts):
    """(value, how) of the papers' mean over tasks, each counting the same."""
    errors, chances = ([info[p][key] for p in parts] for key in ("stderr", "chance"))
    return sum(metrics[p] for p in parts) / len(parts), {
        "stderr": None if None in errors else math.hypot(*errors) / len(parts),
        "samples": sum(info[p]["samples"] for p in parts), "mean_of": parts,
        "chance": None if None in chances else sum(chances) / len(parts)}


def refuse_long(wrapped, tasks):
    """Raise ValueError for the first document with a continuation of more tokens than the model has positions."""
    for name, task in tasks.items():
        for request in task.instances or ():
            if task.OUTPUT_TYPE in SCORED and (n := len(wrapped.tok_encode(request.args[1]))) > wrapped.max_length:
                raise ValueError(f"--tasks {name}: document {request.doc_id + 1} has a choice of {n} tokens, but the "
                                 f"model has {wrapped.max_length} positions; leave the task or the document out")


def cut_warnings(wrapped, tasks, samples):
    """A line for each task of which documents are longer than the model's window: lm-eval drops what stands first."""
    found = []
    for name, task in tasks.items():
        if task.OUTPUT_TYPE in SCORED:
            cut = {s["doc_id"] for s in samples[name] for context, continuation in s["arguments"]
                   if len(wrapped.tok_encode(context + continuation)) > wrapped.max_length + 1}
            if cut:
                found.append(f"--tasks {name}: {len(cut)} of {len(samples[name])} documents are longer than the model's"
                             f" {wrapped.max_length} positions and lost their beginning")
    return found
