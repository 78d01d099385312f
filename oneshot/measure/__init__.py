"""Measure: all that a run's settings ask for, each kind by its file in evaluate/."""

from ..data import choose
from . import divergence, prompts, tasks
from .damage import damage
from .perplexity import of_losses, perplexity


def measure(cfg, model, tokenizer, evaluations, calibration=None, load_dense=None):
    """({metric: value}, {metric: how it was measured}, {further parts of the record, "warnings" to add among them}).

    evaluations: {name: Tokens}. calibration: its Tokens, whose word counts damage adds. load_dense(): the dense model,
    called when something compares with it.
    """
    metrics, info, more, compared = {}, {}, {}, {}
    options = {"batch_size": cfg.eval_batch_size or cfg.batch_size, "device": cfg.device}
    with_dense = choose.named(cfg) if cfg.method != "dense" and (cfg.divergence or cfg.damage) else {}
    dense = load_dense() if with_dense else None  # on a CPU mapped from its file, not copied
    for name, tokens in evaluations.items():
        bar = f"perplexity ({name})" if cfg.progress else None
        if name in with_dense:
            compared[name] = divergence.compare(model, dense, tokens.ids, tokens.mask, **options, progress=bar)
            value, n = of_losses(compared[name].loss, tokens.mask)
        else:
            value, n = perplexity(model, tokens.ids, tokens.mask, **options, progress=bar)
        metrics[f"{name}/ppl"] = value
        info[f"{name}/ppl"] = {"window": tokens.ids.shape[1], "windows": len(tokens.ids), "tokens": n}
    for name in compared if cfg.divergence else ():
        values, how = divergence.metrics(compared[name], name)
        metrics, info = metrics | values, info | how
    if cfg.damage and compared:
        more["damage"] = damage(tokenizer, {name: evaluations[name] for name in compared}, compared, calibration)
    if cfg.prompts:
        values, how, more["prompts"] = prompts.evaluate(model, tokenizer, cfg.prompts, device=cfg.device)
        metrics, info = metrics | values, info | how
    if cfg.task_names:
        values, how, more["warnings"] = tasks.evaluate(model, tokenizer, cfg.task_names, task_path=cfg.task_path,
                                                       limit=cfg.task_limit, **options)
        metrics, info = metrics | values, info | how
    return metrics, info, more
