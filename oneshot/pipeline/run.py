"""`python -m oneshot.run`: prune a language model once and prove what it cost. The whole story, top to bottom.

    load -> calibration tokens -> prune, block by block -> evaluate -> record, page, checkpoint
"""

import dataclasses
import functools
import hashlib
import sys
import time
from pathlib import Path

import torch

from .. import checkpoint, heal, models, report
from ..checkpoint import packed
from ..data import choose
from . import checks
from ..prune import allocate, loop, patterns
from ..report import summary
from ..runtime import environment
from ..settings import flags
from ..measure import prompts, tasks
from ..quantise import rtn
from ..measure.sensitivity import sensitivity
from ..measure import measure
from ..prune.solvers import chain, short


def main(argv=None):
    """Run what the command line asks for. Exit code: 0 done, 2 the user can mend it (one line on stderr says what)."""
    configs = []
    try:
        configs = flags.parse(argv)
        checks.check(configs)
        models.quiet()
        records, sampled = [], {}
        shared = functools.cache(lambda: solve_shared(configs, sampled))  # solved when the first run needs it
        for i, cfg in enumerate(configs):
            solved = (lambda i=i: shared()[i]) if cfg.prunes and cfg.shared_inputs else None
            records.append(run(cfg, configs, solved, sampled=sampled))
            if len(configs) > 1:
                print(summary.line(records[-1]), file=sys.stderr, flush=True)
        print(summary.text(records, Path(configs[0].results)))
    except torch.OutOfMemoryError as error:
        return fail(f"out of memory ({one_line(error)}); lower --batch-size, --gram-budget or --seqlen, or do without "
                    "--recover distil")
    except (ValueError, OSError) as error:
        return fail(one_line(error))
    except KeyboardInterrupt:
        goes_on = any(cfg.save and not cfg.shared_inputs for cfg in configs)
        fail("interrupted" + "; the same command continues behind the last finished block" * goes_on)
        return 130
    return 0


def fail(text):
    print(f"error: {text}", file=sys.stderr)
    return 2


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def run(cfg, together=(), solved=None, reuse=None, sampled=None):
    """One run: its record. With `--save`, the pruned checkpoint as well; a finished one is not computed again.

    together: all runs of the command. Where one of them is saved, the dense row is not computed again either. solved:
    gives (Result, weights) of `solve_shared`; without it the model is pruned here. reuse: called with the record's file
    as soon as the run_id is known; a record that it returns is taken. sampled: a dict for the runs of one command,
    which keeps what `--calibration self` has sampled.
    """
    began = time.perf_counter()
    model, tokenizer = load(cfg)
    checks.check_model(model)
    loaded = time.perf_counter()
    plan = make_plan(cfg, model)
    checks.check_recovery(cfg, model)
    for other in together:  # what does not fit is refused before the first row is computed
        make_plan(other, model)
        checks.check_recovery(other, model)
    evaluations = choose.evaluation(cfg, model, tokenizer)
    if cfg.prompts:
        prompts.prepare(cfg.prompts, model, tokenizer)
    late = cfg.calibration == "self"  # follows from the weights and the settings, and takes long
    calibration = None if late else calibrate(cfg, model, tokenizer)
    weights, run_id = identify(cfg, model, calibration, evaluations)
    file = Path(cfg.results) / f"{run_id}.json"
    folder = checkpoint.Folder(cfg.save, run_id, cfg.overwrite) if cfg.save else None
    if folder and folder.finished:
        print(f"{cfg.save}: finished earlier, stored result", file=sys.stderr)
        return report.write(folder.record, file)
    if not cfg.prunes and any(other.save for other in together) and file.is_file():
        return report.read(file)
    if reuse and (record := reuse(file)):
        return record
    if late:
        calibration = calibrate(cfg, model, tokenizer, sampled)

    prepared = time.perf_counter()
    record = work(cfg, model, tokenizer, plan, calibration, evaluations, folder, solved)
    record |= {"run_id": run_id, "model": describe(cfg, model, weights)}
    record["seconds"] |= {"load": loaded - began, "data": prepared - loaded, "total": time.perf_counter() - began}
    if folder:
        record = folder.finish(model, tokenizer, report.storable(record), cfg.format)
    return report.write(record, file)


def load(cfg):
    """(model, tokenizer) as they are on disk."""
    return models.load(cfg.model, dtype=cfg.dtype, revision=cfg.model_revision, cache_dir=cfg.cache_dir,
                       trust_remote_code=cfg.trust_remote_code)


def solve_shared(configs, sampled=None):
    """{place of the run: (Result, weights)} for the runs with `--shared-inputs`, solved in one pass over the data.

    An allocation that looks at data takes one more, for all runs.
    """
    runs = {i: cfg for i, cfg in enumerate(configs) if cfg.prunes and cfg.shared_inputs}
    cfg = next(iter(runs.values()))
    model, tokenizer = load(cfg)
    checks.check_model(model)
    calibration = calibrate(next((c for c in runs.values() if needs_data(c)), cfg), model, tokenizer, sampled)
    began = time.perf_counter()
    plans = allocated(list(runs.values()), model, [make_plan(c, model) for c in runs.values()], calibration)
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    solved = loop.prune_shared(model, ids, mask, [(p, steps(c)) for p, c in zip(plans, runs.values(), strict=True)],
                               options_of(cfg))
    for result, _ in solved:
        result.seconds = (time.perf_counter() - began) / len(runs)
    return dict(zip(runs, solved, strict=True))


