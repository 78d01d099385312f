"""`python -m oneshot.run`: prune a language model once and prove what it cost. The whole story, top to bottom.

    load -> calibration tokens -> prune, block by block -> evaluate -> record, page, checkpoint
"""

import dataclasses
import hashlib
import sys
import time
from pathlib import Path

import torch

from . import cli, data, environment, export, loop, models, packed, patterns, report, solvers
from .config import RunConfig
from .evaluate import tasks
from .evaluate.perplexity import perplexity
from .page import write_html


def main(argv=None):
    """Run what the command line asks for. Exit code: 0 done, 2 the user can mend it (one line on stderr says what)."""
    try:
        configs = cli.parse(argv)
        check(configs)
        models.quiet()
        records = []
        for cfg in configs:
            records.append(run(cfg, configs))
            if len(configs) > 1:
                print(progress_line(records[-1]), file=sys.stderr, flush=True)
        print(summary(records, Path(configs[0].results)))
    except torch.OutOfMemoryError as error:
        return fail(f"out of memory ({one_line(error)}); lower --batch-size, --gram-budget or --seqlen")
    except (ValueError, OSError) as error:
        return fail(one_line(error))
    except KeyboardInterrupt:
        fail("interrupted; with --save the same command continues behind the last finished block")
        return 130
    return 0


def fail(text):
    print(f"error: {text}", file=sys.stderr)
    return 2


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def check(configs):
    """Refuse what can be refused before a model is loaded. Raises ValueError naming the flag."""
    for cfg in configs:
        check_devices(cfg)
        if cfg.format == "packed" and cfg.method != "dense" and (cfg.pattern != "2:4" or not cfg.save):
            raise ValueError("--format packed: goes with --pattern 2:4 and --save")
        if cfg.save:
            export.owner_of(cfg.save)
            environment.check_writable(cfg.save, "--save")
            if Path(cfg.save).resolve() == Path(cfg.model).resolve():
                raise ValueError(f"--save {cfg.save}: is the model's own folder; choose another")
        environment.check_writable(cfg.results, "--results")
    if configs[0].task_names:
        tasks.prepare(configs[0].task_names, configs[0].task_path)


def check_devices(cfg):
    environment.check_device(cfg.device)
    if cfg.activations:
        environment.check_device(cfg.activations, "--activations")


def run(cfg, together=(), reuse=None):
    """One run: its record. With `--save`, the pruned checkpoint as well; a finished one is not computed again.

    together: all runs of the command. Where one of them is saved, the dense row is not computed again either.
    reuse: called with the record's file as soon as the run_id is known; a record that it returns is taken.
    """
    began = time.perf_counter()
    model, tokenizer = models.load(cfg.model, dtype=cfg.dtype, revision=cfg.model_revision, cache_dir=cfg.cache_dir,
                                   trust_remote_code=cfg.trust_remote_code)
    check_model(model)
    loaded = time.perf_counter()
    plan = make_plan(cfg, model)
    for other in together:
        make_plan(other, model)  # a pattern that does not fit is refused before the first row is computed
    evaluations = evaluation_texts(cfg, model, tokenizer)
    sampled = cfg.calibration == "self"  # follows from the weights and the settings, and takes long
    calibration = None if sampled else calibration_text(cfg, model, tokenizer)
    weights, run_id = identify(cfg, model, calibration, evaluations)
    file = Path(cfg.results) / f"{run_id}.json"
    folder = export.Folder(cfg.save, run_id, cfg.overwrite) if cfg.save else None
    if folder and folder.finished:
        print(f"{cfg.save}: finished earlier, stored result", file=sys.stderr)
        return report.write(folder.record, file)
    if cfg.method == "dense" and any(other.save for other in together) and file.is_file():
        return report.read(file)
    if reuse and (record := reuse(file)):
        return record
    if sampled:
        calibration = calibration_text(cfg, model, tokenizer)

    prepared = time.perf_counter()
    record = work(cfg, model, tokenizer, plan, calibration, evaluations, folder)
    record |= {"run_id": run_id, "model": describe(cfg, model, weights)}
    record["seconds"] |= {"load": loaded - began, "data": prepared - loaded, "total": time.perf_counter() - began}
    if folder:
        record = folder.finish(model, tokenizer, report.storable(record), cfg.format)
    return report.write(record, file)


