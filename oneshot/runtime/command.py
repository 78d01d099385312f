"""Commands: every `main(argv)` of the program and its scripts runs through `exit_code`.

    0    success
    1    finished, but what was checked failed the check (`oneshot verify`, a sweep with failed runs)
    2    an error that the user can fix: one line on stderr names the flag or file, what is wrong and what to do
    130  interrupted
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, NoReturn

from .files import unwritable
from .inputs import check_string, one_line

SHARED = ("prune", "shrink", "heal", "plan")  # commands that torchrun may start


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors like the rest of the program: by a ValueError of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message; for an unknown flag, suggest the closest one."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            close = difflib.get_close_matches(unknown[1].partition("=")[0], self._option_string_actions, 1)
            message = f"{unknown[1]}: no such flag" + (f", did you mean {close[0]}?" if close else "")
        raise ValueError(f"{message.removeprefix('argument ')} (--help lists the flags)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse does; raises ValueError naming a flag whose value cannot be written as text."""
        found = super().parse_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str | PathLike):
                    self.check(action, str(text))
        return found

    @property
    def options(self) -> list[str]:
        """All flags, in all spellings."""
        return [option for action in self._actions for option in action.option_strings]

    def given(self, args: Sequence[str]) -> dict[str, Any]:
        """{flag: value} of those on the command line alone, without defaults. Raises ValueError as `parse_args`."""
        unset = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        found = vars(self.parse_args(args, argparse.Namespace(**dict.fromkeys(names, unset))))
        return {name: value for name, value in found.items() if value is not unset}

    def check(self, action: argparse.Action, text: str) -> None:
        """Raise ValueError naming the flag for a value that `check_string` refuses."""
        try:
            check_string(text)
        except ValueError as error:
            name = next(iter(action.option_strings), action.metavar or action.dest)
            raise ValueError(f"{name} {ascii(text)[1:-1]:.100}: {error}") from None


def exit_code(work: Callable[[], int | None], *, interrupted: Callable[[], str] = lambda: "",
              memory: str = "use a smaller model or batch") -> int:
    """Run `work` and return the command's exit code: what `work` returns (None: 0), or 2 or 130 with a line on stderr.

    interrupted: returns what to add to the line "interrupted". memory: the advice printed when a GPU is out of memory.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        fail("interrupted" + (f"; {more}" if (more := interrupted()) else ""))
        return 130
    except Exception as error:
        if isinstance(error, ValueError | OSError) or unwritable(error):
            return fail(one_line(error))
        if not out_of_memory(error):
            raise
        return fail(f"out of memory ({one_line(error)}); {memory}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is short, a GPU's or the machine's."""
    name = type(error).__name__  # torch.OutOfMemoryError, recognised by name so that this module needs no torch
    return isinstance(error, MemoryError) or name == "OutOfMemoryError" or \
        (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def fail(text: str) -> int:
    """Print an error as one line on stderr and return exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    return 2
