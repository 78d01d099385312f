"""`oneshot fit`: make a model smaller step by step until a target is met, as long as quality stays above its floors.

    oneshot fit --model MODEL --target latency=0.75 --floor "wikitext2/ppl<=1.5x" --evaluate wikitext2 \\
        --calibration c4 --data c4 --tokens 1M --save fitted

Every round takes --step of the blocks' parameters (`oneshot shrink`), heals what is left on --data, and measures. A
round that breaks a floor is undone and tried again with half the step, twice; then the best state that keeps all floors
is the result. Rounds are ordinary runs, with folders and records of their own in --save; a killed command continues.
Beside them stands what plain rounding of the dense model to int8 would have given, with its measured bytes.

    target   parameters=0.7: share of the blocks' parameters; latency=0.75: time of decoding a token on this device
    floor    TEXT/ppl<=1.5x: times the dense model's; arc_easy/acc>=-0.02: less than the dense model's by at most that;
             TEXT/ppl<=40: the value itself

Exit code: 0 the target is met, 3 a floor stood in the way, or no unit is left to take, 2 the command is wrong. All
other flags are those of `oneshot prune`; they go to every round.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import models
from ..measure import higher, latency
from ..report.table import render
from ..runtime.command import Parser, exit_code, one_line
from ..runtime.files import write_text
from ..settings import parse
from . import run

ROUNDED = "int8"  # what plain rounding of the dense model gives stands beside the rounds
TRIES = 2  # how often the step is halved
SLACK = 1e-6  # a share that is that near another is the same
KINDS = ("parameters", "latency")
MET, STOPPED = 0, 3


@dataclass(frozen=True)
class Floor:
    """A bound on a metric. relative: "x": times the dense model's; "+": added to it; "": the value itself."""

    metric: str
    at_least: bool
    value: float
    relative: str

    def bound(self, dense: float) -> float:
        """The bound itself."""
        return {"x": self.value * dense, "+": self.value + dense, "": self.value}[self.relative]

    def holds(self, metrics: dict[str, float], dense: dict[str, float]) -> bool:
        """Whether a round keeps it."""
        bound = self.bound(dense[self.metric])
        return metrics[self.metric] >= bound if self.at_least else metrics[self.metric] <= bound  # NaN: never


