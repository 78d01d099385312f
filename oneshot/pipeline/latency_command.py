"""`oneshot latency MODEL`: what each part of a model costs on this device: the time of a prompt and of a token.

    oneshot latency ./llama --out here.json

The table is measured once for a model's shapes, device and versions and then read from the cache. Blocks of other
widths and numbers can be foretold from it; the last columns show how well (pipeline/device_table.py). What has no
kernel on the device (pipeline/forms.py) is not in it. decode1 is a token as `oneshot generate` computes it: by one
compiled call on a CPU where the family allows it.
"""

import argparse
import json
import sys
from pathlib import Path

from .. import models
from ..measure import latency
from ..report.table import render
from ..runtime import environment
from ..runtime.command import Parser, exit_code
from ..runtime.files import write_text, writing
from . import device_table


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code (runtime/command.py)."""
    p = Parser(prog="oneshot latency", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL", help="folder, name on the hub, demo or smollm2")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    p.add_argument("--dtype", default="auto", help="dtype to compute in (default: as stored)")
    p.add_argument("--rounds", type=int, default=latency.ROUNDS, help="rounds of measuring (default: %(default)s)")
    p.add_argument("--out", type=Path, help="file for the table, JSON")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    p.add_argument("--no-progress", dest="progress", action="store_false", help="show no bars")
    return exit_code(lambda: work(p.parse_args(argv)))


def work(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    device = environment.resolve_device(args.device)
    environment.check_device(device)
    if args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds}: must be at least 1")
    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a folder; name a file")
    models.quiet()
    model, _ = models.load(args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    found = device_table.table(model.to(device), device, args.rounds, args.progress)
    print(shown(found))
    for line in device_table.warnings(found):
        print(f"warning: {line}", file=sys.stderr)
    if args.out:
        with writing("--out", args.out):
            write_text(json.dumps(found, indent=1), args.out)
        print(f"table: {args.out}")


def shown(table: dict) -> str:
    """The table as the terminal shows it, ms."""
    saved = [(unit, n) for unit, points in table["parts"]["decode1"]["saved"].items() for n in points]
    stored, heads = (list(table["parts"]["decode1"].get(part, {})) for part in ("forms", "head"))
    head = ["ms", "rest", *(f"with the head in {key}" for key in heads), "a block",
            *(f"with {n} {unit}" for unit, n in saved), *(f"in {form}" for form in stored), "whole model", "foretold"]
    body = []
    for kind, own in table["parts"].items():
        whole = table["checks"]["whole model"][kind]
        less = [own["block"] - own["saved"][unit][n] for unit, n in saved]
        less += [own["block"] - own["forms"][form] for form in stored]
        rest = [own["rest"], *(own["rest"] - own["head"][key] for key in heads)]
        body.append([kind, *(f"{ms:.3f}" for ms in (*rest, own["block"], *less, whole["measured"])),
                     f"{whole['foretold']:.3f} ({whole['off']:+.0%})"])
    told = f"{table['device']}, threads {table['threads']}, {table['dtype']}, torch {table['torch']}, {table['date']}"
    told += f"; decode1 by {table.get('decoding', 'transformers')}"
    return f"{told}\n\n{render(head, body, 'terminal', text={'ms'})}"