def identify(cfg, model, calibration, evaluations):
    """(fingerprint of the weights, run_id), both of the model before anything is done to it."""
    weights = models.fingerprint(model)
    return weights, cfg.run_id(weights, calibration.sha256 if calibration else None,
                               *(t.sha256 for t in evaluations.values()))


def check_model(model):
    """Raise ValueError for a model that does not predict the next token, or naming a parameter that is not finite."""
    _, block_list = models.blocks(model)
    causal = [m.is_causal for m in block_list.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if causal and not any(causal):  # AutoModelForCausalLM loads BERT without a word
        raise ValueError(f"--model: {type(model).__name__} looks at the tokens to come, so it is an encoder; only "
                         "decoder-only models can be pruned")
    for name, p in model.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise ValueError(f"--model: {name} holds weights that are not finite; the checkpoint is damaged, "
                             "fetch or convert it again")


def work(cfg, model, tokenizer, plan, calibration, evaluations, folder=None):
    """Prune in place and measure: the record, but for what only the caller knows (run_id, model)."""
    began = time.perf_counter()
    environment.reset_peak_memory(cfg.device)
    result = prune_model(cfg, model, plan, calibration, folder)
    pruned = time.perf_counter()
    metrics, info = evaluate(cfg, model, tokenizer, evaluations)
    done = time.perf_counter()
    return {
        "schema": report.SCHEMA, "status": "finished", "settings": cfg.settings(),
        "data": {"calibration": describe_tokens(calibration) if calibration else None,
                 "evaluation": {name: describe_tokens(t) for name, t in evaluations.items()}},
        "environment": environment.environment(cfg.device), "metrics": metrics, "metric_info": info,
        "layers": result.layers, "blocks": result.blocks, "skipped": result.skipped, "sparsity": sparsity(model),
        "warnings": warnings(cfg, model, calibration, evaluations) + result.warnings,
        "peak_memory_bytes": environment.peak_memory(cfg.device),
        "seconds": {"prune": pruned - began, "evaluate": done - pruned, "total": done - began},
    }


def text_options(cfg):
    return data.TextOptions(column=cfg.column, config=cfg.data_config, split=cfg.split, revision=cfg.revision,
                            cache_dir=cfg.cache_dir, per_line=cfg.per_line, documents=cfg.documents)


def evaluation_texts(cfg, model, tokenizer):
    """{name: evaluation Tokens}, read and cut before any long work."""
    evaluations = {}
    for spec in cfg.evaluations:
        length = window(model, cfg.eval_seqlen, "--eval-seqlen") if cfg.eval_seqlen else \
            window(model, cfg.seqlen, "--seqlen")
        name = Path(spec).stem if Path(spec).suffix else spec.replace("/", "_")
        if name in evaluations:
            raise ValueError(f"--evaluate {spec}: a second text named {name}; rename one")
        pinned = cfg.revision if spec == cfg.calibration else None  # --split and --revision are the calibration set's
        options = dataclasses.replace(text_options(cfg), split=None, revision=pinned)
        evaluations[name] = data.evaluation(tokenizer, spec, seqlen=length, max_windows=cfg.eval_windows,
                                            options=options)
    return evaluations


def calibration_text(cfg, model, tokenizer):
    """Calibration Tokens, or None when nothing needs them."""
    if not needs_data(cfg):
        return None
    with models.resident(models.tensors_of(model) if cfg.calibration == "self" else (), cfg.device):
        return data.calibration(tokenizer, cfg.calibration, nsamples=cfg.nsamples,
                                seqlen=window(model, cfg.seqlen, "--seqlen"), seed=cfg.seed,
                                options=text_options(cfg), model=model, batch_size=cfg.batch_size,
                                progress=cfg.progress)


def needs_data(cfg):
    return cfg.method != "dense" and (cfg.layer_errors or any(m.needs for m, _ in steps(cfg)))


def steps(cfg):
    """The solver chain with its settings: [(module, cfg), ...]."""
    return [(module, cfg.solver[solvers.short(module)]) for module in solvers.chain(cfg.method)]


def window(model, asked, flag):
    """Tokens in a window: what was asked for, else min(2048, the model's positions)."""
    most = models.max_positions(model)
    if asked and most and asked > most:
        raise ValueError(f"{flag} {asked}: longer than the {most} positions of the model")
    return asked or min(2048, most or 2048)


def make_plan(cfg, model):
    """{linear: Pattern}, empty for the dense run."""
    if cfg.method == "dense":
        return {}
    return loop.make_plan(model, patterns.parse(cfg.pattern, cfg.group), steps(cfg))


def prune_model(cfg, model, plan, calibration, folder=None):
    """Prune in place; the loop's Result. With a folder: keep each block, continue behind those kept before."""
    if not plan:
        _, block_list = models.blocks(model)
        return loop.Result(skipped=[{"name": n, "reason": why} for n, why in models.outside(model, block_list)])
    options = loop.Options(
        device=cfg.device, batch_size=cfg.batch_size, true_sequential=cfg.true_sequential,
        gram_budget=int(cfg.gram_budget * 2**30), activations=cfg.activations,
        activation_dtype=getattr(torch, cfg.activation_dtype) if cfg.activation_dtype else None,
        layer_errors=cfg.layer_errors, tf32=cfg.tf32, progress=cfg.progress)
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    return loop.prune_model(model, ids, mask, plan, steps(cfg), options, finished=folder.blocks() if folder else (),
                            on_block=folder.save_block if folder else None)


def evaluate(cfg, model, tokenizer, evaluations):
    """({metric: value}, {metric: how it was measured})."""
    metrics, info = {}, {}
    for name, tokens in evaluations.items():
        value, n = perplexity(model, tokens.ids, tokens.mask, batch_size=cfg.eval_batch_size or cfg.batch_size,
                              device=cfg.device, progress=f"perplexity ({name})" if cfg.progress else None)
        metrics[f"{name}/ppl"] = value
        info[f"{name}/ppl"] = {"window": tokens.ids.shape[1], "windows": len(tokens.ids), "tokens": n}
    if cfg.task_names:
        values, how = tasks.evaluate(model, tokenizer, cfg.task_names, task_path=cfg.task_path, device=cfg.device,
                                     batch_size=cfg.eval_batch_size or cfg.batch_size)
        metrics, info = metrics | values, info | how
    return metrics, info


def describe(cfg, model, weights):
    _, block_list = models.blocks(model)
    return {"name": Path(cfg.model.rstrip("/")).name, "family": model.config.model_type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prunable": sum(view.shape[0] * view.shape[1] for _, view in export.all_views(model)),
            "dtype": str(model.dtype).removeprefix("torch."), "blocks": len(block_list), "fingerprint": weights}


def describe_tokens(tokens):
    return {"source": tokens.source, "sha256": tokens.sha256, "windows": tokens.ids.shape[0],
            "seqlen": tokens.ids.shape[1], "tokens": tokens.n_tokens}


def sparsity(model):
    """Share of zeros among the prunable weights, counted on what will be stored."""
    zeros = total = 0
    for _, view in export.all_views(model):
        total += view.shape[0] * view.shape[1]
        zeros += view.shape[0] * view.shape[1] - int(view.get().count_nonzero())
    for linear in packed.linears(model):
        total += linear.rows * linear.in_features
        zeros += linear.rows * linear.in_features - int(linear.weight.count_nonzero())
    return zeros / total if total else 0.0


def warnings(cfg, model, calibration, evaluations):
    """What the reader of this run's numbers should know of its data."""
    found = [w for t in (calibration, *evaluations.values()) if t for w in t.warnings]
    if calibration:
        widest = max(view.shape[1] for _, view in export.all_views(model))
        found.append(data.token_warning(calibration, widest))
        if cfg.calibration == "builtin" and Path(cfg.model).name != "demo":
            found.append("calibrated on the built-in text, which suits the demo model: give --calibration your own "
                         "text, c4, or self")
        found += [f"--evaluate {spec}: calibrated on the same text, so its perplexity flatters"
                  for spec in cfg.evaluations if same_text(cfg, spec)]
    return [w for w in found if w]


def same_text(cfg, spec):
    """Whether an evaluation text is the one that was calibrated on."""
    ours, theirs = Path(cfg.calibration), Path(spec)
    if ours.is_file() and theirs.is_file():
        return ours.samefile(theirs)
    return spec == cfg.calibration and cfg.split in ("test", "validation")  # else calibration takes the training split


def progress_line(record):
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
    s = record["settings"]
    return f"{s['method']} {s['pattern']}: {metrics or 'done'} ({record['seconds']['total']:.0f} s)"


def summary(records, results):
    """The table at the end, the warnings, and where the page is."""
    ids = [r["run_id"] for r in records]
    name = ids[0] if len(ids) == 1 else f"compare-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:8]}"
    page = results / f"{name}.html"
    write_html(records, page)
    lines = [report.table(records)]
    seen = {}
    for record in records:
        for w in record["warnings"]:
            seen.setdefault(w, []).append(f"{record['settings']['method']} {record['settings']['pattern']}")
    shown = list(seen.items())[:12]
    lines += [f"warning: {w} ({'all' if len(who) == len(records) else ', '.join(who)})" for w, who in shown]
    if len(seen) > len(shown):
        lines.append(f"... and {len(seen) - len(shown)} more warnings, in the report")
    return "\n".join([*lines, f"report: {page}"])


# ------------------------------------------------------------------ the same in Python

def prune(model, tokenizer=None, *, method="sparsegpt", pattern="2:4", calibration="builtin", solver=None, **settings):
    """Prune a loaded transformers model in place; the record of what was done, as `python -m oneshot.run` writes it.

    calibration: as `--calibration`, or token ids, int64 (n, seqlen). solver: settings of the chain's parts, such as
    {"sparsegpt.damping": 0.1}. settings: RunConfig's other fields, e.g. nsamples=64, device="cuda".

    Raises ValueError naming the setting as the command line would.
    """
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    given = isinstance(calibration, torch.Tensor)
    if not given and tokenizer is None:
        raise ValueError("tokenizer: needed to read --calibration; or give token ids as `calibration`")
    known = [f.name for f in dataclasses.fields(RunConfig) if f.name in PYTHON_SETTINGS]
    refuse_unknown(settings, known, "no such setting here")
    parts = [f"{solvers.short(m)}.{f.name}" for m in solvers.chain(method) for f in dataclasses.fields(m.Config)]
    refuse_unknown(solver or {}, parts, f"no such setting of {method}")
    cfg = RunConfig(model=name, method=method, pattern=str(pattern), evaluate="none",
                    calibration="given" if given else calibration,
                    solver=solvers.configure(method, solver or {}), **settings)
    check_devices(cfg)
    check_model(model)
    plan = make_plan(cfg, model)
    if given:
        tokens = data.given(calibration)
        window(model, tokens.ids.shape[1], "calibration: windows of")
    else:
        tokens = calibration_text(cfg, model, tokenizer)
    weights, run_id = identify(cfg, model, tokens, {})
    record = work(cfg, model, tokenizer, plan, tokens, {})
    return report.storable(record | {"run_id": run_id, "model": describe(cfg, model, weights)})


PYTHON_SETTINGS = {f.name for f in dataclasses.fields(RunConfig)} - {  # the rest: arguments of its own, or the caller's
    "model", "method", "pattern", "calibration", "solver", "evaluate", "eval_seqlen", "eval_windows", "eval_batch_size",
    "dtype", "model_revision", "trust_remote_code", "save", "overwrite", "format", "results", "dense"}


def refuse_unknown(given, known, what):
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{', '.join(unknown)}: {what}; there are {', '.join(known) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
