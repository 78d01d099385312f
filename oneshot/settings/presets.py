"""Presets: what `--method best` stands for at each `--effort`, as measured by scripts/bench/best.py
(results/best/best.md).

A preset is nothing but flags; whatever is given beside it on the command line wins, and a star behind the name in
tables says so (best-3*).
"""

from ..runtime.flag import listed
from .known import changes_preset, todays_names

EFFORTS = {  # effort: (what it is, the flags); each adds to what the one before it costs
    1: ("SparseGPT's mask with the best values for it", {"method": "sparsegpt+refit"}),
    2: ("ALPS aimed at the dense model", {"method": "alps", "dense_target": 0.5}),
    3: ("ALPS, each block healed, then a distillation (the whole model on the device), both short", {
        "method": "alps", "heal": "block,distil", "block.steps": 25, "distil.steps": 25}),
    4: ("the same, longer", {
        "method": "alps", "heal": "block,distil", "block.steps": 60, "distil.steps": 60}),
    5: ("the same, at leisure", {
        "method": "alps", "heal": "block,distil", "block.steps": 100, "distil.steps": 300}),
}
NAMES = ("best",)


def expand(method: str, given: dict) -> dict:
    """All flags of a run whose `--method` is `method`: a preset's own below those given, others as they are.

    Raises ValueError naming `--method` or `--effort`.
    """
    if "+" in method and set(NAMES) & set(method.split("+")):
        raise ValueError(f"--method {method}: best is a whole recipe, nothing goes before or behind it; choose its "
                         "--effort, or name the solver, such as alps+refit")
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


def recipe(given: dict) -> dict:
    """All that `given` asks for: in today's names, a preset written out. Equal recipes do the same to a model."""
    given = todays_names(given)
    whole = expand(given["method"], given)
    return {name: value for name, value in whole.items() if name not in ("preset", "effort")}


def check_effort(methods: list[str], given: dict) -> None:
    """Raise ValueError where `--effort` is given and no method is a preset."""
    if "effort" in given and not set(methods) & set(NAMES):
        raise ValueError(f"--effort {given['effort']}: goes with --method best")


def explain() -> str:
    """Two lines for each effort, for `--help`."""
    return "\n".join(f"--effort {k}   {text}\n             {said(flags)}" for k, (text, flags) in EFFORTS.items())


def said(flags: dict) -> str:
    """Flags as they are written on the command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
