"""`python -m oneshot.run`: prune a language model once and prove what it cost. The whole story, top to bottom.

    load -> calibration tokens -> prune, block by block -> evaluate -> record, page, checkpoint
"""

import dataclasses
import hashlib
import sys
import time
from pathlib import Path

import torch

from . import cli, data, environment, export, loop, models, patterns, report, solvers
from .config import RunConfig
from .evaluate.perplexity import perplexity


def main(argv=None):
    """Run what the command line asks for. Exit code: 0 done, 2 the user can mend it (one line on stderr says what)."""
    try:
        configs = cli.parse(argv)
        check(configs)
        records = []
        for cfg in configs:
            records.append(run(cfg))
            if len(configs) > 1:
                print(progress_line(records[-1]), file=sys.stderr, flush=True)
        print(summary(records, Path(configs[0].results)))
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def check(configs):
    """Refuse what can be refused before a model is loaded. Raises ValueError naming the flag."""
    for cfg in configs:
        environment.check_device(cfg.device)
        if cfg.activations:
            environment.check_device(cfg.activations)
        if cfg.save:
            export.owner_of(cfg.save)
            if Path(cfg.save).resolve() == Path(cfg.model).resolve():
                raise ValueError(f"--save {cfg.save}: is the model's own folder; choose another")
        if Path(cfg.results).is_file():
            raise ValueError(f"--results {cfg.results}: is a file; give a folder")


def run(cfg):
    """One run: its record. With `--save`, the pruned checkpoint as well; a finished one is not computed again."""
    began = time.perf_counter()
    environment.reset_peak_memory(cfg.device)
    model, tokenizer = models.load(cfg.model, dtype=cfg.dtype, revision=cfg.model_revision, cache_dir=cfg.cache_dir,
                                   trust_remote_code=cfg.trust_remote_code)
    loaded = time.perf_counter()
    calibration, evaluations = texts(cfg, model, tokenizer)
    weights = models.fingerprint(model)
    run_id = cfg.run_id(weights, calibration.sha256 if calibration else None, *(t.sha256 for t in evaluations.values()))
    folder = export.Folder(cfg.save, run_id, cfg.overwrite) if cfg.save else None
    if folder and folder.finished:
        print(f"{cfg.save}: finished earlier, stored result", file=sys.stderr)
        return folder.record

    prepared = time.perf_counter()
    result = prune_model(cfg, model, calibration, folder)
    pruned = time.perf_counter()
    metrics, info = evaluate(cfg, model, evaluations)
    done = time.perf_counter()
    record = {
        "schema": report.SCHEMA, "run_id": run_id, "status": "finished", "settings": cfg.settings(),
        "model": describe(cfg, model, weights),
        "data": {"calibration": describe_tokens(calibration) if calibration else None,
                 "evaluation": {name: describe_tokens(t) for name, t in evaluations.items()}},
        "environment": environment.environment(cfg.device), "metrics": metrics, "metric_info": info,
        "layers": result.layers, "blocks": result.blocks, "skipped": result.skipped, "sparsity": sparsity(model),
        "warnings": warnings(cfg, model, calibration, evaluations) + result.warnings,
        "peak_memory_bytes": environment.peak_memory(cfg.device),
        "seconds": {"load": loaded - began, "data": prepared - loaded, "prune": pruned - prepared,
                    "evaluate": done - pruned, "total": done - began},
    }
    record = report.write(record, Path(cfg.results) / f"{run_id}.json")
    if folder:
        folder.finish(model, tokenizer, record)
        report.write_html([record], Path(cfg.save) / "report.html")
    return record


def texts(cfg, model, tokenizer):
    """(calibration Tokens or None, {name: evaluation Tokens}), all read and cut before any long work."""
    seqlen = window(model, cfg.seqlen, "--seqlen")
    options = data.TextOptions(column=cfg.column, config=cfg.data_config, split=cfg.split, revision=cfg.revision,
                               cache_dir=cfg.cache_dir, per_line=cfg.per_line, documents=cfg.documents)
    evaluations = {}
    for spec in cfg.evaluations:
        length = window(model, cfg.eval_seqlen, "--eval-seqlen") if cfg.eval_seqlen else seqlen
        name = Path(spec).stem if Path(spec).suffix else spec.replace("/", "_")
        if name in evaluations:
            raise ValueError(f"--evaluate {spec}: a second text named {name}; rename one")
        pinned = cfg.revision if spec == cfg.calibration else None  # --split and --revision are the calibration set's
        evaluations[name] = data.evaluation(tokenizer, spec, seqlen=length, max_windows=cfg.eval_windows,
                                            options=dataclasses.replace(options, split=None, revision=pinned))
    calibration = None
    if needs_data(cfg):
        with models.resident(models.tensors_of(model) if cfg.calibration == "self" else (), cfg.device):
            calibration = data.calibration(tokenizer, cfg.calibration, nsamples=cfg.nsamples, seqlen=seqlen,
                                           seed=cfg.seed, options=options, model=model, batch_size=cfg.batch_size,
                                           progress=cfg.progress)
    return calibration, evaluations


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


