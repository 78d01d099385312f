"""Solvers: choose and set the weights of ONE linear. One file, one method; the file name is the `--method` name.

A solver is a module with

    needs       which calibration statistics it reads, a frozenset of names (calibrate/statistics.py)
    updates     whether weights that stay get new values
    Config      a frozen dataclass: its flags, each made by `runtime.flag.flag`, and `group`: its paper's comparison
                group for an unstructured pattern ("matrix", "row" or a number of columns)
    prune(W, statistics, pattern, cfg) -> Solution

where W (R, C) is the dense weight (floating point, at least float32; left untouched), rows = outputs. It is a pure
function: no device moves, no globals, nothing random.

A refiner has `refine(W, solution, statistics, pattern, cfg) -> Solution` instead of `prune` and keeps one law: the
layer's quadratic error tr((W-Ŵ) G (W-Ŵ)ᵀ) never grows beyond rounding, and the pattern still holds. `--method
wanda+refit` chains: the first name is a solver, each further one a refiner. A refiner reports only its own diagnostics.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field

import torch


@dataclass
class Solution:
    """What a solver decided.

    W_hat: (R, C), the new weight, zero wherever the mask is False.
    mask: bool (R, C), the decision; a kept weight may happen to be zero.
    info: plain values for the record ("damping": used). `info["warnings"]`, list of str, says every weaker path taken.
    """

    W_hat: torch.Tensor
    mask: torch.Tensor
    info: dict = field(default_factory=dict)


def names():
    """All `--method` parts there are: {"solver": [...], "refiner": [...]}, sorted."""
    found = {"solver": [], "refiner": []}
    for m in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        found["refiner" if hasattr(module(m), "refine") else "solver"].append(m)
    return found


def module(name):
    """The module of one solver or refiner."""
    return importlib.import_module(f"{__name__}.{name}")


def chain(method):
    """The modules that `--method` names, solver first: "wanda+refit" -> [wanda, refit].

    Raises ValueError naming `--method` when a part is unknown or stands in the wrong place.
    """
    known, parts = names(), method.split("+")
    for place, name in enumerate(parts):
        kind = "refiner" if place else "solver"
        if name not in known[kind]:
            other = "refiner" if kind == "solver" else "solver"
            hint = f" ({name} is a {other}: a chain is one solver, then refiners)" if name in known[other] else ""
            raise ValueError(f"--method {method}: {name!r} is not a {kind}{hint}; there are "
                             f"{', '.join(known[kind])}" + ("" if place else ", and alone dense and best"))
    return [module(name) for name in parts]


def short(module):
    """A solver's own name."""
    return module.__name__.rsplit(".", 1)[-1]


def solve(W, statistics, pattern, steps):
    """Run a chain on one linear. steps: [(module, cfg), ...], the first a solver, the rest refiners.

    The info of all parts is kept: the solver's as it is, a refiner's under its name ("refit.steps", "refit2.steps").
    """
    (solver, cfg), *refiners = steps
    solution, met = solver.prune(W, statistics, pattern, cfg), []
    info = solution.info
    for refiner, cfg in refiners:
        solution = refiner.refine(W, solution, statistics, pattern, cfg)
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
