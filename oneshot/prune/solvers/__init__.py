"""Solvers: prune ONE linear. One file, one method, named as for `--method`.

A solver is a module with

    needs       which calibration statistics it uses, a frozenset of names (calibrate/statistics.py)
    updates     whether kept weights get new values
    Config      a frozen dataclass: its flags, each made by `runtime.flag.flag`, and `group`, the comparison group for
                an unstructured pattern that its paper uses ("matrix", "row" or a number of columns)
    prune(W, statistics, pattern, cfg) -> Solution

where W (R, C) is the dense weight, rows = outputs, in float32 or float64; it must not be modified. `prune` is a pure
function: it moves nothing between devices, uses no global state, and is not random.

A refiner has `refine(W, solution, statistics, pattern, cfg) -> Solution` instead of `prune` and obeys one law: the
layer's quadratic error tr((W-Ŵ) G (W-Ŵ)ᵀ) never grows, beyond rounding, and the pattern still holds. `--method
wanda+refit` chains them: the first name is a solver, the others are refiners. A refiner reports only its own
diagnostics.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from ...calibrate.statistics import Statistics
from ..patterns import Pattern

KEEP = "keep"  # the solver of a model that is pruned already


@dataclass
class Solution:
    """What a solver found.

    W_hat: (R, C), the new weight, zero wherever the mask is False.
    mask: bool (R, C), which weights are kept; a kept weight may happen to be zero. bias: (R,), what is to be added to
    the linear's bias, or None.
    info: plain values for the record ("damping": the one used). `info["warnings"]`, a list of str, has one entry for
    every fallback taken.
    scales: (R, groups), where W_hat was rounded to a grid (quantise/grids.py): W_hat is scale · code; else None.
    """

    W_hat: torch.Tensor
    mask: torch.Tensor
    info: dict = field(default_factory=dict)
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None


def names() -> dict[str, list[str]]:
    """All parts of a `--method`: {"solver": [...], "refiner": [...]}, sorted."""
    found: dict[str, list[str]] = {"solver": [], "refiner": []}
    for m in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        found["refiner" if hasattr(module(m), "refine") else "solver"].append(m)
    return found


def module(name: str) -> ModuleType:
    """The module of one solver or refiner."""
    return importlib.import_module(f"{__name__}.{name}")


def chain(method: str) -> list[ModuleType]:
    """The modules that `--method` names, solver first: "wanda+refit" -> [wanda, refit].

    Raises ValueError naming `--method` when a part is unknown or in the wrong place.
    """
    return chain_named(method, "--method")


def chain_named(method: str, flag: str) -> list[ModuleType]:
    """The modules of a chain, which was given as `flag`; see `chain`."""
    known, parts = names(), method.split("+")
    for place, name in enumerate(parts):
        kind = "refiner" if place else "solver"
        if name not in known[kind]:
            other = "refiner" if kind == "solver" else "solver"
            hint = f" ({name} is a {other}: a chain is one solver, then refiners)" if name in known[other] else ""
            raise ValueError(f"{flag} {method}: {name!r} is not a {kind}{hint}; there are "
                             f"{', '.join(known[kind])}" + ("" if place else ", and, without a chain, dense and best"))
    return [module(name) for name in parts]


def short(module: ModuleType) -> str:
    """The name of a solver, refiner or any other module of a method: its module's last name."""
    return module.__name__.rsplit(".", 1)[-1]


def solve(W: torch.Tensor, statistics: Statistics | None, pattern: Pattern,
          steps: Sequence[tuple[ModuleType, Any]]) -> Solution:
    """Run a chain on one linear's weight W (R, C). steps: [(module, its Config), ...], a solver, then refiners.

    statistics: of the linear's inputs; None only if no part needs any. The info of all parts is kept: the solver's as
    it is, a refiner's under its name ("refit.steps", "refit2.steps").
    """
    (solver, cfg), *refiners = steps
    solution, met = solver.prune(W, statistics, pattern, cfg), []
    info = solution.info
    for refiner, cfg in refiners:
        bias = solution.bias
        solution = refiner.refine(W, solution, statistics, pattern, cfg)
        solution.bias = bias if solution.bias is None else solution.bias
        met.append(short(refiner))
        part = met[-1] + (str(met.count(met[-1])) if met.count(met[-1]) > 1 else "")
        warnings = [*info.get("warnings", []), *solution.info.pop("warnings", [])]
        info |= {f"{part}.{key}": value for key, value in solution.info.items()}
        if warnings:
            info["warnings"] = warnings
    solution.info = info
    if any(module.updates for module, _ in steps) and statistics.n < W.shape[1] and not solution.mask.all():
        solution.info.setdefault("warnings", []).append(
            f"{statistics.n} calibration tokens for {W.shape[1]} inputs: new values may fit these alone (--nsamples)")
    return solution
