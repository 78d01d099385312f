"""Choose: what a run calibrates on and what it is measured on, as its settings say."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .. import models
from ..runtime.flag import flag
from . import windows
from .perturb import KINDS
from .sources import TextOptions
from .windows import Tokens


@dataclass(frozen=True)
class DataOptions:
    """Flags of the calibration text, and of how text is read for all purposes."""

    calibration: str = flag("builtin", "builtin, self (sampled from the model), wikitext2, c4, ptb, a hub data set, or "
                                       "a .txt .jsonl .json .parquet .csv file", section="data", python=False)
    nsamples: int = flag(128, "calibration windows", section="data")
    seqlen: int | None = flag(None, "tokens in a window (default: min(2048, the model's positions))", section="data")
    seed: int = flag(0, "which windows; with --heal also which of them are held out, the order of training and the "
                        "positions distil looks at; nothing else is random", section="data")
    documents: str = flag("join", "join: windows run across documents, the papers' way; separate: each document is its "
                                  "own window, padded and masked", section="data", bears_on="text",
                          choices=("join", "separate"))
    per_line: bool = flag(False, "each line of a .txt file is a document", section="data", bears_on="text")
    column: str | None = flag(None, "the column that holds the text", section="data", bears_on="text")
    data_config: str | None = flag(None, "configuration of a hub data set", section="data", bears_on="text")
    split: str | None = flag(None, "split of a hub data set", section="data", bears_on="text")
    revision: str | None = flag(None, "revision of a hub data set", section="data", bears_on="text")

    def check(self):
        """Raise ValueError naming the flag whose value cannot be used."""
        check_least(self, {"nsamples": 1, "seqlen": 2})


def check_least(options, least: dict[str, int]) -> None:
    """Raise ValueError naming the first flag of `options` whose value is below the least; None is above."""
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")


def calibration(cfg: DataOptions, model: nn.Module, tokenizer) -> Tokens:
    """Calibration Tokens."""
    with models.resident(models.tensors_of(model) if cfg.calibration == "self" else (), cfg.device):
        return windows.calibration(tokenizer, cfg.calibration, nsamples=cfg.nsamples,
                                seqlen=window(model, cfg.seqlen, "--seqlen"), seed=cfg.seed,
                                options=text_options(cfg), model=model, batch_size=cfg.batch_size,
                                progress=cfg.progress)


def evaluation(cfg: DataOptions, model: nn.Module, tokenizer) -> dict[str, Tokens]:
    """{name: evaluation Tokens}, read and cut before any long work."""
    evaluations = {}
    length = window(model, cfg.eval_seqlen, "--eval-seqlen") if cfg.eval_seqlen else \
        window(model, cfg.seqlen, "--seqlen")
    for name, spec in named(cfg).items():
        pinned = cfg.revision if spec == cfg.calibration else None  # --split and --revision are the calibration set's
        options = dataclasses.replace(text_options(cfg), split=None, revision=pinned)
        for kind in (None, *(KINDS if cfg.robustness else ())):
            evaluations[f"{name}+{kind}" if kind else name] = windows.evaluation(
                tokenizer, spec, seqlen=length, max_windows=cfg.eval_windows, options=options, perturbation=kind)
    return evaluations


def named(cfg: DataOptions) -> dict[str, str]:
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


def text_options(cfg: DataOptions) -> TextOptions:
    """How these settings read text."""
    return TextOptions(column=cfg.column, config=cfg.data_config, split=cfg.split, revision=cfg.revision,
                            cache_dir=cfg.cache_dir, per_line=cfg.per_line, documents=cfg.documents)


def window(model: nn.Module, asked: int | None, flag: str) -> int:
    """Tokens in a window: what was asked for, else min(2048, the model's positions)."""
    most = models.max_positions(model)
    if asked and most and asked > most:
        raise ValueError(f"{flag} {asked}: longer than the {most} positions of the model")
    return asked or min(2048, most or 2048)


def warnings(cfg: DataOptions, model: nn.Module, calibration: Tokens | None,
             evaluations: dict[str, Tokens]) -> list[str]:
    """What the reader of this run's numbers should know of its data."""
    found = [w for t in (calibration, *evaluations.values()) if t for w in t.warnings]
    if calibration:
        widest = max(weight.shape[1] for weight in models.all_weights(model))
        found.append(windows.token_warning(calibration, widest))
        if cfg.calibration == "builtin" and Path(cfg.model).name != "demo":
            found.append("calibrated on the built-in text, which suits the demo model: give --calibration your own "
                         "text, c4, or self")
        found += [f"--evaluate {spec}: calibrated on the same text, so its perplexity flatters"
                  for spec in named(cfg).values() if same_text(cfg, spec)]
    return [w for w in found if w]


def same_text(cfg: DataOptions, spec: str) -> bool:
    """Whether an evaluation text is the one that was calibrated on."""
    ours, theirs = Path(cfg.calibration), Path(spec)
    if ours.is_file() and theirs.is_file():
        return ours.samefile(theirs)
    return spec == cfg.calibration and cfg.split in ("test", "validation")  # else calibration takes the training split


def describe(tokens: Tokens) -> dict:
    """What the record says of a text."""
    return {"source": tokens.source, "sha256": tokens.sha256, "windows": tokens.ids.shape[0],
            "seqlen": tokens.ids.shape[1], "tokens": tokens.n_tokens}
