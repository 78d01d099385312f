"""`oneshot fit`: make a model smaller step by step until targets are met, as long as quality stays above its floors.

    oneshot fit --model MODEL --target latency=0.6x,bytes=0.5x --floor "wikitext2/ppl<=1.1x" --evaluate wikitext2 \\
        --calibration c4 --data c4 --tokens 1M --save fitted

Each round takes a step of the way to the targets. What may go (blocks, KV groups, neurons) or be stored otherwise (each
block in 2:4, int8, int4, 2:4 with integers) is measured: its loss on calibration windows, its gain in the table of the
device (`oneshot latency`). The plan of least loss is run and healed on --data. A round that breaks a floor is taken
back and tried again, with half the step and another way, twice; then the best state that keeps all floors is the
result. Rounds are ordinary runs, with folders and records in --save; a killed command continues. Beside them stands
plain rounding of the dense model.

    target   latency=0.75: time of decoding a token on --device, beside the dense model's in --dtype; bytes=0.5: stored
             bytes of all linears; parameters=0.7: of the transformer blocks; several by commas
    floor    TEXT/ppl<=1.5x: times the dense model's; arc_easy/acc>=-2%: less than the dense model's by at most 0.02;
             TEXT/ppl<=40: the value itself. It holds if it does so with the metric's standard error (one side of 19
             in 20) on top

Exit code: 0 the targets are met, 3 a floor stood in the way, or time is up, or nothing is left to take, 2 the command
is wrong. All other flags are those of `oneshot prune`; they go to every round.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ... import models
from ...heal.options import count
from ...runtime import environment
from ...runtime.command import Parser, exit_code
from .. import checks, device_table, run
from . import ending, steps, targets
from .ledger import Ledger
from .rounds import Asked, Fit
from .steps import State, Steps

MET, STOPPED = 0, 3
TOKENS = "200k"
LONG = 4  # times --tokens: the heal at the end, unless --final says otherwise


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code, see above."""
    codes: list[int] = []

    def work() -> None:
        args, rest = parser().parse_known_args(sys.argv[1:] if argv is None else argv)
        fit, text = fitted(args, rest)
        print(text)
        codes.append(MET if fit.met(fit.shares) else STOPPED)
    return exit_code(work, interrupted=lambda: "the same command continues") or codes[0]


def parser() -> Parser:
    """The command's own flags."""
    p = Parser(prog="oneshot fit", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--target", required=True, help="latency=SHARE, bytes=SHARE, parameters=SHARE, by commas")
    p.add_argument("--floor", action="append", default=[], help="a bound on a metric; may be given several times")
    p.add_argument("--step", default="10%", help="share of the way that a round takes; 100%%: one shot (default: 10%%)")
    p.add_argument("--allow", default=",".join(targets.FORMS), help="what may be done (default: %(default)s)")
    p.add_argument("--budget", help="time for all rounds and the long heal, such as 2h: no round begins that would "
                                    "exceed it (default: none)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, or a table that `oneshot latency --out` wrote on "
                                                    "the device that the model is for")
    p.add_argument("--data", help="text to heal on (default: no healing but folding)")
    p.add_argument("--tokens", help=f"tokens of it in each round (default: {TOKENS})")
    p.add_argument("--final", help="tokens of the long heal at the end; none: no such heal (default: four times "
                                   "--tokens, with --data)")
    p.add_argument("--save", required=True, help="folder for the rounds")
    p.add_argument("--method", default="obs", help="solver that chooses neurons and KV groups (default: %(default)s)")
    return p


def fitted(args: argparse.Namespace, rest: Sequence[str]) -> tuple[Fit, str]:
    """(the rounds, done; what the command says). Raises ValueError naming the flag for what cannot be used."""
    began, folder, (device, table) = time.perf_counter(), Path(args.save), device_of(args.device)
    allow = targets.allow(args.allow)
    for flag, tokens in (("--tokens", args.tokens), ("--final", args.final)):
        if tokens not in (None, "none") and args.data is None:
            raise ValueError(f"{flag} {tokens}: heals on text; give --data")
    args.tokens = args.tokens or TOKENS
    count(args.tokens, "--tokens")
    if args.data is not None and "heal" not in allow:
        raise ValueError(f"--data {args.data}: is text to heal on, and --allow {args.allow} does not name heal")
    asked = Asked(targets.targets(args.target), [targets.floor(text) for text in args.floor], targets.step(args.step),
                  allow, targets.budget(args.budget), table, final_of(args))
    words = (*rest, "--device", device)
    steps.refuse(words)
    heal = () if args.data is None else ("--heal-data", args.data, "--heal-tokens", args.tokens, "--heal-teacher",
                                         args.model)
    own = Steps(words, args.model, "", args.method, heal, folder)
    checks.check([own.dense, own.cutting])
    models.quiet()
    model, _ = steps.load(own.dense, args.model)
    if table is not None:
        fits(table, model, args.device)
    head, _ = models.output_head(model) or ("", None)
    own = Steps(words, args.model, models.blocks(model)[0], args.method, heal, folder, head)
    known = Ledger(folder, [{k: v for k, v in vars(args).items() if k != "save"},
                            [word for word in rest if word != "--no-progress"], models.fingerprint(model), table])
    dense = run.run(own.dense)
    targets.check(asked.floors, dense)
    fit = Fit(asked, own, known, dense, State(args.model, args.model), time.perf_counter() - began)
    fit.run()
    known.ending["stopped"] = fit.stopped
    known.write()
    fit.final()
    return fit, ending.finish(fit)


def final_of(args: argparse.Namespace) -> str | None:
    """The tokens of the long heal, None without. Raises ValueError naming `--final`."""
    if args.data is None or args.final == "none":
        return None
    return str(LONG * count(args.tokens) if args.final is None else count(args.final, "--final"))


def device_of(text: str) -> tuple[str, dict | None]:
    """(the device to compute on, the table of another device or None). Raises ValueError naming `--device`."""
    if text.endswith(".json") or Path(text).is_file():
        return "auto", device_table.read(Path(text))
    try:
        environment.check_device(environment.resolve_device(text))
    except ValueError as error:
        raise ValueError(f"{error}; or the file that `oneshot latency --out` wrote there: without its table no device "
                         "is guessed") from None
    return text, None


def fits(table: dict, model: nn.Module, name: str) -> None:
    """Raise ValueError naming `--device` for a table of another model, or of another dtype."""
    L = len(models.blocks(model)[1])
    units = {unit: device_table.of(model, unit) for unit in table["units"]}
    if (table["family"], table["blocks"], table["units"]) != (model.config.model_type, L, units):
        raise ValueError(f"--device {name}: is the table of a {table['family']} of {table['blocks']} blocks "
                         f"({table['units']}), and --model is a {model.config.model_type} of {L} ({units}); measure "
                         "this model there")
    dtype = str(model.dtype).removeprefix("torch.")
    if table.get("dtype") != dtype:
        raise ValueError(f"--device {name}: its times are those of {table.get('dtype')}, and --model is {dtype} here; "
                         f"give --dtype {table.get('dtype')}, or measure there with --dtype {dtype}")
