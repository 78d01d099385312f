"""Tables of folders of records: results/real/table.md, results/damage/table.md, results/quality/table.md.

    python scripts/tables/folder_tables.py            # write them
    python scripts/tables/folder_tables.py --check    # exit 1 if one is stale

What `oneshot compare` prints of the records, and around it what that leaves out: where, at which commit and with which
seeds they were measured, on how many windows, what flatters their rows of integers, and the pictures that
figures.py drew of them.
"""

import argparse
import sys
from pathlib import Path

from tables import ROOT, read, texts, where

from oneshot import report
from oneshot.models import gguf
from oneshot.report import said, tables, task_table
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

FOLDERS = {"real": "SmolLM2 by four methods in four patterns", "damage": "SmolLM2 at equal bytes",
           "quality": "The built-in model at 2:4"}
SHOWN = "-damage-"  # in the name of a picture that is not only named: in which words the loss is


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds a table stale."""
    p = Parser(prog="python scripts/tables/folder_tables.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=ROOT / "results", help="where the folders are")
    p.add_argument("--check", action="store_true", help="write nothing, exit 1 if a table would change")
    args = p.parse_args(argv)

    def work() -> int:
        stale = []
        for folder in (args.results / name for name in FOLDERS if (args.results / name).is_dir()):
            file, text = folder / "table.md", page(folder)
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                stale.append(file)
                if not args.check:
                    write_text(text, file)
        print("\n".join(f"{'stale' if args.check else 'written'}: {file}" for file in stale) or "up to date")
        return int(bool(stale) and args.check)
    return exit_code(work)


def page(folder: Path) -> str:
    """table.md of a folder of records, which may hold pictures as well."""
    records = read(folder)
    rounded = [record["model"]["name"] for record in records if report.is_rounded(record)]
    parts = [f"# {FOLDERS.get(folder.name, folder.name)}", where(records, folder.name), texts(records),
             gguf.beside_integers(rounded),
             *(made.table(records, "markdown").rstrip() for made in (tables, task_table, said)), pictures(folder)]
    return "\n\n".join(part for part in parts if part) + "\n"


def pictures(folder: Path) -> str:
    """The pictures of a folder: those of the damage as they are, a link to each of the others; "" without any."""
    names = sorted(file.name for file in folder.glob("*.svg"))
    shown = [f"![in which words {name.removesuffix('.svg')} lost most]({name})" for name in names if SHOWN in name]
    others = [f"[{name.removesuffix('.svg')}]({name})" for name in names if SHOWN not in name]
    return "\n\n".join([*shown, *([f"More pictures: {', '.join(others)}."] if others else [])])


if __name__ == "__main__":
    sys.exit(main())
