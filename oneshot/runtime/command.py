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
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors like the rest of the program: by a ValueError of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with argparse's message; for an unknown flag, suggest the closest one."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            close = difflib.get_close_matches(unknown[1].partition("=")[0], self._option_string_actions, 1)
            message = f"{unknown[1]}: no such flag" + (f", did you mean {close[0]}?" if close else "")
        raise ValueError(f"{message.removeprefix('argument ')} (--help lists the flags)")


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
    except (ValueError, OSError) as error:
        return fail(one_line(error))
    except RuntimeError as error:  # torch.OutOfMemoryError, recognised by name so that this module needs no torch
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(f"out of memory ({one_line(error)}); {memory}")


def fail(text: str) -> int:
    """Print an error as one line on stderr and return exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    return 2


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; the name of its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
