"""lm-eval tasks: find them, reject those that cannot be measured, load them, identify them by a hash."""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import hub
from ..runtime import environment
from ..runtime.hub import hub_away, offline
from ..runtime.inputs import check_file, parse_object, read_text, reason

ZEROSHOT7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # wanda, sparsegpt
GROUPS = {"zeroshot7": ZEROSHOT7}


def check(names: Sequence[str], task_path: str | None = None, limit: int | None = None) -> None:
    """Check as `prepare` does, then every document of local tasks that a run with `limit` uses.

    Raises ValueError naming `--tasks` and the document that is wrong.
    """
    names, manager = prepare(names, task_path)
    if task_path:
        for name, task in fetch(names, manager, task_path)["tasks"].items():
            check_documents(name, task, limit)


def prepare(names: Sequence[str], task_path: str | None = None) -> tuple[list[str], Any]:
    """(task names, lm-eval's TaskManager), after all checks that need no task data.

    names: lm-eval's task or group names, or "zeroshot7" for the seven tasks of the papers. task_path: a folder with
    your own task YAMLs, used instead of lm-eval's; the .jsonl files they name are checked as well.

    Raises ValueError naming `--tasks` or `--task-path` when lm-eval is missing, a task is unknown, a line of a file is
    not a JSON object, or the hub cannot be reached.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("--tasks: needs lm-eval; pip install lm-eval") from None
    if task_path and not Path(task_path).is_dir():
        raise ValueError(f"--task-path {task_path}: no such folder")
    names = list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
    if not task_path and not offline() and (why := hub_away()):
        raise ValueError(f"--tasks {','.join(names)}: the hub with their data cannot be reached ({why}); use "
                         "--task-path with local files, or HF_HUB_OFFLINE=1 if they are in the cache")
    for file in sorted(Path(task_path).glob("**/*.yaml")) if task_path else ():
        check_is_file(file, f"--task-path {task_path}: {file.name}: ")
    manager = local_manager(task_path) if task_path else lm_evals_manager()
    check_known(names, manager, task_path)
    for name, config in configs(names, manager.task_index) if task_path else ():
        for file in local_files(config):
            check_is_file(file, f"--tasks {name}: {file}: ")
            if file.endswith(".jsonl"):
                check_lines(file, f"--tasks {name}: {file}: ")
    return names, manager


def check_is_file(file: str | Path, where: str) -> None:
    """Raise ValueError that starts with `where` for what cannot be read to its end: a folder, a pipe, a device."""
    try:
        check_file(file)
    except ValueError as error:
        raise ValueError(f"{where}cannot be read ({error})") from None


def local_manager(task_path: str) -> Any:
    """lm-eval's TaskManager for the task YAMLs in a folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=task_path, include_defaults=False)


@functools.cache
def lm_evals_manager() -> Any:
    """lm-eval's TaskManager for its own tasks: ten thousand YAMLs, read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_known(names: Sequence[str], manager: Any, task_path: str | None) -> None:
    """Raise ValueError naming `--tasks` for names that lm-eval does not know; for a local folder, list what it has."""
    if task_path and not manager.all_tasks:
        raise ValueError(f"--task-path {task_path}: holds no task YAML that lm-eval can read (task: or group: at its "
                         "top)")
    unknown = [name for name in names if name not in manager.all_tasks]
    if not unknown:
        return
    if not task_path:
        raise ValueError(f"--tasks {','.join(unknown)}: lm-eval knows no such task; `lm-eval ls tasks` lists them")
    read = {Path(entry.yaml_path) for entry in manager.task_index.values() if entry.yaml_path}
    unread = sorted(f.name for f in Path(task_path).glob("**/*.yaml") if f not in read)
    more = f"; lm-eval cannot read {', '.join(unread)}" if unread else ""
    raise ValueError(f"--tasks {','.join(unknown)}: no such task in --task-path {task_path}, which has "
                     f"{', '.join(sorted(manager.all_tasks))}{more}")


def configs(names: Sequence[str], index: Mapping[str, Any], within: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """(name, YAML as a dict) of each task that the names stand for, with groups and tags expanded.

    index: the TaskManager's. within: the groups that are being expanded. Raises ValueError for a group within itself.
    """
    for name in names:
        if name in within:
            raise ValueError(f"--tasks {within[0]}: the group {name} holds itself; correct its YAML")
        config = index[name].cfg or {}
        parts = index[name].tags if index[name].yaml_path is None else config.get("task")
        if isinstance(parts, str) or not parts:
            yield name, config
        else:
            yield from configs(sorted(part for part in parts if isinstance(part, str) and part in index), index,
                               (*within, name))


def fetch(names: Sequence[str], manager: Any, task_path: str | None = None) -> dict[str, Any]:
    """lm-eval's tasks with their data. Raises ValueError naming `--tasks` for any error in a YAML or its data.

    What lies in `task_path` is reported to nobody: by default `datasets` reports even local files to the hub, which
    counts downloads.
    """
    try:
        with quiet(), hub.uncounted() if task_path else contextlib.nullcontext():
            return manager.load(names)
    except Exception as error:
        what = "their data cannot be loaded" if isinstance(error, OSError) else "lm-eval cannot load them"
        raise ValueError(f"--tasks {','.join(names)}: {what} ({reason(error)}); --task-path takes tasks with "
                         "local files") from error


def local_files(config: Mapping[str, Any]) -> list[str]:
    """The local files that a task's YAML names as its data."""
    def walk(value: Any) -> Iterator[str]:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from walk(item)
        if isinstance(value, str):
            yield value

    files = walk((config.get("dataset_kwargs") or {}).get("data_files"))
    return [f for f in files if Path(f).suffix and "://" not in f and "*" not in f]


