"""Sealed JSON: a file that knows its own hash, so that one changed byte shows.

Its last entry is the sha256 of all text before that entry. `keep` adds the hashes of files beside it, so that `kept`
tells whether they all are as they were written.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from .files import write_text

KEY = "sha256_of_this"
FILES = "files"  # {name: sha256} of the files beside it


def write(data: dict, file: str | Path) -> None:
    """Write plain values as JSON with their seal, whole or not at all."""
    body = json.dumps(data, indent=1).removesuffix("\n}")
    write_text(f'{body},\n "{KEY}": "{seal(body)}"\n}}\n', file)


def read(file: str | Path) -> tuple[dict, bool]:
    """(what the file holds, whether it is as it was written). Raises ValueError if it is not a JSON object."""
    text = Path(file).read_bytes()
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    body = text.rpartition(f',\n "{KEY}": "'.encode())[0]
    whole = text == body + f',\n "{KEY}": "{seal(body)}"\n}}\n'.encode()
    data.pop(KEY, None)
    return data, whole


def seal(body: str | bytes) -> str:
    """The hash of the text before the seal."""
    return hashlib.sha256(body.encode() if isinstance(body, str) else body).hexdigest()


def keep(data: dict, file: str | Path, names: Iterable[str] = ()) -> None:
    """Write plain values with their seal and the hashes of the files of these names, in the same folder."""
    write(data | {FILES: {name: digest(Path(file).with_name(name)) for name in names}}, file)


def kept(file: str | Path) -> dict:
    """What `keep` wrote; empty where the file is not there, or it or a file that it names was changed or damaged."""
    try:
        data, whole = read(file)
        same = whole and all(digest(Path(file).with_name(name)) == value for name, value in data.pop(FILES).items())
    except (OSError, ValueError, LookupError, AttributeError):
        return {}
    return data if same else {}


def digest(file: str | Path) -> str:
    """The sha256 (hex) of a file."""
    found = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(2**20):
            found.update(part)
    return found.hexdigest()
