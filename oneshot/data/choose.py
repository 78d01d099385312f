"""Texts: what a run calibrates on and what it is measured on, as its settings say."""

import dataclasses
import re
from pathlib import Path

from .. import data, models
from .perturb import KINDS


def calibration(cfg, model, tokenizer):
    """Calibration Tokens."""
    with models.resident(models.tensors_of(model) if cfg.calibration == "self" else (), cfg.device):
        return data.calibration(tokenizer, cfg.calibration, nsamples=cfg.nsamples,
                                seqlen=window(model, cfg.seqlen, "--seqlen"), seed=cfg.seed,
                                options=text_options(cfg), model=model, batch_size=cfg.batch_size,
                                progress=cfg.progress)


def evaluation(cfg, model, tokenizer):
    """{name: evaluation Tokens}, read and cut before any long work."""
    evaluations = {}
    length = window(model, cfg.eval_seqlen, "--eval-seqlen") if cfg.eval_seqlen else \
        window(model, cfg.seqlen, "--seqlen")
    for name, spec in named(cfg).items():
        pinned = cfg.revision if spec == cfg.calibration else None  # --split and --revision are the calibration set's
        options = dataclasses.replace(text_options(cfg), split=None, revision=pinned)
        for kind in (None, *(KINDS if cfg.robustness else ())):
            evaluations[f"{name}+{kind}" if kind else name] = data.evaluation(
                tokenizer, spec, seqlen=length, max_windows=cfg.eval_windows, options=options, perturbation=kind)
    return evaluations


def named(cfg):
    """{name: source} of the texts to evaluate: "code=a.txt" is named code, others after their file or data set."""
    texts = {}
    for spec in cfg.evaluations:
        name, given, source = spec.partition("=")
        if not given or Path(spec).is_file():
            name, source = Path(spec).stem if Path(spec).suffix else spec.replace("/", "_"), spec
        elif not re.fullmatch(r"[^\s/+]+", name) or not source:
            raise ValueError(f"--evaluate {spec}: give NAME=FILE, the name without spaces, / and +")
        if name in texts:
            raise ValueError(f"--evaluate {spec}: a second text named {name}; rename one")
        texts[name] = source
    return texts


def text_options(cfg):
    return data.TextOptions(column=cfg.column, config=cfg.data_config, split=cfg.split, revision=cfg.revision,
                            cache_dir=cfg.cache_dir, per_line=cfg.per_line, documents=cfg.documents)


def window(model, asked, flag):
    """Tokens in a window: what was asked for, else min(2048, the model's positions)."""
    most = models.max_positions(model)
    if asked and most and asked > most:
        raise ValueError(f"{flag} {asked}: longer than the {most} positions of the model")
    return asked or min(2048, most or 2048)


def warnings(cfg, model, calibration, evaluations):
    """What the reader of this run's numbers should know of its data."""
    found = [w for t in (calibration, *evaluations.values()) if t for w in t.warnings]
    if calibration:
        widest = max(weight.shape[1] for block in models.blocks(model)[1] for weight in models.linears(block)[0])
        found.append(data.token_warning(calibration, widest))
        if cfg.calibration == "builtin" and Path(cfg.model).name != "demo":
            found.append("calibrated on the built-in text, which suits the demo model: give --calibration your own "
                         "text, c4, or self")
        found += [f"--evaluate {spec}: calibrated on the same text, so its perplexity flatters"
                  for spec in named(cfg).values() if same_text(cfg, spec)]
    return [w for w in found if w]


def same_text(cfg, spec):
    """Whether an evaluation text is the one that was calibrated on."""
    ours, theirs = Path(cfg.calibration), Path(spec)
    if ours.is_file() and theirs.is_file():
        return ours.samefile(theirs)
    return spec == cfg.calibration and cfg.split in ("test", "validation")  # else calibration takes the training split


def describe(tokens):
    return {"source": tokens.source, "sha256": tokens.sha256, "windows": tokens.ids.shape[0],
            "seqlen": tokens.ids.shape[1], "tokens": tokens.n_tokens}