def identify(cfg, model, calibration, evaluations):
    """(fingerprint of the weights, run_id), both of the model before anything is done to it."""
    weights = models.fingerprint(model)
    return weights, cfg.run_id(weights, calibration.sha256 if calibration else None,
                               *(t.sha256 for t in evaluations.values()),
                               *([prompts.digest(cfg.prompts)] if cfg.prompts else []),
                               *([digest(cfg, weights)] if cfg.allocate == "sensitivity" and cfg.prunes else []),
                               *([tasks.digest(cfg.task_names, cfg.task_path)] if cfg.task_names else []))


def digest(cfg, weights):
    """sha256 of the record that an allocation by sensitivity reads. Raises ValueError if it is another model's."""
    file = cfg.allocation["sensitivity"].record
    _, measured = allocate.module("sensitivity").read(file)
    if measured != weights:
        raise ValueError(f"--sensitivity.record {file}: was measured on another model; measure this one with "
                         "--sensitivity linear")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def work(cfg, model, tokenizer, plan, calibration, evaluations, folder=None, solved=None):
    """Prune in place (or write what is `solved`) and measure: the record, but for what only the caller knows (run_id,
    model)."""
    began = time.perf_counter()
    environment.reset_peak_memory(cfg.device)
    found = sensitivities(cfg, model, calibration, plan, evaluations)
    result, weights = solved() if solved else (None, None)
    starting = time.perf_counter()
    if solved:
        loop.write(model, weights)
    else:
        [plan] = allocated([cfg], model, [plan], calibration)
        result = prune_model(cfg, model, plan, calibration, folder)
        prove(model, plan, result.layers)
    pruned = time.perf_counter()
    metrics, info, more = measure(cfg, model, tokenizer, evaluations, calibration, lambda: load(cfg)[0])
    done = time.perf_counter()
    return {
        "schema": report.SCHEMA, "status": "finished", "settings": cfg.settings(),
        "data": {"calibration": choose.describe(calibration) if calibration else None,
                 "evaluation": {name: choose.describe(t) for name, t in evaluations.items()}},
        "environment": environment.environment(cfg.device), "metrics": metrics, "metric_info": info,
        "layers": result.layers, "blocks": result.blocks, "recovery": result.recovery,
        "skipped": result.skipped, "sparsity": sparsity(model),
        "bytes": rtn.model_bytes(model, result.layers, "dense" if cfg.prunes else cfg.pattern),
        "warnings": choose.warnings(cfg, model, calibration, evaluations) + result.warnings
                    + more.pop("warnings", []),
        "peak_memory_bytes": environment.peak_memory(cfg.device),
        "seconds": {"prune": pruned - starting + result.seconds, "evaluate": done - pruned, "total": done - began},
    } | more | found


def sensitivities(cfg, model, calibration, plan, evaluations):
    """{"sensitivity": rows} where asked for, measured on the first text."""
    if cfg.sensitivity == "none" or not cfg.prunes:
        return {}
    evaluation = next(iter(evaluations.values()))
    return {"sensitivity": sensitivity(model, calibration, plan, steps(cfg), evaluation, cfg.sensitivity,
                                       options_of(cfg), cfg.eval_batch_size)}


def prove(model, plan, rows):
    """Every pattern on the stored weights once more, after all repairs, and the zeros that are there now."""
    rows = {row["name"]: row for row in rows}
    for name, weight in models.all_weights(model):
        W = weight.get()
        assert name not in plan or plan[name].holds(W), f"{name}: pattern {plan[name]} broken"
        if row := rows.get(name):
            row["zeros"] = W.numel() - int(W.count_nonzero())
            row["surplus"] = row["zeros"] - row["target_zeros"]


def calibrate(cfg, model, tokenizer, sampled=None):
    """Calibration Tokens, or None when nothing needs them. sampled: see `run`."""
    if not needs_data(cfg):
        return None
    if sampled is None or cfg.calibration != "self":
        return choose.calibration(cfg, model, tokenizer)
    if not sampled:
        sampled["self"] = choose.calibration(cfg, model, tokenizer)
    return sampled["self"]


def needs_data(cfg):
    looks = cfg.layer_errors or cfg.recoveries or cfg.dense_target or allocate.module(cfg.allocate).needs
    return cfg.prunes and bool(looks or any(m.needs for m, _ in steps(cfg)))


def steps(cfg):
    """The solver chain with its settings: [(module, cfg), ...]."""
    return [(module, cfg.solver[short(module)]) for module in chain(cfg.method)]


