"""The command `oneshot` (and `python -m oneshot`): `oneshot plan | prune | shrink | heal | verify | generate ...`."""

import gc
import importlib
import os
import sys
from types import ModuleType

COMMANDS = {  # verb: (module with its main, what it does)
    "prune": ("oneshot.pipeline.run", "prune a model, measure what that cost, save the result"),
    "shrink": ("oneshot.pipeline.shrink_command", "make a smaller dense model: fewer layers, neurons, KV groups"),
    "fit": ("oneshot.pipeline.fit.command", "make a model smaller step by step, with a floor under its quality"),
    "heal": ("oneshot.pipeline.heal_command", "train what pruning has left, on text, while zeros stay zero"),
    "plan": ("oneshot.pipeline.plan_command", "say what a run will take, and which flags make it fit"),
    "latency": ("oneshot.pipeline.latency_command", "measure what each part of a model costs on this device"),
    "verify": ("oneshot.checkpoint.verify", "check a saved checkpoint against its manifest"),
    "generate": ("oneshot.pipeline.generate", "generate text with a dense or packed model and measure the speed"),
    "compare": ("oneshot.report.compare", "put finished runs into one table and one page"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code (runtime/command.py); without a verb, run `oneshot prune`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    verb = argv[0] if argv else ""
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb == "--version":
        from . import __version__

        print(f"oneshot {__version__}")
        return 0
    if verb and not verb.startswith("-") and verb not in COMMANDS:
        print(f"error: {verb}: no such command; there are {', '.join(COMMANDS)} (oneshot --help)", file=sys.stderr)
        return 2
    from .runtime.command import SHARED, exit_code

    if verb in COMMANDS and verb not in SHARED:
        from .runtime import distributed

        if code := exit_code(distributed.check):
            return code
    module, _ = COMMANDS[verb if verb in COMMANDS else "prune"]
    return imported(module).main(argv[1:] if verb in COMMANDS else argv)


def imported(name: str) -> ModuleType:
    """Import a verb's module. What comes with it (torch, transformers) stays until the process ends, so the garbage
    collector does not go over it, neither meanwhile nor at the end: a large part of a command's time to start.
    """
    wait_patiently()
    if name in sys.modules or not gc.isenabled():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def wait_patiently() -> None:
    """Let torch's threads spin for microseconds when they wait for each other, unless the environment says how long.

    GCC's OpenMP, read when torch is imported, lets them spin for a thousand times as long: where another process has
    one of the processors, that is ten times the time of the whole run (results/LOG.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "2000"


def usage() -> str:
    """The text of `oneshot --help`: every verb with one line."""
    lines = [f"  oneshot {verb:<9} {text}" for verb, (_, text) in COMMANDS.items()]
    return "\n".join(["Prune a language model in one shot, measure exactly what that cost, run it faster.", "", *lines,
                      "",
                      "`oneshot VERB --help` lists a verb's flags. Without a verb it is prune, which without flags",
                      "prunes the built-in model."])


if __name__ == "__main__":
    sys.exit(main())
