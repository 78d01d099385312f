"""Commands: every `main(argv)` of the program and its scripts runs through `exit_code`.

    0    done
    1    done, and what was checked is not as it should be (`verify`, a sweep with failed runs)
    2    the user can mend it: one line on stderr says what is wrong, which flag or file, what to do
    130  interrupted
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the program does. Raises ValueError."""

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            close = difflib.get_close_matches(unknown[1].partition("=")[0], self._option_string_actions, 1)
            message = f"{unknown[1]}: no such flag" + (f", did you mean {close[0]}?" if close else "")
        raise ValueError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def exit_code(work: Callable[[], int | None], *, interrupted: Callable[[], str] = lambda: "",
              memory: str = "use a smaller model or batch") -> int:
    """The exit code of a command that does `work`: what that returns (None is 0), 2 or 130 with one line on stderr.

    interrupted: gives what the user should know then, behind "interrupted". memory: what helps where a GPU's is short.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        fail("interrupted" + (f"; {more}" if (more := interrupted()) else ""))
        return 130
    except (ValueError, OSError) as error:
        return fail(one_line(error))
    except RuntimeError as error:  # torch.OutOfMemoryError, named so that this module needs no torch
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return fail(f"out of memory ({one_line(error)}); {memory}")


def fail(text: str) -> int:
    """Print an error's one line; exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    return 2


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks, its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
