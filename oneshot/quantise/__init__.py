"""Quantise: round weights to integers, after they were pruned and healed. One file, one method of `--quantiser`.

    grids   the integer formats and their exact bytes
    mixed   which of them each linear gets
    head    the output head, where it is named
    walk    the walk over a pruned model that rounds each block on its own rounded inputs
    scaling columns of large inputs made larger before that, so that they are rounded finer

A quantiser is a module with

    needs       which calibration statistics it uses, a frozenset of names (calibrate/statistics.py)
    Config      a frozen dataclass: its flags, each made by `runtime.flag.flag`
    quantise(W, solution, statistics, grid, cfg) -> Solution

where W (R, C) is the weight to come close to, in float32 or float64, and the solution says which weights are kept; its
W_hat is W. The result is scale · code on the grid, with its `scales`. Law: a weight that is not kept stays zero; a kept
one may be rounded to zero, which the record counts. W must not be modified.

One that chooses the mask as well has `prune(W, statistics, pattern, cfg, grid) -> Solution` beside it, where cfg is
that of the solver which it stands in for, named by `solver`.
"""

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """All `--quantiser` methods, sorted."""
    found = (m.name for m in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if hasattr(importlib.import_module(f"{__name__}.{name}"), "quantise"))


def module(name: str) -> ModuleType:
    """The module of one method. Raises ValueError naming `--quantiser` when there is none."""
    if name not in names():
        raise ValueError(f"--quantiser {name}: no such method; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
