"""Ledger: the rounds of a command in fit.json, written before a round begins and after it has ended.

What a round is going to do is written first, so that a killed command does the same again; what was timed is written
after it, as it could not be measured the same twice.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...runtime.files import write_text

SCHEMA = 3  # 2: plans leave the output head alone; 1, without a number: they round whole models


@dataclass
class Round:
    """One round.

    name: of its folder. aims: {kind of target: the share that it aims at}. step: the share of the way that it takes.
    way: `plans.way_of` the best plan for the whole way, None if there is none. plan: `Plan.plain`, None if there was
    none; told: the same in words. loss: foretold, nats. foretold, shares: {kind of target: share of the dense model's},
    by the table and measured. candidates: `Candidates.plain`. metrics: of the record. floors: rows of `Judged.plain`.
    failed: why it could not be done, or None. kept: whether all floors hold. broken: those that do not, in words.
    seconds: what it took, planning included.
    """

    name: str
    aims: dict[str, float]
    step: float
    way: dict | None = None
    plan: dict | None = None
    told: str = ""
    loss: float | None = None
    foretold: dict[str, float] = field(default_factory=dict)
    candidates: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, float | None] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    floors: list[dict] = field(default_factory=list)
    failed: str | None = None
    kept: bool = False
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0


class OldError(Exception):
    """The file is of another version."""


class Ledger:
    """The file of a command. asked: what identifies the command, plain values."""

    def __init__(self, folder: Path, asked: list) -> None:
        self.folder, self.asked, self.rounds, self.ending = folder, asked, [], {}
        self.known = self.read()

    @property
    def file(self) -> Path:
        """Where it is."""
        return self.folder / "fit.json"

    def read(self) -> list[Round]:
        """The rounds that a killed command has begun. Raises ValueError naming `--save` for another command's."""
        if not self.file.is_file():
            return []
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            if data.get("schema") != SCHEMA:
                raise OldError
            asked, rounds = data["asked"], [Round(**row) for row in data["rounds"]]
            self.ending = dict(data["ending"])
        except OldError:
            raise ValueError(f"--save {self.folder}: its fit.json is of another version of oneshot, whose plans this "
                             "one cannot continue; choose another folder") from None
        except (AttributeError, ValueError, LookupError, TypeError):
            raise ValueError(f"--save {self.folder}: its fit.json is damaged; remove it: rounds that are finished are "
                             "planned and timed again, and made again only where their plan differs") from None
        if asked != json.loads(json.dumps(self.asked)):
            raise ValueError(f"--save {self.folder}: holds the rounds of another command; choose another folder")
        return rounds

    def before(self) -> Round | None:
        """What a killed command knew of the next round, or None."""
        return self.known[len(self.rounds)] if len(self.rounds) < len(self.known) else None

    def write(self, now: Round | None = None) -> None:
        """Write the file, with a round that is not finished behind the others."""
        rounds = self.rounds + ([now] if now else [])
        later = self.known[len(rounds):]  # a command that is killed again does not forget them
        data = {"schema": SCHEMA, "asked": self.asked, "rounds": [asdict(r) for r in [*rounds, *later]],
                "ending": self.ending}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(data, indent=1) + "\n", self.file)
