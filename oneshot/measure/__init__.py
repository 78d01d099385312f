"""Measure: what pruning cost. One file, one measurement.

A measurement is a module with

    Config    a frozen dataclass: its flags, each made by `runtime.flag.flag` with `bears_on="measuring"`. They become
              command-line flags under the same names, and attributes of the settings `cfg` below. An optional method
              `check()` raises ValueError naming the flag whose value cannot be used
    asked     (cfg) -> bool: whether these settings ask for the measurement
    measure   (subject) -> Found
    when      "after" pruning (the default) or "before"; if before, `subject.job` says what is going to be done

and optionally

    compares  True: compares with the dense model; such a measurement is never made of the dense model itself
    refuse    (cfg): raise ValueError for what can be rejected before a model is loaded
    prepare   (cfg, model, tokenizer): raise ValueError for what does not fit the model, before any long computation
    identity  (cfg, texts) -> [str]: what else the run's identity depends on, such as the hash of a file
    higher    the metrics whose higher values are better, by the beginning of their names; by default none

Files without `measure` hold code shared by several measurements. Results go into the record: `metrics` become columns
of every table, `parts` become further entries of the record, which are shown on the page.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import nn

from ..data import Tokens, choose
from ..heal.text.teacher import Teacher
from ..models import Tokenizer
from ..prune.job import Job
from ..runtime.flag import Settings
from . import compared

FIRST = "perplexity"  # its columns come first


@dataclass
class Found:
    """The results of a measurement.

    metrics: {"NAME/metric": value}. info: {"NAME/metric": how it was measured, plain values}. parts: further entries of
    the record. warnings: what a reader of the numbers should know.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    info: dict[str, dict] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Append the results of another measurement."""
        self.metrics |= other.metrics
        self.info |= other.info
        self.parts |= other.parts
        self.warnings += other.warnings


@dataclass
class Subject:
    """A model, and what to measure it on.

    cfg: the run's settings. texts: {name: evaluation Tokens}. calibration: the calibration Tokens, or None (`damage`
    uses their token counts). load_dense(): loads the dense model; called only if something compares with it. job: what
    is going to be done to the model, for measurements before pruning. teacher: the model of `--heal-teacher`, if that
    is loaded already.
    """

    model: nn.Module
    tokenizer: Tokenizer | None
    cfg: Settings
    texts: dict[str, Tokens]
    calibration: Tokens | None = None
    load_dense: Callable[[], nn.Module] | None = None
    job: Job | None = None
    teacher: Teacher | None = None

    @property
    def options(self) -> dict[str, Any]:
        """How measurements run a model: {"batch_size": windows per batch, "device": where blocks run}."""
        return {"batch_size": self.cfg.eval_batch_size or self.cfg.batch_size, "device": self.cfg.device}

    def bar(self, name: str) -> str | None:
        """The label of the progress bar for the text `name`; None for no bar."""
        return f"perplexity ({name})" if self.cfg.progress else None

    @functools.cached_property
    def dense(self) -> nn.Module:
        """The dense model (on a CPU its weights are mapped from the file, not copied)."""
        return self.load_dense()

    @functools.cached_property
    def beside_dense(self) -> list[str]:
        """Names of the texts on which the model is compared with the dense one: all but perturbed texts."""
        wanted = any(getattr(m, "compares", False) for m in asked(self.cfg))
        return list(choose.named(self.cfg)) if wanted else []

    def compare(self, name: str) -> "compared.Compared":
        """Both models on the text `name`, token by token; computed once for all measurements."""
        return self._comparisons(name)

    @functools.cached_property
    def _comparisons(self) -> Callable[[str], "compared.Compared"]:
        @functools.cache
        def compare(name: str) -> "compared.Compared":
            tokens = self.texts[name]
            return compared.compare(self.model, self.dense, tokens.ids, tokens.mask, **self.options,
                                    progress=self.bar(name))
        return compare


@functools.cache
def names() -> list[str]:
    """The names of all measurements, in the order in which they are made."""
    found = [m.name for m in pkgutil.iter_modules(__path__)]
    found = [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "measure")]
    return sorted(found, key=lambda name: (name != FIRST, name))


def module(name: str) -> ModuleType:
    """The module of one measurement."""
    return importlib.import_module(f"{__name__}.{name}")


def asked(cfg: Settings, when: str | None = None) -> list[ModuleType]:
    """The measurements that these settings ask for. when: only those "before" or "after" pruning; None: all."""
    found = [m for m in map(module, names()) if m.asked(cfg)
             and not (getattr(m, "compares", False) and cfg.method == "dense")]  # with itself
    return [m for m in found if when in (None, getattr(m, "when", "after"))]


def higher() -> tuple[str, ...]:
    """The metrics, by the beginning of their names, of which higher values are better."""
    return tuple(name for m in map(module, names()) for name in getattr(m, "higher", ()))


def refuse(cfg: Settings) -> None:
    """Raise ValueError naming the flag for what can be rejected before a model is loaded."""
    for m in asked(cfg):
        getattr(m, "refuse", lambda cfg: None)(cfg)


def needs_text(cfg: Settings, flag: str) -> None:
    """Raise ValueError naming the flag if there is no text to compare on."""
    if not cfg.evaluations:
        raise ValueError(f"{flag}: needs a text to compare on; give --evaluate")


def prepare(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Raise ValueError naming the flag for what does not fit the model, before any long computation."""
    for m in asked(cfg):
        getattr(m, "prepare", lambda *args: None)(cfg, model, tokenizer)


def identity(cfg: Settings, texts: dict[str, Tokens]) -> list[str]:
    """What the run's identity depends on in addition to its settings, such as hashes of texts."""
    return [mark for m in asked(cfg) for mark in getattr(m, "identity", lambda *args: [])(cfg, texts)]


def measure(subject: Subject, when: str = "after") -> Found:
    """Make all measurements that the settings ask for "before" or "after" pruning."""
    found = Found()
    for m in asked(subject.cfg, when):
        found.add(m.measure(subject))
    return found
