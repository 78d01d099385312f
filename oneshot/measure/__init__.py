"""Measure: what pruning cost. One file, one measurement.

A measurement is a module with

    Config    a frozen dataclass: its flags, each made by `runtime.flag.flag` with `bears_on="measuring"`. They are
              flags of the command line by their own names, and attributes of the settings `cfg` below. A method
              `check()` raises ValueError naming the flag whose value cannot be used
    asked     (cfg) -> bool: whether these settings ask for it
    measure   (subject) -> Found
    when      "after" the model is pruned (the default) or "before"; before, `subject.job` says what is to be done

and, where it needs them,

    compares  True: looks at the dense model as well; never asked of the dense model itself
    refuse    (cfg): raise ValueError for what can be refused before a model is loaded
    prepare   (cfg, model, tokenizer): raise ValueError for what does not fit the model, before any long work
    identity  (cfg, texts) -> [str]: what else the run's identity depends on, such as the hash of a file

Files without `measure` are what several of them share. What a measurement finds goes into the record: `metrics` become
columns of every table, `parts` further entries of the record, shown on the page.
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
from ..prune.job import Job
from . import compared

FIRST = "perplexity"  # its columns come first


@dataclass
class Found:
    """What a measurement found.

    metrics: {"NAME/metric": value}. info: {"NAME/metric": how it was measured, plain values}. parts: further entries of
    the record. warnings: what the reader of the numbers should know.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    info: dict[str, dict] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        """Append what another measurement found."""
        self.metrics |= other.metrics
        self.info |= other.info
        self.parts |= other.parts
        self.warnings += other.warnings


@dataclass
class Subject:
    """A model, and what there is to measure it on.

    cfg: the run's settings. texts: {name: evaluation Tokens}. calibration: its Tokens, whose word counts `damage` adds,
    or None. load_dense(): the dense model, called when something compares with it. job: what is to be done to it.
    """

    model: nn.Module
    tokenizer: Any
    cfg: Any
    texts: dict[str, Tokens]
    calibration: Tokens | None = None
    load_dense: Callable[[], nn.Module] | None = None
    job: Job | None = None

    @property
    def options(self) -> dict:
        """How measurements run a model: windows at a time, and where."""
        return {"batch_size": self.cfg.eval_batch_size or self.cfg.batch_size, "device": self.cfg.device}

    def bar(self, name: str) -> str | None:
        """The text before the bar of a text's walk through the model; None for no bar."""
        return f"perplexity ({name})" if self.cfg.progress else None

    @functools.cached_property
    def dense(self) -> nn.Module:
        """The dense model (on a CPU mapped from its file, not copied)."""
        return self.load_dense()

    @functools.cached_property
    def beside_dense(self) -> list[str]:
        """Names of the texts on which the model is compared with the dense one: those without changes."""
        wanted = any(getattr(m, "compares", False) and m.asked(self.cfg) for m in map(module, names()))
        return list(choose.named(self.cfg)) if wanted else []

    def compare(self, name: str) -> "compared.Compared":
        """Both models on a text, token by token; one walk serves all measurements."""
        return self._comparisons(name)

    @functools.cached_property
    def _comparisons(self):
        @functools.cache
        def compare(name):
            tokens = self.texts[name]
            return compared.compare(self.model, self.dense, tokens.ids, tokens.mask, **self.options,
                                    progress=self.bar(name))
        return compare


@functools.cache
def names() -> list[str]:
    """All measurements there are, in the order in which they are made."""
    found = [m.name for m in pkgutil.iter_modules(__path__)]
    found = [name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "measure")]
    return sorted(found, key=lambda name: (name != FIRST, name))


def module(name: str) -> ModuleType:
    """The module of one measurement."""
    return importlib.import_module(f"{__name__}.{name}")


def asked(cfg, when: str | None = None) -> list[ModuleType]:
    """The measurements that these settings ask for, `when` before or after pruning (None: both)."""
    found = [m for m in map(module, names()) if m.asked(cfg)]
    return [m for m in found if when in (None, getattr(m, "when", "after"))]


def refuse(cfg) -> None:
    """Raise ValueError for what can be refused before a model is loaded."""
    for m in asked(cfg):
        getattr(m, "refuse", lambda cfg: None)(cfg)


def prepare(cfg, model: nn.Module, tokenizer) -> None:
    """Raise ValueError for what does not fit the model, before any long work."""
    for m in asked(cfg):
        getattr(m, "prepare", lambda *args: None)(cfg, model, tokenizer)


def identity(cfg, texts: dict[str, Tokens]) -> list[str]:
    """What the run's identity depends on beside its settings."""
    return [mark for m in asked(cfg) for mark in getattr(m, "identity", lambda *args: [])(cfg, texts)]


def measure(subject: Subject, when: str = "after") -> Found:
    """All that the settings ask for."""
    found = Found()
    for m in asked(subject.cfg, when):
        found.add(m.measure(subject))
    return found