def prune_model(cfg, model, calibration, folder=None):
    """Prune in place as `cfg` says; the loop's Result. With a folder: keep each block, continue behind the kept ones."""
    if cfg.method == "dense":
        _, block_list = models.blocks(model)
        return loop.Result(skipped=[{"name": n, "reason": why} for n, why in models.outside(model, block_list)])
    chain = steps(cfg)
    plan = loop.make_plan(model, patterns.parse(cfg.pattern, cfg.group), chain)
    options = loop.Options(
        device=cfg.device, batch_size=cfg.batch_size, true_sequential=cfg.true_sequential,
        gram_budget=int(cfg.gram_budget * 2**30), activations=cfg.activations,
        activation_dtype=getattr(torch, cfg.activation_dtype) if cfg.activation_dtype else None,
        layer_errors=cfg.layer_errors, tf32=cfg.tf32, progress=cfg.progress)
    ids, mask = (calibration.ids, calibration.mask) if calibration else (None, None)
    return loop.prune_model(model, ids, mask, plan, chain, options, finished=folder.blocks() if folder else (),
                            on_block=folder.save_block if folder else None)


def evaluate(cfg, model, evaluations):
    """({metric: value}, {metric: window, windows, tokens})."""
    metrics, info = {}, {}
    for name, tokens in evaluations.items():
        value, n = perplexity(model, tokens.ids, tokens.mask, batch_size=cfg.eval_batch_size or cfg.batch_size,
                              device=cfg.device, progress=f"perplexity ({name})" if cfg.progress else None)
        metrics[f"{name}/ppl"] = value
        info[f"{name}/ppl"] = {"window": tokens.ids.shape[1], "windows": len(tokens.ids), "tokens": n}
    return metrics, info


def describe(cfg, model, weights):
    name, block_list = models.blocks(model)
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
        zeros += int((view.get() == 0).sum())
        total += view.shape[0] * view.shape[1]
    return zeros / total


def warnings(cfg, model, calibration, evaluations):
    """What the reader of this run's numbers should know of its data."""
    found = [w for t in (calibration, *evaluations.values()) if t for w in t.warnings]
    if calibration:
        widest = max(view.shape[1] for _, view in export.all_views(model))
        found.append(data.token_warning(calibration, widest))
        if cfg.calibration == "builtin" and Path(cfg.model).name != "demo":
            found.append("calibrated on the built-in text, which suits the demo model: give --calibration your own text, "
                         "c4, or self")
    return [w for w in found if w]


def progress_line(record):
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in record["metrics"].items())
    s = record["settings"]
    return f"{s['method']} {s['pattern']}: {metrics or 'done'} ({record['seconds']['total']:.0f} s)"


def summary(records, results):
    """The table at the end, the warnings, and where the page is."""
    ids = [r["run_id"] for r in records]
    name = ids[0] if len(ids) == 1 else f"compare-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:8]}"
    page = results / f"{name}.html"
    report.write_html(records, page)
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
    known = {f.name for f in dataclasses.fields(RunConfig)}
    unknown = set(settings) - known
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting; there are {', '.join(sorted(known))}")
    cfg = RunConfig(model=name, method=method, pattern=str(pattern), evaluate="none",
                    calibration="given" if given else calibration,
                    solver=solvers.configure(method, solver or {}), **settings)
    check([cfg])
    began = time.perf_counter()
    tokens = data.given(calibration) if given else texts(cfg, model, tokenizer)[0]
    weights = models.fingerprint(model)
    result = prune_model(cfg, model, tokens)
    return {"schema": report.SCHEMA, "run_id": cfg.run_id(weights, tokens.sha256 if tokens else None),
            "status": "finished", "settings": cfg.settings(), "model": describe(cfg, model, weights),
            "data": {"calibration": describe_tokens(tokens) if tokens else None, "evaluation": {}},
            "environment": environment.environment(cfg.device), "metrics": {}, "metric_info": {},
            "layers": result.layers, "blocks": result.blocks, "skipped": result.skipped, "sparsity": sparsity(model),
            "warnings": warnings(cfg, model, tokens, {}) + result.warnings,
            "seconds": {"total": time.perf_counter() - began}}


if __name__ == "__main__":
    sys.exit(main())
