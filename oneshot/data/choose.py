"""Choose: the calibration and evaluation windows that a run's settings ask for."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..models import Tokenizer
from ..runtime.flag import Settings, flag
from . import embedding, encode, files, training, windows
from .perturb import KINDS
from .sources import TextOptions
from .windows import Tokens


@dataclass(frozen=True)
class DataOptions:
    """Flags of the calibration text, and of how any text is read."""

    calibration: str = flag("builtin", "builtin, self (sampled from the model), wikitext2, c4, ptb, a hub data set, or "
                                       "a .txt .jsonl .json .parquet .csv file (also .gz, .zst); a column messages "
                                       "of {role, content} goes through the tokenizer's chat template",
                            section="data", python=False)
    nsamples: int = flag(128, "number of calibration windows", section="data")
    seqlen: int | None = flag(None, "tokens per window (default: min(2048, the model's positions))", section="data")
    seed: int = flag(0, "selects the calibration windows; with --heal also the held-out windows, the order of training "
                        "and the positions that distil looks at; nothing else is random", section="data")
    documents: str = flag("join", "join: windows run across documents, as in the papers; separate: each document is a "
                                  "window of its own, padded and masked", section="data", bears_on="text",
                          choices=("join", "separate"))
    bos: str = flag("auto", "where windows have a BOS token: each (every window starts with it), first (the text, or "
                            "each document that is a window, does), none; auto: each for models that break down "
                            "without it (Gemma), else as the tokenizer does it by default", section="data",
                    bears_on="text", choices=encode.MODES, added=True)
    per_line: bool = flag(False, "treat each line of a .txt file as a document", section="data", bears_on="text")
    column: str | None = flag(None, "column that holds the text or conversations (default: text, else messages, else "
                                    "the only one with text)", section="data", bears_on="text")
    data_config: str | None = flag(None, "configuration of a hub data set", section="data", bears_on="text")
    split: str | None = flag(None, "split of a hub data set", section="data", bears_on="text")
    revision: str | None = flag(None, "revision of a hub data set", section="data", bears_on="text")

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        check_least(self, {"nsamples": 1, "seqlen": 2})


def check_least(options: Any, least: dict[str, int]) -> None:
    """Raise ValueError naming the first flag whose value is below its minimum.

    options: has the flags as attributes; None passes. least: {flag: minimum}.
    """
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")


def calibration(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> Tokens:
    """The calibration windows. Raises ValueError naming `--calibration` when they cannot be made."""
    with models.resident(model, cfg.device, None if cfg.calibration == "self" else ()):
        tokens = windows.calibration(tokenizer, cfg.calibration, nsamples=cfg.nsamples,
                                     seqlen=window(model, cfg.seqlen, "--seqlen"), seed=cfg.seed,
                                     options=text_options(cfg, model, tokenizer), model=model,
                                     batch_size=cfg.batch_size, progress=cfg.progress)
    return embedding.fitting(tokens, model, tokenizer, f"--calibration {cfg.calibration}")


def given(ids: torch.Tensor, model: nn.Module, tokenizer: Tokenizer | None = None) -> Tokens:
    """Tokens from ids made by the caller, int (n, seqlen). Raises ValueError for ids that the model cannot take."""
    tokens = windows.given(ids)
    window(model, tokens.ids.shape[1], "calibration: windows of")
    return embedding.fitting(tokens, model, tokenizer, "calibration")


def evaluation(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> dict[str, Tokens]:
    """{name: evaluation windows}; with `--robustness` also "name+typos" and the like.

    Made before any long computation, so that a text that cannot be used is reported at once: raises ValueError naming
    `--evaluate`.
    """
    evaluations = {}
    length = window(model, cfg.eval_seqlen, "--eval-seqlen") if cfg.eval_seqlen else \
        window(model, cfg.seqlen, "--seqlen")
    for name, spec in named(cfg).items():
        pinned = cfg.revision if spec == cfg.calibration else None  # --split and --revision are the calibration set's
        options = dataclasses.replace(text_options(cfg, model, tokenizer), split=None, revision=pinned)
        for kind in (None, *(KINDS if cfg.robustness else ())):
            tokens = windows.evaluation(tokenizer, spec, seqlen=length, max_windows=cfg.eval_windows, options=options,
                                        perturbation=kind)
            evaluations[f"{name}+{kind}" if kind else name] = embedding.fitting(tokens, model, tokenizer,
                                                                                f"--evaluate {spec}")
    return evaluations


def named(cfg: Settings) -> dict[str, str]:
    """{name: source} of the evaluation texts: "code=a.txt" is named "code", others after their file or data set.

    Raises ValueError naming `--evaluate` for a malformed entry or a repeated name.
    """
    texts = {}
    for spec in cfg.evaluations:
        name, given, source = spec.partition("=")
        if not given or os.path.isfile(spec):
            name, source = files.stem(Path(spec)) if Path(spec).suffix else spec.replace("/", "_"), spec
        elif not re.fullmatch(r"[^\s/+]+", name) or not source:
            raise ValueError(f"--evaluate {spec}: give NAME=FILE, the name without spaces, / and +")
        if name in texts:
            raise ValueError(f"--evaluate {spec}: a second text named {name}; rename one")
        texts[name] = source
    return texts


def text_options(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> TextOptions:
    """The TextOptions that these settings stand for with this model."""
    return TextOptions(column=cfg.column, config=cfg.data_config, split=cfg.split, revision=cfg.revision,
                       cache_dir=cfg.cache_dir, per_line=cfg.per_line, documents=cfg.documents,
                       bos="each" if cfg.bos == "auto" and needs_bos(model, tokenizer) else cfg.bos)


def training_options(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> TextOptions:
    """The same for the texts to heal on: --split and --revision are those of the calibration set, if it is one."""
    options = text_options(cfg, model, tokenizer)
    texts = [name for spec in (cfg.heal_data, cfg.heal_held_out) if spec for _, name in training.mixture(spec)]
    return options if cfg.calibration in texts else dataclasses.replace(options, split=None, revision=None)


def needs_bos(model: nn.Module, tokenizer: Tokenizer) -> bool:
    """Whether a model breaks down on windows without a BOS token: Gemma (lm-evaluation-harness#2049)."""
    return tokenizer.bos_token_id is not None and any(
        "gemma" in config.model_type for config in (model.config, models.config_of(model)))


def window(model: nn.Module, asked: int | None, flag: str) -> int:
    """The number of tokens per window: `asked`, or by default min(2048, the model's positions).

    Raises ValueError naming `flag` when the model has fewer positions than were asked for.
    """
    most = models.max_positions(model)
    if asked and most and asked > most:
        raise ValueError(f"{flag} {asked}: longer than the {most} positions of the model")
    return asked or min(2048, most or 2048)


def warnings(cfg: Settings, model: nn.Module, calibration: Tokens | None,
             evaluations: dict[str, Tokens]) -> list[str]:
    """What a reader of this run's numbers should know about its data, one line each."""
    found: list[str | None] = [w for t in (calibration, *evaluations.values()) if t for w in t.warnings]
    if calibration:
        widest = max(weight.shape[1] for weight in models.all_weights(model))
        found.append(windows.token_warning(calibration, widest))
        if cfg.calibration == "builtin" and Path(cfg.model).name != "demo":
            found.append("calibrated on the built-in text, which suits the demo model: give --calibration your own "
                         "text, c4, or self")
        found += [f"--evaluate {spec}: calibrated on the same text, so its perplexity flatters"
                  for spec in named(cfg).values() if same_text(cfg, spec)]
    return [w for w in found if w]


def same_text(cfg: Settings, spec: str) -> bool:
    """Whether the evaluation text `spec` is the text that the run calibrates on."""
    if os.path.isfile(cfg.calibration) and os.path.isfile(spec):
        return os.path.samefile(cfg.calibration, spec)
    return spec == cfg.calibration and cfg.split in ("test", "validation")  # the default split is train


def describe(tokens: Tokens) -> dict[str, Any]:
    """A text's entry in the record, plain values: source, sha256 of its windows, their number and length, tokens."""
    return {"source": tokens.source, "sha256": tokens.sha256, "windows": tokens.ids.shape[0],
            "seqlen": tokens.ids.shape[1], "tokens": tokens.n_tokens}
