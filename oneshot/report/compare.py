"""`oneshot compare A B ...`: any finished runs in one table and one HTML page.

Each of A, B, ... is a run's record (a .json file), a folder of records (what --results named, for one run or a sweep),
or a checkpoint that --save wrote (a folder with oneshot.json). A run that is found twice counts once. Exit code: 0, or
2 when something given is not a finished run of this version; one line on stderr then says which and why.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint import MANIFEST, WORK
from ..runtime import environment, sealed
from ..runtime.command import Parser, exit_code
from . import said, tables, task_table
from .page import write_html
from .record import checked, read


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return exit_code(lambda: compare(_parser().parse_args(argv)))


def _parser():
    p = Parser(prog="oneshot compare", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, help="records, folders of records, checkpoints")
    p.add_argument("--page", type=Path, default=Path("compare.html"), help="the HTML page (default: compare.html)")
    p.add_argument("--format", choices=("terminal", "markdown", "csv"), default="terminal", help="of the table")
    p.add_argument("--title", help="of the page")
    return p


def compare(args: argparse.Namespace) -> None:
    """Write the page and print the tables. Raises ValueError or OSError naming what cannot be read or written."""
    records = gather(args.runs)
    if args.page.is_dir():
        raise ValueError(f"--page {args.page}: is a folder; give a file such as compare.html")
    environment.check_writable(args.page.parent, "--page")
    write_html(records, args.page, args.title)
    print(tables.table(records, args.format), end="")
    for more in (task_table, said) if args.format != "csv" else ():
        if text := more.table(records, args.format):
            print("\n" + text, end="")
    print(f"report: {args.page}", file=sys.stderr)


def gather(paths: Iterable[Path]) -> list[dict]:
    """The records that the paths hold, each run once, in the order given. Raises ValueError naming the path."""
    found = {}
    for path in paths:
        for record in records_at(path):
            found.setdefault(record["run_id"], record)
    return list(found.values())


def records_at(path: Path) -> list[dict]:
    """The records of one path, at least one. Raises ValueError naming it."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give a run's record, a folder of them, or a checkpoint")
    if path.is_file():
        return [of_manifest(path) if path.name == MANIFEST else read(path)]
    if (path / MANIFEST).is_file():
        return [of_manifest(path / MANIFEST)]
    if (path / WORK).is_dir():
        raise ValueError(f"{path}: a run was interrupted here and is not finished; its command continues it")
    if (path / "config.json").is_file():
        raise ValueError(f"{path}: a model that oneshot did not write, it has no {MANIFEST}; compare runs")
    files = sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"{path}: holds no run record (*.json); give the folder that --results named")
    return [read(file) for file in files]


def of_manifest(file: Path) -> dict:
    """The record inside a checkpoint's manifest."""
    try:
        data, whole = sealed.read(file)
        record = data["record"]
    except (ValueError, KeyError):
        raise ValueError(f"{file}: damaged, or not written by oneshot; prune again") from None
    if not whole and data.get("schema", 1) != 1:  # schema 1 had no seal
        raise ValueError(f"{file}: was changed after it was written; repeat the command that wrote it")
    return checked(record, file)