def check_lines(file: str, where: str) -> None:
    """Raise ValueError for the first line of a .jsonl that is not a JSON object. where: the start of the message."""
    try:
        lines = read_text(file).split("\n")
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{where}holds no document")
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            parse_object(line)
        except ValueError as error:
            raise ValueError(f"{where}line {n}: {error}") from None


def check_documents(name: str, task: Any, limit: int | None = None) -> None:
    """Raise ValueError for the first document that the task cannot use: a field is missing, the answer is no choice.

    task: lm-eval's. limit: check this many documents; None: all.
    """
    for n, doc in enumerate(itertools.islice(task.eval_docs, limit), 1):
        there = {k: v for k, v in doc.items() if v is not None}  # datasets fills missing fields with None
        try:
            text, target = task.doc_to_text(there), task.doc_to_target(there)
            choices = None if task.config.doc_to_choice is None else task.doc_to_choice(there)
        except Exception as error:  # the user's template failed on the user's data
            raise ValueError(f"--tasks {name}: document {n} does not fit its YAML ({reason(error)})") from error
        if task.OUTPUT_TYPE == "multiple_choice":
            if not (isinstance(choices, list) and choices):
                raise ValueError(f"--tasks {name}: document {n}: its choices must be a list that is not empty")
            gold = text if task.multiple_input else target  # as in WinoGrande, where the contexts are the choices
            if not all(pick in (range(len(choices)) if isinstance(pick, int) else choices)
                       for pick in (gold if isinstance(gold, list) else [gold])):
                raise ValueError(f"--tasks {name}: document {n}: its answer {gold!r} is none of its choices, which are "
                                 f"0 to {len(choices) - 1}")  # lm-eval would always count it as wrong


def digest(names: Sequence[str], task_path: str | None = None) -> str:
    """What identifies the tasks in a run's identity: sha256 of local tasks' YAML and data, or lm-eval's version."""
    names, manager = prepare(names, task_path)
    if not task_path:
        return f"lm_eval {environment.version('lm_eval')}"
    whole = hashlib.sha256()
    for name, task in sorted(fetch(names, manager, task_path)["tasks"].items()):
        config = {k: v for k, v in task.dump_config().items() if k not in ("dataset_kwargs", "metadata")}  # no paths
        whole.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        for split in sorted(task.dataset):
            whole.update(json.dumps([split, list(task.dataset[split])], default=str).encode())
    return whole.hexdigest()


def quiet() -> "Levels":
    """Within the context, lm-eval and datasets log errors only; oneshot reports what a user must know by itself."""
    return Levels("lm_eval", "datasets")


class Levels:
    """Within the context, the loggers of these names log errors only."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.before = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        for logger, level in zip(self.loggers, self.before, strict=True):
            logger.setLevel(level)