def make_plan(cfg, model):
    """{linear: Pattern}, the same everywhere (`--allocate mix`: dense where it does not fit); empty where nothing is
    pruned."""
    if not cfg.prunes:
        return {}
    if packed.linears(model):
        raise ValueError(f"--model {cfg.model}: is pruned and packed already; give the dense model, or --method dense "
                         "to measure this one")
    way, elsewhere = allocate.module(cfg.allocate), None
    if hasattr(way, "check"):
        way.check(blocks_of(model), pattern_of(cfg), cfg.allocation[cfg.allocate])
        elsewhere = patterns.Dense()
    return loop.make_plan(model, pattern_of(cfg), steps(cfg), elsewhere)


def pattern_of(cfg):
    """What `--pattern` asks for, its comparison group named."""
    return patterns.parse(cfg.pattern, cfg.group).with_default_group(steps(cfg)[0][1].group)


def blocks_of(model):
    """[{linear: its shape and itemsize}], one dict a block, as the ways to allocate take them."""
    name, block_list = models.blocks(model)
    return [{f"{name}.{b}.{v.name}": allocate.Linear(*v.shape, v.stored.itemsize) for v in models.linears(block)[0]}
            for b, block in enumerate(block_list)]


def allocated(configs, model, plans, calibration):
    """The runs' plans with their zeros spread over the linears as `--allocate` says; one survey serves all runs."""
    cfg = configs[0]  # the runs of a command differ in method and pattern
    way, own = allocate.module(cfg.allocate), cfg.allocation.get(cfg.allocate)
    if not plans[0] or cfg.allocate == "uniform":
        return plans
    name, _ = models.blocks(model)
    measured = {pattern_of(c): {} for c in configs}
    if way.needs:
        for b, _, weights, statistics in loop.survey(model, calibration.ids, calibration.mask, way.needs, options_of(cfg)):
            seen = {f"{name}.{b}.{v.name}": (v.get, statistics[v.name]) for v in weights if v.name in statistics}
            for pattern, values in measured.items():
                values |= way.measure(seen, pattern, own)
    blocks = blocks_of(model)
    return [way.plan(measured[pattern_of(c)], blocks, pattern_of(c), own) for c in configs]


def prune_model(cfg, model, plan, calibration, folder=None):
    """Prune in place; the loop's Result. With a folder: keep each block, continue behind those kept before."""
    if not plan:
        _, block_list = models.blocks(model)
        found = rtn.quantise(model, cfg.pattern) if cfg.method == rtn.METHOD else []
        return loop.Result(skipped=[{"name": n, "reason": why} for n, why in models.outside(model, block_list)],
                           warnings=found)
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    repair, options = None, options_of(cfg)
    if cfg.recovery:
        options = dataclasses.replace(options, held_out=heal.held_out_windows(len(ids), cfg.seed))
    if "block" in cfg.recovery:
        repair = functools.partial(heal.module("block").repair, cfg=cfg.recovery["block"], seed=cfg.seed)
    done, on_block = (folder.blocks(), folder.save_block) if folder else ((), None)
    result = loop.prune_model(model, ids, mask, plan, steps(cfg), options, repair=repair, finished=done,
                              on_block=on_block)
    if "distil" in cfg.recovery:
        began = time.perf_counter()
        with loop.float32_products(cfg.tf32):
            info = heal.module("distil").repair(model, result.dense, cfg.recovery["distil"], cfg.seed, cfg.progress)
        result.warnings += [f"--recover distil: {w}" for w in info.pop("warnings", [])]
        result.recovery = {"distil": info | {"seconds": time.perf_counter() - began}}
    result.dense = None  # hidden states of the whole calibration set
    return result


def options_of(cfg):
    """How the loop is to compute."""
    return loop.Options(
        device=cfg.device, batch_size=cfg.batch_size, true_sequential=cfg.true_sequential,
        gram_budget=int(cfg.gram_budget * 2**30), activations=cfg.activations,
        activation_dtype=getattr(torch, cfg.activation_dtype) if cfg.activation_dtype else None,
        layer_errors=cfg.layer_errors, dense_target=cfg.dense_target, dense_stream=bool(cfg.recoveries),
        stop_on_collapse=cfg.stop_on_collapse, tf32=cfg.tf32, progress=cfg.progress)


def describe(cfg, model, weights):
    _, block_list = models.blocks(model)
    return {"name": Path(cfg.model.rstrip("/")).name, "family": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prunable": sum(weight.shape[0] * weight.shape[1] for _, weight in models.all_weights(model)),
            "dtype": str(model.dtype).removeprefix("torch."), "blocks": len(block_list), "fingerprint": weights}


def sparsity(model):
    """Share of zeros among the prunable weights, counted on what will be stored."""
    zeros = total = 0
    for _, weight in models.all_weights(model):
        total += weight.shape[0] * weight.shape[1]
        zeros += weight.shape[0] * weight.shape[1] - int(weight.get().count_nonzero())
    for linear in packed.linears(model):
        total += linear.rows * linear.in_features
        zeros += linear.rows * linear.in_features - int(linear.weight.count_nonzero())
    return zeros / total if total else 0.0


if __name__ == "__main__":
    sys.exit(main())
