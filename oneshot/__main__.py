"""The command `oneshot` (and `python -m oneshot`): `oneshot prune | verify | generate | compare`."""

import importlib
import sys

COMMANDS = {  # verb: (module with its main, what it does)
    "prune": ("oneshot.pipeline.run", "prune a model, measure what that cost, write it"),
    "verify": ("oneshot.checkpoint.verify", "prove that a written checkpoint is what its manifest says"),
    "generate": ("oneshot.pipeline.generate", "continue a text with a model, dense or packed, and say how fast"),
    "compare": ("oneshot.report.compare", "any finished runs in one table and one page"),
}


def main(argv: list[str] | None = None) -> int:
    """Exit code of the command line; without a verb it is `prune`'s."""
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
    module, _ = COMMANDS[verb if verb in COMMANDS else "prune"]
    return importlib.import_module(module).main(argv[1:] if verb in COMMANDS else argv)


def usage() -> str:
    """What there is."""
    lines = [f"  oneshot {verb:<9} {text}" for verb, (_, text) in COMMANDS.items()]
    return "\n".join(["Prune a language model once, prove what it cost, run it faster.", "", *lines, "",
                      "`oneshot VERB --help` lists a verb's flags."])


if __name__ == "__main__":
    sys.exit(main())
