"""`oneshot shrink`: a smaller dense model of the same family, with fewer blocks, KV groups and neurons.

    oneshot shrink --model MODEL --to 0.75 --save DIR

is `oneshot prune --shrink 0.75 --pattern dense`, and takes all of its flags (`oneshot prune --help`). `--method` is the
solver that chooses and refits the units (default obs). With a `--pattern` besides, such as 2:4, the smaller model is
pruned to it by `--method`, and `--shrink-method` makes it smaller.
"""

import argparse
import sys

from ..runtime import distributed
from ..runtime.command import Parser
from ..structured.options import SMALLER
from . import run


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code (runtime/command.py)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    asks = {"-h", "--help"} & set(argv)
    if distributed.rank():  # the first process alone reads the command line
        return 0 if asks else run.main(argv)
    if asks:
        parser().parse_args(["--help"])
    return run.main(translated(argv))


def parser() -> Parser:
    """What `--help` shows."""
    p = Parser(prog="oneshot shrink", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               usage="oneshot shrink [--to SHARE | --layers N | --drop 3,7] [flags of oneshot prune]")
    p.add_argument("--to", metavar="SHARE", help="share of the blocks' parameters that is left (default: 0.75)")
    p.add_argument("--by", metavar="WHAT", help="parameters, bytes or latency")
    p.add_argument("--method", help="solver that chooses and refits the units (default: obs)")
    return p


def translated(argv: list[str]) -> list[str]:
    """The command line of `oneshot prune` that does the same."""
    words = [word.partition("=") for word in argv]
    names = {name.replace("_", "-") for name, _, _ in words if name.startswith("--")}
    found = [("--shrink" if name == "--to" else name) + eq + value for name, eq, value in words]
    if not names & {"--to", *(f"--{name.replace('_', '-')}" for name in SMALLER)}:
        found += ["--shrink", "0.75"]
    if "--pattern" in names:
        return found
    found += ["--pattern", "dense"]
    if "--method" not in names:
        return [*found, "--method", "obs"]
    if "--shrink-method" not in names:
        place = next(i for i, (name, _, _) in enumerate(words) if name == "--method")
        _, eq, value = words[place]
        found += ["--shrink-method", value if eq else (argv[place + 1] if place + 1 < len(argv) else "")]
    return found
