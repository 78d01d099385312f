"""Zero-shot tasks with lm-eval (EleutherAI), run on the model in memory without a second copy.

The record's `metric_info` keeps lm-eval's standard errors and, for every document, one bit that says whether the answer
was right. With these, report/accuracy.py can compare two runs document by document.
"""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import models
from ..data import Tokens, embedding, encode
from ..data.choose import check_least
from ..models import Tokenizer
from ..runtime import products
from ..runtime.flag import Settings, flag, listed
from . import Found, Subject
from .task_list import GROUPS, check, digest, fetch, quiet
from .task_list import prepare as prepared

SCORED = ("multiple_choice", "loglikelihood")  # output types that score given continuations by log-probability
higher = ("acc", "exact_match", "em", "f1", "agreement", "mcc", "bleu", "rouge")


@dataclass(frozen=True)
class Config:
    tasks: str = flag("none", "lm-eval tasks to measure, separated by commas; zeroshot7: the seven of the papers",
                      section="evaluation", bears_on="measuring")
    task_path: str | None = flag(None, "folder with your own task YAMLs, used instead of lm-eval's",
                                 section="evaluation", bears_on="measuring")
    trust_task_code: bool = flag(False, "run what the YAMLs in --task-path bring: lm-eval executes their Jinja "
                                        "templates and !function lines", section="evaluation", bears_on="output",
                                 trusts=True)
    task_limit: int | None = flag(None, "maximum number of documents of each task, the first ones",
                                  section="evaluation", bears_on="measuring")

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        check_least(self, {"task_limit": 1})

    @property
    def task_names(self) -> list[str]:
        """The lm-eval tasks to measure."""
        return listed(self.tasks)


def asked(cfg: Settings) -> bool:
    """Whether there is a task."""
    return bool(cfg.task_names)


def refuse(cfg: Settings) -> None:
    """Raise ValueError naming `--tasks` or `--task-path` for tasks that cannot be measured."""
    if cfg.task_path and not cfg.trust_task_code:
        raise ValueError(f"--task-path {cfg.task_path}: lm-eval executes code in task YAMLs (Jinja templates, "
                         "!function lines); look at them, then add --trust-task-code")
    check(cfg.task_names, cfg.task_path, cfg.task_limit)


