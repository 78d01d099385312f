"""Rounds: aim, plan, run, judge the floors, keep or take back; until the targets are met or a floor stands in the way.

    way     the best plan for all targets at once, made in the first round: later ones take nothing that it leaves, as
            long as they reach their aims so (what was foretold may not be what is measured)
    aim     from where the model is, --step of the whole way from the dense model to each target
    broken  a floor that does not hold: the round is taken back and tried again, half as far and without the part that
            it was foretold to lose most by; TRIES times, then the rounds end
"""

import sys
import time
from dataclasses import dataclass, field

from torch import nn

from ...heal.options import count
from ...models import Tokenizer
from ...runtime import environment
from ...runtime.inputs import one_line
from .. import device_table
from ..command import Command
from . import steps, targets
from .candidates import Looks
from .ledger import Ledger, Round
from .plans import Candidates, Costs, Plan, alternatives, best, changed, towards, uncut, way_of
from .steps import State, Steps

TRIES = 2  # how often a broken round is tried another way
FINAL = "final"  # the folder of the long heal
BUSY = 0.5  # cores that others may take while a round is timed
NEAR = 1e-6  # a share that is that near its target has met it


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Asked:
    """What the command asks for, see targets.py. table: of another device, or None: it is measured here.

    final: tokens of the long heal at the end, or None.
    """

    targets: dict[str, float]
    floors: list[targets.Floor]
    step: float
    allow: frozenset[str]
    budget: float
    table: dict | None = None
    final: str | None = None


