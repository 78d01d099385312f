"""Flags of solvers, refiners, allocations and healing methods: the value arrives, and changes the weights."""

import functools
import json

from oneshot import heal, quantise
from oneshot.prune import allocate, solvers
from oneshot.settings.known import known
from wires import CHECKS, differ, wire

VALUES = {  # flag of a solver or a refiner: a value that gives other weights than the default
    "admm.damping": 1.0, "admm.rho": 5.0, "admm.iterations": 60, "admm.mask_iterations": 3,
    "alps.rho": 2.0, "alps.growth": 3.0, "alps.steps": 2, "alps.rest": 0.2, "alps.refit_steps": 0,
    "dsnot.start": "magnitude", "dsnot.cycles": 1, "dsnot.threshold": 0.9, "ria.a": 2.0,
    "obs.damping": 1.0, "sparsegpt.damping": 1.0, "sparsegpt.block_size": 8, "wanda.use_variant": True,
    "refit.steps": 1, "refit.tolerance": 0.5,
    "swaps.candidates": 6, "swaps.depth": 1, "swaps.beginnings": 8, "swaps.rounds": 1,
}
OBS = {"method": "obs", "shrink": 0.7, "tries": 1, "pattern": "dense"}
OTHERS = {  # flag of an allocation or a healing method: such a value, and what stands beside it
    "arithmetic.slope": (0.4, {"allocate": "arithmetic"}),
    "error.spread": (0.3, {"allocate": "error"}), "error.points": (3, {"allocate": "error", "error.spread": 0.3}),
    "error.early": (1.0, {"allocate": "error"}),
    "mix.budget": (0.6, {"allocate": "mix", "pattern": "2:4"}),
    "mix.also": ("3:4", {"allocate": "mix", "pattern": "2:4", "mix.budget": 0.9}),
    "owl.spread": (0.3, {"allocate": "owl"}), "owl.outlier": (1.5, {"allocate": "owl"}),
    "block.unit": ("parts", {"heal": "block", "block.steps": 2}), "block.steps": (3, {"heal": "block"}),
    "block.lr": (0.001, {"heal": "block", "block.steps": 2}),
    "obs.step": (1.0, OBS), "obs.ridge": (3.0, OBS), "obs.refit": (False, OBS), "obs.weigh": (False, OBS),
    "fold.everywhere": (False, {**OBS, "heal": "fold", "nsamples": 40}),
    "gptq.search": (False, {"method": "magnitude", "quantise": "int3"}),
    "gptq.order": (False, {"method": "magnitude", "quantise": "int3"}),
    "gptq.damping": (1.0, {"method": "magnitude", "quantise": "int3"}),
    "distil.steps": (3, {"heal": "distil"}), "distil.lr": (1e-4, {"heal": "distil", "distil.steps": 2}),
}


def reaches(b, name, value, beside):
    """The value arrives in the Config that the part is called with, and changes the weights."""
    part, _, field = name.partition(".")
    if known()[name].chosen_by == "heal":
        owner, call, config = heal.Heal, "__init__", lambda args: args[0].cfg
    elif known()[name].chosen_by == "allocate":
        owner, call, config = allocate.module(part), "plan", lambda args: args[3]
    elif known()[name].chosen_by == "quantiser":
        owner, call, config = quantise.module(part), "quantise", lambda args: args[4]
    else:
        owner = solvers.module(part)
        call, config = "refine" if hasattr(owner, "refine") else "prune", lambda args: args[-1]
    with b.seen(owner, call, lambda args, *_: getattr(config(args), field)) as found:
        changed = b.weights(**beside | {name: value})
    assert set(found) == {value}
    assert differ(changed, b.weights(**beside))


for flag, value in VALUES.items():
    part = flag.partition(".")[0]
    beside = {"method": f"wanda+{part}" if part in solvers.names()["refiner"] else part}
    CHECKS[flag] = functools.partial(reaches, name=flag, value=value, beside=beside)
CHECKS["flap.bias"] = lambda b: _flap(b)
for flag, (value, beside) in OTHERS.items():
    CHECKS[flag] = functools.partial(reaches, name=flag, value=value, beside={"method": "wanda", **beside})


def _flap(b):
    """Only with it do linears get biases."""
    given = {"method": "flap", "shrink_method": "flap", "shrink": 0.7, "tries": 1, "pattern": "dense"}
    with_bias, without = b.weights(**given), b.weights(**given | {"flap.bias": False})
    assert any(name.endswith("down_proj.bias") for name in with_bias)
    assert not any(name.endswith(".bias") for name in without)


@wire("sensitivity.record", "sensitivity.spread")
def _(b):
    """The record's own ranks decide; other ranks, and another spread of them, give other weights."""
    measured = b.tmp / "measured.json"
    record = b.record(method="wanda", sensitivity="linear", evaluate=b.place / "evaluation.txt", eval_windows=4)
    turned = b.tmp / "turned.json"
    measured.write_text(json.dumps(record))
    for row in record["sensitivity"]:
        row["loss_increase"] *= -1
    turned.write_text(json.dumps(record))
    beside = {"method": "wanda", "allocate": "sensitivity", "sensitivity.record": measured}
    reaches(b, "sensitivity.record", str(turned), beside)
    reaches(b, "sensitivity.spread", 0.3, beside)
