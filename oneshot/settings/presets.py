"""Presets: what `--method best` stands for at each `--effort`, as measured by scripts/bench/best.py.

A preset is nothing but a set of flags. Flags given on the command line take precedence, which tables mark by a star
after the name (best-3*).
"""

from typing import Any

from ..runtime.flag import listed
from .known import changes_preset, todays_names

EFFORTS: dict[int, tuple[str, dict[str, Any]]] = {  # {effort: (description, flags)}, in order of increasing cost
    1: ("SparseGPT's mask with refitted values", {"method": "sparsegpt+refit"}),
    2: ("ALPS aimed at the dense model's outputs", {"method": "alps", "dense_target": 0.5}),
    3: ("ALPS, each block healed, then a distillation (the whole model on the device), both short", {
        "method": "alps", "heal": "block,distil", "block.steps": 120, "block.lr": 0.01,
        "distil.steps": 160, "distil.lr": 0.002}),
    4: ("the same, longer", {
        "method": "alps", "heal": "block,distil", "block.steps": 200, "block.lr": 0.01,
        "distil.steps": 320, "distil.lr": 0.002}),
    5: ("the same, longest", {
        "method": "alps", "heal": "block,distil", "block.steps": 300, "block.lr": 0.01,
        "distil.steps": 1000, "distil.lr": 0.002}),
}
NAMES = ("best",)


def expand(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """All flags of a run with `--method method`: those given and, for a preset, its flags that are not given.

    Raises ValueError naming `--method` or `--effort`.
    """
    if "+" in method and set(NAMES) & set(method.split("+")):
        raise ValueError(f"--method {method}: best is a whole recipe, not part of a chain; choose its --effort, or "
                         "name the solver, such as alps+refit")
    if method not in NAMES:
        return {**given, "method": method}
    effort = given.get("effort", 3)
    if effort not in EFFORTS:
        raise ValueError(f"--effort {effort}: give 1 to {max(EFFORTS)}")
    flags = EFFORTS[effort][1]
    asked = {**flags, **given, "method": flags["method"]}
    parts = {*asked["method"].split("+"), *listed(asked.get("heal", "none")), asked.get("allocate")}
    own = {name for name in given if "." in name and name.partition(".")[0] in parts}
    changed = "*" if own or set(given) & (changes_preset() | set(flags)) - {"method"} else ""
    return asked | {"preset": f"{method}-{effort}{changed}"}


def recipe(given: dict[str, Any]) -> dict[str, Any]:
    """All settings that `given` asks for, under their current names and with a preset expanded.

    Equal recipes do the same to a model.
    """
    given = todays_names(given)
    whole = expand(given["method"], given)
    return {name: value for name, value in whole.items() if name not in ("preset", "effort")}


def check_effort(methods: list[str], given: dict[str, Any]) -> None:
    """Raise ValueError if `--effort` is given but no method is a preset."""
    if "effort" in given and not set(methods) & set(NAMES):
        raise ValueError(f"--effort {given['effort']}: goes with --method best")


def explain() -> str:
    """Two lines per effort, for `--help`."""
    return "\n".join(f"--effort {k}   {text}\n             {said(flags)}" for k, (text, flags) in EFFORTS.items())


def said(flags: dict[str, Any]) -> str:
    """Flags as they are written on a command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
