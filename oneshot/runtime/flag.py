"""Flags: each stage declares its own as fields of a frozen dataclass, with all that is to be known of them as metadata.

What other places need to know of a flag (the record, the run's identity, the tables, Python, the presets) they read off
this metadata; there are no lists of flag names anywhere else (settings/known.py derives what is needed).
"""

import dataclasses

BEARS_ON = ("pruning", "loading", "text", "measuring", "output")


def flag(default, help: str, *, section: str = "", bears_on: str = "pruning", shown: bool | None = None,
         python: bool | None = None, preset: bool = False, rows: tuple[str, ...] | None = None,
         choices: tuple | None = None, was: str | None = None, added: bool = False):
    """A dataclass field that is a flag of the command line.

    help: for --help. section: of --help. bears_on: what a change of it changes:

        pruning     what is done to the weights: part of a pruned run's identity
        loading     which weights and which arithmetic: part of every run's identity
        text        how text is read, for calibration and measuring alike: part of every run's identity
        measuring   what is measured afterwards: part of every run's identity, no difference between two models
        output      nothing in the numbers: where they go, what is printed

    shown: whether tables tell two runs apart by it (default: all but measuring and output). python: whether Python's
    functions take it (default: what bears on pruning, loading and text, and progress). preset: whether it, given beside
    `--method best`, changes the recipe. rows: which rows it bears on, of "pruned", "rounded" and "dense" (default:
    pruning only on the pruned, the rest on all). choices: the values it may have. was: its name before: still a flag,
    and what the run's identity is computed with, so that a renamed flag leaves old runs what they are. added: after the
    first release: left out of record and identity where it has its default, for the same reason.
    """
    if bears_on not in BEARS_ON:
        raise ValueError(f"bears_on {bears_on}: give one of {', '.join(BEARS_ON)}")
    metadata = {"help": help, "section": section, "bears_on": bears_on, "preset": preset, "choices": choices,
                "was": was, "added": added,
                "shown": bears_on not in ("measuring", "output") if shown is None else shown,
                "python": bears_on not in ("measuring", "output") if python is None else python,
                "rows": rows or (("pruned",) if bears_on == "pruning" else ("pruned", "rounded", "dense"))}
    return dataclasses.field(default=default, metadata=metadata)


def listed(text: str) -> list[str]:
    """The parts of a comma list; none for "none"."""
    parts = [part.strip() for part in text.split(",")]
    return [] if parts == ["none"] else [part for part in parts if part]
