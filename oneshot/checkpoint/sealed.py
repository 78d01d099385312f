"""Sealed JSON: a file that knows its own hash, so that one changed byte shows.

Its last entry is the sha256 of all text before that entry.
"""

import hashlib
import json
from pathlib import Path

from ..runtime.files import write_text

KEY = "sha256_of_this"


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