@dataclass
class Fit:
    """The rounds of one command.

    dense: the dense model's record. state, shares: of the best model so far. spent: seconds before the first round.
    stopped: why the rounds ended, or None. way: `plans.way_of` the best plan for the whole way, known from round 1 on.
    """

    asked: Asked
    steps: Steps
    ledger: Ledger
    dense: dict
    state: State
    spent: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    way: dict | None = None
    _looks: Looks | None = None
    _found: tuple[str, Candidates] | None = None
    _table: dict | None = None

    def run(self) -> None:
        """All rounds."""
        self.shares = dict.fromkeys(self.asked.targets, 1.0) | {"parameters": 1.0, "bytes": 1.0}
        step, tries, without, failed = self.asked.step, 0, frozenset(), []
        while not self.met(self.shares) and tries <= TRIES:
            known = self.ledger.before()
            if known and known.name == FINAL:  # of a command that has ended
                self.stopped = self.ledger.ending.get("stopped")
                return
            if known is None and self.out_of_time():
                self.stopped = "; ".join(filter(None, (self.stopped, "the budget of time is used up")))
                return
            now = self.one(step, without, failed)
            if now.kept:
                tries, without, failed, self.stopped = 0, frozenset(), [], None
                continue
            step, tries = self.taken(now) / 2, tries + 1
            self.stopped = "; ".join(now.broken or filter(None, (self.stopped, now.failed)))
            if now.plan:
                failed.append(Plan.of(now.plan))
                without |= {now.candidates["most"]}

    def load(self, name: str) -> tuple[nn.Module, Tokenizer]:
        """(model, tokenizer) of the dense model or of a round."""
        return steps.load(self.steps.dense, name)

    def met(self, shares: dict[str, float]) -> bool:
        """Whether all targets are reached."""
        return all(shares[kind] <= share + NEAR for kind, share in self.asked.targets.items())

    def out_of_time(self) -> bool:
        """Whether another round as long as the longest, and the long heal after it, would exceed the budget.

        The long heal is taken to need as long a token as that round.
        """
        done = [r.seconds for r in self.ledger.rounds]
        heal = list(self.steps.heal)
        final = count(self.asked.final) / count(heal[heal.index("--heal-tokens") + 1]) if self.asked.final else 0.0
        return self.spent + sum(done) + max(done, default=0.0) * (1 + final) > self.asked.budget

    def one(self, step: float, without: frozenset[str], failed: list[Plan]) -> Round:
        """One round, from planning to judging; the state moves on if it is kept."""
        began, number = time.perf_counter(), len(self.ledger.rounds) + 1
        now = self.ledger.before()
        timed = now.shares.get("latency") if now else None
        if now is None:
            now = Round(f"round-{number}", self.aims(step), step)
            self.plan(now, without, failed)
            self.ledger.write(now)
        self.way, before = now.way, now.seconds
        now.broken, now.kept = [], False
        say(f"{now.name}: {now.failed or now.told}")
        if now.failed is None:
            self.make(now, timed)
        now.seconds = before or time.perf_counter() - began
        self.ledger.rounds.append(now)
        self.ledger.write()
        return now

    def aims(self, step: float) -> dict[str, float]:
        """{kind of target: the share that the next round aims at}."""
        return {kind: max(share, self.shares[kind] - step * (1 - share)) for kind, share in self.asked.targets.items()}

    def taken(self, now: Round) -> float:
        """The step of a round, less where all its aims were nearer than that."""
        return min(now.step, max((self.shares[kind] - aim) / (1 - self.asked.targets[kind])
                                 for kind, aim in now.aims.items()))

    def plan(self, now: Round, without: frozenset[str], failed: list[Plan]) -> None:
        """Choose what the round does. What was chosen, and from what, goes into it."""
        model, _ = self.load(self.state.float)
        costs = Costs(model, self.table)
        here = costs.of(self.state.plan)
        limits, ends = ({kind: aim * here[kind] / self.shares[kind] for kind, aim in own.items()}
                        for own in (now.aims, self.asked.targets))
        first = not self.ledger.rounds
        found = self.candidates(model, costs, ends if first else limits)
        if first and (whole := best(costs, found, self.state.plan, ends)):
            self.way = way_of(whole[0])
        now.notes, now.way = found.notes, self.way
        gone = self.dense["model"]["blocks"] - costs.number
        near = towards(found, self.way, gone, self.state.plan) if self.way else found
        for options, avoided in ((near, without), (found, without), (found, frozenset())):
            close = alternatives(costs, options, self.state.plan, limits, avoided)
            if close := [own for own in close if own[0] not in failed]:
                plan, now.loss = self.least(model, found, close)
                after, now.plan, now.told = costs.of(plan), plan.plain(), str(plan)
                now.foretold = {kind: after[kind] / here[kind] * self.shares[kind] for kind in now.aims}
                now.candidates = found.plain() | {"most": changed(plan, self.state.plan, found)}
                return
        now.candidates = found.plain()
        now.failed = "nothing that --allow names is small enough for the next step" if not failed else \
            "no other way to take the next step"

    def candidates(self, model: nn.Module, costs: Costs, limits: dict[str, float]) -> Candidates:
        """The candidates of the model as it is; those of the round before where it only rounded that model.

        Also where it was taken back: it looked at the same model, and further.
        """
        if self.ledger.rounds and not (before := self.ledger.rounds[-1]).kept:
            return Candidates.of(before.candidates)
        if "shrink" in self.asked.allow or not self._found or self._found[0] != self.state.float:
            self._found = self.state.float, self.looks.at(model, costs, self.state.plan, limits, self.asked.allow)
        return self._found[1]

    def least(self, model: nn.Module, found: Candidates, close: list[tuple[Plan, float]]) -> tuple[Plan, float]:
        """The plan that loses least, and what; where there are several, their cuts are measured as a whole."""
        if len(close) > 1:
            close = [(plan, self.looks.whole(model, plan) + uncut(plan, found, loss)) for plan, loss in close]
        return min(close, key=lambda own: own[1])

    def make(self, now: Round, timed: float | None) -> None:
        """Do a round that is planned, measure and judge it. timed: its share of time, measured before a kill."""
        plan = Plan.of(now.plan)
        model, _ = self.load(self.state.float)
        blocks, share = steps.dims(Costs(model).sizes, plan)
        configs = self.steps.of(now.name, self.state, plan, (blocks, share))
        try:
            record = steps.done(configs)
        except ValueError as error:
            if not str(error).startswith(("--shrink", "--drop", "--kv-groups", "--query-heads")):
                raise
            now.failed = one_line(error)  # what the family cannot be without
            return
        state = self.steps.after(self.state, plan, configs)
        self.judge(now, record, state.result, timed)
        if now.kept:
            self.state, self.shares = state, now.shares

    def judge(self, now: Round, record: dict, folder: str, timed: float | None) -> None:
        """Fill in what was measured of the model in a folder, and whether all floors hold. timed: as for `make`."""
        now.metrics = record["metrics"]
        now.shares = steps.shares(record, self.dense)
        if "latency" in self.asked.targets:
            now.shares["latency"] = now.foretold["latency"] if self.asked.table else timed or self.timed(now, folder)
        found = [own.judge(record, self.dense) for own in self.asked.floors]
        now.floors = [own.plain() for own in found]
        now.broken = [str(own) for own in found if not own.holds]
        now.kept = not now.broken
        reached = ", ".join(f"{kind} {now.shares[kind]:.2f}" for kind in self.asked.targets)
        say(f"{now.name}: {reached}; {'; '.join(now.broken) or 'all floors hold'}")

    def timed(self, now: Round, folder: str) -> float:
        """The measured share of the dense model's time; a note where other processes had the machine as well."""
        found = steps.time_share(self.steps.dense, folder)
        if (busy := environment.others()) > BUSY:
            now.notes = [*now.notes, f"{now.name}: timed while other processes took {busy:.1f} cores, so its latency "
                                     "is uncertain"]
        return found

    def final(self) -> None:
        """The long heal of the best state; kept if it keeps the floors and the targets that were met."""
        if self.asked.final is None or self.state.float == self.steps.model or not self.steps.heal:
            return
        began, before = time.perf_counter(), self.ledger.before()
        heal = list(self.steps.heal)
        heal[heal.index("--heal-tokens") + 1] = self.asked.final
        now = before or Round(FINAL, dict(self.asked.targets), 0.0, foretold=dict(self.shares))
        now.plan, now.told = self.state.plan.plain(), f"healed on {self.asked.final} tokens more"
        blocks = Costs(self.load(self.state.float)[0]).number
        configs = self.steps.healed(FINAL, self.state, self.state.plan, blocks, heal)
        record, timed = steps.done(configs), now.shares.get("latency")
        state = self.steps.after(self.state, self.state.plan, configs)
        self.judge(now, record, state.result, timed)
        now.kept = now.kept and (self.met(now.shares) or not self.met(self.shares))
        now.seconds = now.seconds or time.perf_counter() - began
        self.ledger.rounds.append(now)
        self.ledger.write()
        if now.kept:
            self.state, self.shares = state, now.shares

    @property
    def looks(self) -> Looks:
        """What candidates are measured with, made on first use."""
        if self._looks is None:
            cfg = self.steps.cutting
            dense, tokenizer = self.load(self.steps.model)
            tokens = Command([cfg]).calibration(cfg, dense, tokenizer)
            self._looks = Looks(cfg, self.steps.sparsening, dense, tokens)
        return self._looks

    @property
    def table(self) -> dict | None:
        """The device's table, where a target asks for it; measured on first use."""
        if "latency" not in self.asked.targets or self.asked.table is not None:
            return self.asked.table
        if self._table is None:
            cfg = self.steps.dense
            self._table = device_table.table(self.load(cfg.model)[0].to(cfg.device), cfg.device, progress=cfg.progress)
        return self._table
