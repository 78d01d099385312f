"""`oneshot prune`: prune a language model in one shot and measure what that cost. From start to end:

    load -> calibration tokens -> prune, block by block -> measure -> record, page, checkpoint
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from .. import checkpoint, measure, models, report
from ..checkpoint.bytes import model_bytes
from ..data import choose
from ..measure import Subject
from ..prune import shared_inputs
from ..quantise import grids
from ..report import page, summary
from ..runtime import distributed, environment, together
from ..runtime.command import exit_code
from ..runtime.files import remove_parts, writing
from ..settings import RunConfig, flags
from . import checks, idle, lesson, rounding
from .command import Command, held, load, seconds
from .compress import compress, sparsity
from .identity import describe, identify, paths, warnings
from .plan import Plan, make_plan, pruning_job
from .shrink import origin_of

SHORT_OF_MEMORY = "lower --batch-size, --gram-budget or --seqlen, or do without --heal distil"


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for and return the exit code (runtime/command.py)."""
    command = Command([])

    def interrupted() -> str:
        return "the same command resumes after the last finished block" if command.resumes else ""

    def work() -> None:
        distributed.start()
        given = flags.read(argv)
        command.configs = flags.expand(given)
        checks.check(command.configs)
        idle.check(given, command.configs)
        models.quiet()
        print(f"device: {environment.device_name(command.configs[0].device)}", file=sys.stderr)
        records = []
        with command.locked(command.configs):
            for cfg in command.configs:
                records.append(run(cfg, command))
                if len(command.configs) > 1:
                    print(summary.line(records[-1]), file=sys.stderr, flush=True)
        with writing("--results", command.configs[0].results):
            told = summary.text(records, Path(command.configs[0].results))
        print(told)

    return together.lead(lambda: exit_code(work, interrupted=interrupted, memory=SHORT_OF_MEMORY))


def run(cfg: RunConfig, command: Command | None = None, reuse: Callable[[Path], dict | None] | None = None) -> dict:
    """Do one run and return its record; with `--save` also save the pruned checkpoint, unless it is already finished.

    command: the runs of the command that this one belongs to. reuse: called with the record's file as soon as the
    run_id is known; if it returns a record, that is the result.

    Raises ValueError naming the flag for user errors, OSError when files cannot be written.
    """
    distributed.check()
    command = command or Command([cfg])
    with command.locked([cfg]):
        return made(cfg, command, reuse)


def made(cfg: RunConfig, command: Command, reuse: Callable[[Path], dict | None] | None) -> dict:
    """The record of one run whose folder is locked; see `run`."""
    began = time.perf_counter()
    model, tokenizer = load(cfg)
    loaded = time.perf_counter()
    checks.check_model(model)
    for other in (cfg, *command.configs):  # what does not fit the model is rejected before the first run is computed
        make_plan(other, model)
        rounding.check_model(other, model)
        checks.check_format(other, model, tokenizer)
        checks.check_heal(other, model)
        checks.check_shared(other, model)
    texts = choose.evaluation(cfg, model, tokenizer)
    teacher = lesson.check(cfg, model, tokenizer)
    measure.prepare(cfg, model, tokenizer)
    late = cfg.calibration == "self"  # it follows from weights and settings, so it can wait until the run_id is checked
    calibration = None if late else command.calibration(cfg, model, tokenizer)
    weights, run_id = identify(cfg, model, calibration, texts, teacher)
    file = Path(cfg.results) / f"{run_id}.json"
    folder = command.folder(cfg, run_id)
    remove_parts(cfg.results)
    if folder and folder.faults:
        print(f"{cfg.save}: finished earlier, but {'; '.join(folder.faults[:3])}: pruning again", file=sys.stderr)
    if folder and folder.finished:
        print(f"{cfg.save}: finished earlier, stored result", file=sys.stderr)
        with writing("--results", cfg.results):
            return report.write(report.checked(folder.record, cfg.save), file)
    if not cfg.prunes and command.saves and file.is_file():
        return report.read(file)
    if reuse and (record := reuse(file)):
        return record
    if late:
        calibration = command.calibration(cfg, model, tokenizer)
    prepared = time.perf_counter()
    together.hold(model, held, cfg)
    subject = Subject(model, tokenizer, cfg, texts, calibration, lambda: command.dense(cfg), teacher=teacher)
    record = work(subject, make_plan(cfg, model), command, folder)
    record |= {"run_id": run_id, "model": describe(cfg, model, weights)} | paths(cfg)
    record["seconds"] = seconds(record["seconds"], (began, loaded, prepared), folder)
    if folder:
        origin = {"origin": origin_of(cfg, subject.dense, model, record)} if cfg.shrinks else {}
        record = folder.finish(model, tokenizer, report.storable(record), cfg.format, page.of_one, origin)
    with writing("--results", cfg.results):
        return report.write(record, file)


def work(subject: Subject, plan: Plan, command: Command | None = None, folder: checkpoint.Folder | None = None) -> dict:
    """Prune in place (or write what the command has already solved), measure, and return the record.

    Only the entries `run_id` and `model` are missing, which the caller adds.
    """
    cfg, model, began = subject.cfg, subject.model, time.perf_counter()
    environment.reset_peak_memory(cfg.device)
    if cfg.prunes:
        subject.job = pruning_job(cfg, plan)
    found = measure.measure(subject, "before")
    if solved := command.solved(cfg) if command else None:
        starting, (result, weights) = time.perf_counter(), solved
        shared_inputs.write_weights(model, weights)
    else:
        starting = time.perf_counter()
        result = compress(subject, plan, folder)
    pruned = time.perf_counter()
    found.add(measure.measure(subject, "after"))
    done = time.perf_counter()
    return {
        "schema": report.SCHEMA, "status": "finished", "settings": cfg.settings(),
        "data": {"calibration": choose.describe(subject.calibration) if subject.calibration else None,
                 "evaluation": {name: choose.describe(t) for name, t in subject.texts.items()}},
        "environment": environment.environment(cfg.device), "metrics": found.metrics, "metric_info": found.info,
        "layers": result.layers, "blocks": result.blocks, "heal": result.heal, "skipped": result.skipped,
        "sparsity": sparsity(model),
        "bytes": model_bytes(model, result.layers, grids.parse(cfg.pattern) if cfg.row == "rounded" else None),
        "warnings": warnings(subject) + result.warnings + found.warnings,
        "peak_memory_bytes": environment.peak_memory(cfg.device),
        "seconds": {"prune": pruned - starting + result.seconds, "evaluate": done - pruned, "total": done - began},
    } | {key: part for key, part in (("shrunk", result.shrunk), ("head", result.head)) if part} | found.parts