@dataclass
class Round:
    """One round. share: of the blocks' parameters that it aims at. step: what it took. model: what it started from.

    reached: the share that whole units left. failed: why it could not be cut, or None.
    kept: whether all floors hold. broken: the floors that do not, in words.
    """

    number: int
    share: float
    step: float
    model: str
    reached: float | None = None
    failed: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    latency: float | None = None
    kept: bool = False
    broken: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code, see above."""
    codes: list[int] = []
    p = Parser(prog="oneshot fit", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--target", required=True, help="parameters=SHARE or latency=SHARE")
    p.add_argument("--floor", action="append", default=[], help="a bound on a metric; may be given several times")
    p.add_argument("--step", type=float, default=0.1, help="share that a round takes away (default: %(default)s)")
    p.add_argument("--data", help="text to heal on (default: no healing but folding)")
    p.add_argument("--tokens", default="200k", help="tokens of it in each round (default: %(default)s)")
    p.add_argument("--save", required=True, help="folder for the rounds")
    p.add_argument("--method", default="obs", help="solver that chooses the units (default: %(default)s)")

    def work() -> None:
        args, rest = p.parse_known_args(sys.argv[1:] if argv is None else argv)
        codes.append(Fit(args, rest).run())
    return exit_code(work, interrupted=lambda: "the same command continues") or codes[0]


class Fit:
    """The rounds of one command. Raises ValueError naming the flag for what cannot be used."""

    def __init__(self, args: argparse.Namespace, rest: list[str]) -> None:
        self.args, self.rest, self.folder = args, rest, Path(args.save)
        self.kind, self.target = target(args.target)
        self.floors = [floor(text) for text in args.floor]
        if not 0 < args.step < 1:
            raise ValueError(f"--step {args.step:g}: give a share between 0 and 1, such as 0.1")
        [self.dense_cfg] = self.parsed("--method", "dense")
        [self.rounded_cfg] = self.parsed("--method", "dense", "--no-dense", "--quantise", ROUNDED, "--quantiser", "rtn")
        models.quiet()

    def parsed(self, *words: str) -> list:
        """The runs that a round's command line asks for."""
        return parse([*self.rest, "--model", self.args.model, "--results", str(self.folder / "records"), *words])

    def run(self) -> int:
        """All rounds; exit code."""
        began = self.read()
        dense = numbers(run.run(self.dense_cfg)["metrics"])
        for own in self.floors:
            if own.metric not in dense:
                raise ValueError(f"--floor {own.metric}: not measured; there are {', '.join(sorted(dense)) or 'none'} "
                                 "(--evaluate and --tasks say what is)")
            if not math.isfinite(own.bound(dense[own.metric])):
                raise ValueError(f"--floor {own.metric}: is {dense[own.metric]:g} for --model, which no round can keep")
        rounds: list[Round] = []
        best, share, reached, step, tries = self.args.model, 1.0, 1.0, self.args.step, 0
        while not self.met(share, rounds) and tries <= TRIES:
            aim = share - step if self.kind == "latency" else max(self.target, share - step)
            if reached <= aim + SLACK:  # whole units took more than was asked
                share = aim
                continue
            now = Round(len(rounds) + 1, aim, step, best)
            known = began[len(rounds)] if len(rounds) < len(began) else None
            self.measure(now, reached, known)
            now.broken = [now.failed] if now.failed else [
                said(own, now.metrics, dense) for own in self.floors if not own.holds(now.metrics, dense)]
            now.kept = not now.broken
            rounds.append(now)
            self.write(rounds)
            if now.kept:
                best, share, reached, tries = str(self.round(now)), aim, now.reached, 0
            else:
                step, tries = step / 2, tries + 1
        print(self.told(rounds, dense, run.run(self.rounded_cfg), best))
        return MET if self.met(share, rounds) else STOPPED

    def met(self, share: float, rounds: list[Round]) -> bool:
        """Whether the target is reached by the last round that was kept."""
        if self.kind == "parameters":
            return share <= self.target + 1e-9
        kept = [r for r in rounds if r.kept]
        return bool(kept) and kept[-1].latency <= self.target

    def measure(self, now: Round, share: float, known: dict | None) -> None:
        """Do a round and fill in what was measured. share: what it starts from. known: the same, from before a kill."""
        if now.share < SLACK:
            now.failed = "nothing would be left"
            return
        heal = ["--heal", "fold"] if self.args.data is None else [
            "--heal", "fold,full", "--heal-data", self.args.data, "--heal-tokens", self.args.tokens, "--heal-teacher",
            self.args.model]
        [cfg] = self.parsed("--model", now.model, "--method", self.args.method, "--pattern", "dense", "--shrink",
                            f"{now.share / share:.6g}", "--shrink-method", self.args.method, *heal, "--no-dense",
                            "--save", str(self.round(now)))
        try:
            record = run.run(cfg)
        except ValueError as error:
            if not str(error).startswith("--shrink"):
                raise
            now.failed = one_line(error)  # this model has no unit left that could go
            return
        if record["shrunk"]["share"] >= 1:
            now.failed = f"a step of {now.step:g} is less than one unit"
            return
        now.metrics, now.reached = numbers(record["metrics"]), share * record["shrunk"]["share"]
        if self.kind == "latency":
            now.latency = known["latency"] if known else self.latency(self.round(now))

    def latency(self, folder: Path) -> float:
        """The time of decoding a token, as a share of the dense model's, both in turns."""
        named = {"model": models.load(str(folder))[0], "dense": models.load(self.args.model)[0]}
        return 1 / latency.compare(named, self.dense_cfg.device)["model"]["decode1"]["speedup"]

    def round(self, now: Round) -> Path:
        """A round's folder."""
        return self.folder / f"round-{now.number}"

    def read(self) -> list[dict]:
        """The rounds that a killed command has measured. Raises ValueError naming `--save` for another command's."""
        file = self.folder / "fit.json"
        if not file.is_file():
            return []
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            asked, rounds = data["asked"], [asdict(Round(**row)) for row in data["rounds"]]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"--save {self.folder}: its fit.json is damaged; remove it: rounds that are finished are "
                             "timed again, not made again") from None
        if asked != self.asked():
            raise ValueError(f"--save {self.folder}: holds the rounds of another command; choose another folder")
        return rounds

    def asked(self) -> list:
        """What identifies the command."""
        own = {key: value for key, value in vars(self.args).items() if key != "save"}
        return [own, [word for word in self.rest if word != "--no-progress"]]

    def write(self, rounds: list[Round]) -> None:
        """Write fit.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps({"asked": self.asked(), "rounds": [asdict(r) for r in rounds]}, indent=1),
                   self.folder / "fit.json")

    def told(self, rounds: list[Round], dense: dict[str, float], rounded: dict, best: str) -> str:
        """What the command prints at its end. rounded: the record of the dense model with its linears rounded."""
        plain, size = numbers(rounded["metrics"]), rounded["bytes"]["stored"] / rounded["bytes"]["dense"]
        metrics = list(dict.fromkeys([own.metric for own in self.floors] + [m for m in dense if m.endswith("ppl")]))
        head = ["round", "parameters", "time", *metrics, "kept"]
        body = [["dense", "100 %", "1.00", *(f"{dense[m]:.4g}" for m in metrics), ""]]
        body.append([ROUNDED, "100 %", "", *(f"{plain[m]:.4g}" for m in metrics),
                     f"plain rounding, {size:.0%} of the linears' bytes"])
        for r in rounds:
            body.append([str(r.number), f"{r.reached or r.share:.1%}", "" if r.latency is None else f"{r.latency:.2f}",
                         *(f"{r.metrics[m]:.4g}" if r.metrics else "" for m in metrics),
                         "yes" if r.kept else "; ".join(r.broken)])
        end = "target met" if self.met(share_of(rounds), rounds) else \
            "the model cannot get smaller: " * bool(rounds[-1].failed) + "a floor stands in the way: " * (
                not rounds[-1].failed) + "; ".join(rounds[-1].broken)
        if self.floors and all(own.holds(plain, dense) for own in self.floors):
            kept = f"keeps all floors at {size:.0%} of the linears' bytes"
            end = f"plain {ROUNDED} rounding of the dense model {kept}\n{end}"
        return f"{render(head, body, 'terminal', text={'round', 'kept'})}\n{end}\nresult: {best}"


def numbers(metrics: dict[str, float | None]) -> dict[str, float]:
    """Metrics of a record, in which null stands for what is no number."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def share_of(rounds: list[Round]) -> float:
    """The share of the last round that was kept."""
    return next((r.share for r in reversed(rounds) if r.kept), 1.0)


