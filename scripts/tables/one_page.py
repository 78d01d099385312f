"""One page: the command line that the programs share which write a page of results from the rows beside it."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text


def main(argv: Sequence[str] | None, doc: str, script: str, page: Path, text: Callable[[Path], str],
         draw: Callable[[Path], None] | None = None) -> int:
    """Exit code: 1 where --check finds the page stale.

    doc: the program's docstring; script: its file. page: where the page is by default. text: the page, from the folder
    of the rows. draw: writes the pictures into that folder, where the page has changed.
    """
    p = Parser(prog=f"python scripts/tables/{Path(script).name}", description=doc, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=page.parent, help="folder of the rows, the page and its pictures")
    p.add_argument("--check", action="store_true", help=f"write nothing, exit 1 if {page.name} would change")
    args = p.parse_args(argv)

    def work() -> int:
        file, new = args.out / page.name, text(args.out)
        stale = not file.is_file() or file.read_text(encoding="utf-8") != new
        if stale and not args.check:
            write_text(new, file)
            if draw:
                draw(args.out)
        print(f"{'stale' if args.check else 'written'}: {file}" if stale else "up to date")
        return int(stale and args.check)
    return exit_code(work)
