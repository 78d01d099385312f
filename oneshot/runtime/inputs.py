"""Input that others wrote: files, JSON and strings of any content. Whatever is wrong is a ValueError of one line.

The message says what is wrong, without the flag or the file; the caller puts that in front.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: such a string cannot be written as UTF-8
ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # one in JSON, half or whole


def check_file(path: str | Path) -> None:
    """Raise ValueError unless `path` is a file that can be read to its end: no folder, pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ValueError(reason(error)) from None
    if stat.S_ISDIR(mode):
        raise ValueError("is a folder; give a file")
    if not stat.S_ISREG(mode):
        raise ValueError("is a pipe or a device; give a regular file")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark, line endings as they are. Raises ValueError."""
    check_file(path)
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({reason(error)})") from None


def parse_json(text: str) -> Any:
    """The value that a JSON text stands for. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None
    except ValueError as error:  # also an integer of too many digits
        raise ValueError(f"not JSON ({error})") from None


def parse_object(text: str) -> dict:
    """The JSON object that a text stands for, with strings that can be written as UTF-8. Raises ValueError."""
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")
    if ESCAPED.search(text) and SURROGATE.search(json.dumps(found, ensure_ascii=False)):
        raise ValueError("holds half of a surrogate pair (a cut emoji); correct it")
    return found


def check_string(text: str) -> None:
    """Raise ValueError for a string that no file name, no tokenizer and no record can take."""
    if SURROGATE.search(text):
        raise ValueError("holds half of a surrogate pair (a cut emoji, or bytes that are not UTF-8)")
    if "\0" in text:
        raise ValueError("holds a NUL character")


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; the name of its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """What an exception says, in one short line: an OSError without its number and file."""
    said = getattr(error, "strerror", None)
    return (" ".join(str(said).split()) if said else one_line(error))[:200]
