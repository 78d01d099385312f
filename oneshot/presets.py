"""Presets: what `--method best` stands for at each `--effort`, as measured by scripts/best.py (results/best.md).

A preset is nothing but flags; whatever is given beside it on the command line wins.
"""

EFFORTS = {  # effort: (what it costs, the flags)
    1: ("SparseGPT's masks and weights aimed at the dense model", {"method": "sparsegpt", "dense_target": 0.5}),
    2: ("and 50 steps of distillation", {"method": "sparsegpt", "recover": "distil", "distil.steps": 50}),
    3: ("ditto, 100 steps", {"method": "sparsegpt", "recover": "distil", "distil.steps": 100}),
    4: ("ditto, 300 steps", {"method": "sparsegpt", "recover": "distil", "distil.steps": 300}),
    5: ("block reconstruction, then distillation", {
        "method": "sparsegpt", "recover": "block,distil", "block.steps": 200, "distil.steps": 1000}),
}
NAMES = ("best",)


def expand(method, given):
    """All flags of a run whose `--method` is `method`: a preset's own below those given, others as they are.

    Raises ValueError naming `--effort`.
    """
    if method not in NAMES:
        return {**given, "method": method}
    effort = given.get("effort", 3)
    if effort not in EFFORTS:
        raise ValueError(f"--effort {effort}: give 1 to {max(EFFORTS)}")
    flags = EFFORTS[effort][1]
    return {**flags, **given, "method": flags["method"], "preset": f"{method}-{effort}"}


def explain():
    """A line for each effort, for `--help`."""
    return "; ".join(f"--effort {k}: {text} ({said(flags)})" for k, (text, flags) in EFFORTS.items())


def said(flags):
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
