"""A JSON list, one element at a time, without having the whole of it in memory."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from .text import Unusable

BLOCK = 2**16  # characters read at once, at least
SPACE = re.compile(r"[ \t\r\n]*")
NEAR = 16  # so far from the end of what has been read, an error may come from the cut: a number, a word, an escape


def elements(head: str, file: TextIO) -> Iterator[Any]:
    """The elements of a list in the order of the file. head: what has been read behind its bracket.

    Raises Unusable naming the record.
    """
    text, at, number, closed = head, 0, 1, False
    while not closed:
        try:
            at = SPACE.match(text, at).end()
            if number == 1 and text[at] == "]":
                at, closed = at + 1, True
                continue
            value, end = json.JSONDecoder().raw_decode(text, at)
            end = SPACE.match(text, end).end()
            if text[end] not in ",]":
                raise Unusable(f"record {number}: not JSON (a comma or ] must follow it); correct it")
        except RecursionError:
            raise Unusable(f"record {number}: not JSON that can be read (nested too deeply); correct it") from None
        except Unusable:
            raise
        except (ValueError, IndexError) as error:
            more = file.read(max(BLOCK, len(text) - at)) if may_be_cut(error, text) else ""
            if not more:
                early = isinstance(error, IndexError) or getattr(error, "pos", 0) >= len(text)
                why = "it ends too early" if early else getattr(error, "msg", error)
                raise Unusable(f"record {number}: not JSON ({why}); correct it, or name it .jsonl if each line is a "
                               "value") from error
            text, at = text[at:] + more, 0
            continue
        yield value
        at, number, closed = end + 1, number + 1, text[end] == "]"
    if (text[at:] + file.read(BLOCK)).strip():
        raise Unusable("not JSON (more follows the list); correct it, or name it .jsonl if each line is a value")


def may_be_cut(error: Exception, text: str) -> bool:
    """Whether an error may be gone with more of the text."""
    return not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated string") or (
        error.pos > len(text) - NEAR)
