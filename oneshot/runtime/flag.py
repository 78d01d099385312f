"""Flags: each stage declares its own as fields of a frozen dataclass; a field's metadata describes the flag completely.

Everything else that depends on a flag (the record, the run's identity, the tables, the Python functions, the presets)
is derived from this metadata by settings/known.py. There are no lists of flag names anywhere else.
"""

import dataclasses
from typing import Any

BEARS_ON = ("pruning", "loading", "text", "measuring", "output")
Settings = Any  # a run's settings.RunConfig, which combines the flags of all stages; early stages cannot import it


def flag(default: Any, help: str, *, section: str = "", bears_on: str = "pruning", shown: bool | None = None,
         python: bool | None = None, preset: bool = False, rows: tuple[str, ...] | None = None,
         choices: tuple | None = None, was: str | None = None, added: bool = False, trusts: bool = False,
         repeated: bool = False) -> Any:
    """A dataclass field that is a command-line flag. (Returns Any so that `name: int = flag(8, ...)` type-checks.)

    help: its text in --help. section: its section there. bears_on: what the flag affects, one of

        pruning     what is done to the weights: part of a pruned run's identity
        loading     which weights are used, and in which arithmetic: part of every run's identity
        text        how text is read, for calibration and evaluation: part of every run's identity
        measuring   what is measured afterwards: part of every run's identity, but no difference between two models
        output      no number: only where results go and what is printed

    shown: whether tables use it to tell two runs apart (default: unless it bears on measuring or output). python:
    whether the Python functions accept it (same default). preset: whether giving it together with `--method best`
    changes the recipe. rows: the kinds of run it affects, of "pruned", "rounded" and "dense" (default: "pruned" alone
    if it bears on pruning, else all). choices: the allowed values. was: its former name, which remains an alias and is
    still used to compute the run's identity, so that renaming a flag leaves the ids of old runs unchanged. added:
    whether it was added after the first release; it is then left out of record and identity at its default value, for
    the same reason. trusts: whether it lets code run that came with a model or with data; only a person at a command
    line may turn it on, no file of settings. repeated: whether a command line may give it several times; its value is
    all of them, one a line.
    """
    if bears_on not in BEARS_ON:
        raise ValueError(f"bears_on {bears_on}: give one of {', '.join(BEARS_ON)}")
    metadata = {"help": help, "section": section, "bears_on": bears_on, "preset": preset, "choices": choices,
                "was": was, "added": added, "trusts": trusts, "repeated": repeated,
                "shown": bears_on not in ("measuring", "output") if shown is None else shown,
                "python": bears_on not in ("measuring", "output") if python is None else python,
                "rows": rows or (("pruned",) if bears_on == "pruning" else ("pruned", "rounded", "dense"))}
    return dataclasses.field(default=default, metadata=metadata)


def listed(text: str) -> list[str]:
    """The entries of a comma-separated list, stripped; [] for "none"."""
    parts = [part.strip() for part in text.split(",")]
    return [] if parts == ["none"] else [part for part in parts if part]