def said(own: Floor, metrics: dict[str, float], dense: dict[str, float]) -> str:
    """A broken floor in words."""
    sign = ">=" if own.at_least else "<="
    return f"{own.metric} {metrics[own.metric]:.4g}, asked {sign} {own.bound(dense[own.metric]):.4g}"


def target(text: str) -> tuple[str, float]:
    """(kind, share) of `--target`. Raises ValueError naming the flag."""
    match = re.fullmatch(r"(\w+)=(\d*\.?\d+)x?", text)
    if not match or match[1] not in KINDS or not 0 < float(match[2]) < 1:
        raise ValueError(f"--target {text}: give {' or '.join(f'{kind}=0.75' for kind in KINDS)}")
    return match[1], float(match[2])


def floor(text: str) -> Floor:
    """The Floor written as `text`. Raises ValueError naming the flag."""
    match = re.fullmatch(r"([^<>=\s]+)\s*(<=|>=)\s*([-+]?\d*\.?\d+)(x?)", text)
    if not match:
        raise ValueError(f"--floor {text}: give METRIC<=NUMBERx, METRIC>=-NUMBER or METRIC<=NUMBER")
    last = match[1].rpartition("/")[2]
    relative = "x" if match[4] else "+" if match[3][0] in "+-" else ""
    at_least, better = match[2] == ">=", last.startswith(higher())
    if at_least != better and last.startswith(("ppl", *higher())):
        raise ValueError(f"--floor {text}: of {match[1]}, {'higher' if better else 'lower'} values are better, so it "
                         f"needs {'>=' if better else '<='}")
    return Floor(match[1], at_least, float(match[3]), relative)