def prepare(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Raise ValueError naming a document of local tasks with a token that the model's embedding has no row for."""
    if not cfg.task_path or max(tokenizer.get_vocab().values(), default=0) < models.embedded(model):
        return
    names, manager = prepared(cfg.task_names, cfg.task_path)
    for name, task in fetch(names, manager, cfg.task_path)["tasks"].items():
        for n, doc in enumerate(itertools.islice(task.eval_docs, cfg.task_limit), 1):
            texts = [task.doc_to_text(doc), task.doc_to_target(doc)]
            texts += task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
            for text in texts:
                ids = torch.tensor(encode.encode(tokenizer, text) if isinstance(text, str) else [], dtype=torch.long)
                embedding.check(ids, model, tokenizer, f"--tasks {name}: document {n}")


def identity(cfg: Settings, texts: dict[str, Tokens]) -> list[str]:
    """The hash of local tasks; for lm-eval's own tasks its version."""
    return [digest(cfg.task_names, cfg.task_path)]


def measure(subject: Subject) -> Found:
    """The results of lm-eval for every task."""
    cfg = subject.cfg
    values, how, warnings = evaluate(subject.model, subject.tokenizer, cfg.task_names, task_path=cfg.task_path,
                                     limit=cfg.task_limit, **subject.options)
    return Found(values, how, warnings=warnings)


def evaluate(model: nn.Module, tokenizer: Tokenizer, names: Sequence[str], *, task_path: str | None = None,
             batch_size: int = 8, device: str = "cpu",
             limit: int | None = None) -> tuple[dict[str, float], dict[str, dict], list[str]]:
    """({"task/metric": value}, {"task/metric": info}, warnings) of lm-eval tasks.

    names, task_path: see `task_list.prepare`; invalid documents of local tasks are rejected by `task_list.check`.
    limit: maximum number of documents per task, the first ones. info: see `flatten`.

    Raises ValueError naming `--tasks` when a task's data cannot be loaded or a choice is longer than the model's
    window.
    """
    asked, (names, manager) = names, prepared(names, task_path)
    from lm_eval.evaluator import evaluate as lm_evaluate  # simple_evaluate would query pip for every package first
    from lm_eval.models.huggingface import HFLM

    loaded, said = fetch(names, manager, task_path), f"--tasks {','.join(asked)}"
    with models.resident(model, device), quiet(), models.own_code(f"{said}: cannot be measured"), \
            embedding.guarded(model, tokenizer, said), products.float32():
        own = copy.deepcopy(tokenizer)  # lm-eval gives it a pad token, which does not belong into a saved checkpoint
        wrapped = HFLM(pretrained=model, tokenizer=own, batch_size=batch_size, device=str(device))
        try:
            found = lm_evaluate(wrapped, loaded, limit=limit, log_samples=True)
        except AssertionError:  # lm-eval asserts that every continuation fits the model's window
            refuse_long(wrapped, loaded["tasks"])
            raise
    metrics, info = flatten(found, {name: chance(task, found["samples"][name])
                                    for name, task in loaded["tasks"].items()})
    for name in GROUPS.keys() & set(asked):
        metrics[f"{name}/acc"], info[f"{name}/acc"] = mean_of(metrics, info, [f"{t}/acc" for t in GROUPS[name]])
    return metrics, info, cut_warnings(wrapped, loaded["tasks"], found["samples"])


def flatten(found: Mapping[str, Any],
            chances: Mapping[str, float | None]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """lm-eval's results as two flat dicts, {"task/metric": value} and {"task/metric": info}.

    A metric's name has its filter as a suffix, unless that is "none". chances: {task: its chance level or None}. info:
    {"stderr": standard error, "samples": number of documents, "correct": which were right, as hex with the first
    document in the highest bit (None if a value is neither 0 nor 1), "documents": fingerprint of the documents as they
    were asked, "chance": expected result of guessing, "group": the group that the task belongs to}.
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


def leaves_of(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group consists of, in order; for a task, itself."""
    return [leaf for child in subtasks[task] for leaf in leaves_of(child, subtasks)] if task in subtasks else [task]


def samples_of(found: Mapping[str, Any], task: str, filtered: str) -> list[dict]:
    """A task's documents as lm-eval logged them for one filter, in order."""
    return sorted((s for s in found["samples"].get(task, ()) if s["filter"] == filtered), key=lambda s: s["doc_id"])


def bits(values: Sequence[float], mean: float) -> str | None:
    """Zeros and ones as hex, the first in the highest bit; None for other values, or if `mean` is not their mean."""
    if not values or any(x not in (0, 1) for x in values) or not math.isclose(sum(values) / len(values), mean):
        return None
    return f"{int(''.join(str(int(x)) for x in values), 2):x}"


def fingerprint(samples: Sequence[Mapping[str, Any]]) -> str:
    """16 hex digits that identify the documents, their prompts and their answers."""
    hashes = [(s["doc_hash"], s["prompt_hash"], s["target_hash"]) for s in samples]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def chance(task: Any, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Expected share of right answers when guessing uniformly among each document's choices; None without choices.

    task: lm-eval's.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not samples:
        return None
    shares = [(len(set(s["target"])) if isinstance(s["target"], list) else 1) / len(task.doc_to_choice(s["doc"]))
              for s in samples]
    return sum(shares) / len(shares)


def mean_of(metrics: Mapping[str, float], info: Mapping[str, dict],
            parts: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """(value, info) of the unweighted mean over the metrics `parts`, as the papers report it."""
    errors, chances = ([info[p][key] for p in parts] for key in ("stderr", "chance"))
    return sum(metrics[p] for p in parts) / len(parts), {
        "stderr": None if None in errors else math.hypot(*errors) / len(parts),
        "samples": sum(info[p]["samples"] for p in parts), "mean_of": parts,
        "chance": None if None in chances else sum(chances) / len(parts)}


def refuse_long(wrapped: Any, tasks: Mapping[str, Any]) -> None:
    """Raise ValueError for the first document with a continuation of more tokens than the model has positions.

    wrapped: lm-eval's HFLM. tasks: {name: lm-eval's task}.
    """
    for name, task in tasks.items():
        for request in task.instances or ():
            if task.OUTPUT_TYPE in SCORED and (n := len(wrapped.tok_encode(request.args[1]))) > wrapped.max_length:
                raise ValueError(f"--tasks {name}: document {request.doc_id + 1} has a choice of {n} tokens, but the "
                                 f"model has {wrapped.max_length} positions; leave the task or the document out")


def cut_warnings(wrapped: Any, tasks: Mapping[str, Any], samples: Mapping[str, Sequence[dict]]) -> list[str]:
    """A warning for each task with documents longer than the model's window; lm-eval drops their beginning."""
    found = []
    for name, task in tasks.items():
        if task.OUTPUT_TYPE in SCORED:
            cut = {s["doc_id"] for s in samples[name] for context, continuation in s["arguments"]
                   if len(wrapped.tok_encode(context + continuation)) > wrapped.max_length + 1}
            if cut:
                found.append(f"--tasks {name}: {len(cut)} of {len(samples[name])} documents are longer than the model's"
                             f" {wrapped.max_length} positions and lost their beginning")
    return found
