"""Columns: which column of a data set holds the text, and its texts or conversations.

A conversation is a list of messages with `role` and `content`; a column of them becomes text by the tokenizer's chat
template (encode.py). Without `--column` it is the column `text`, else conversations in `messages`, else the only column
that holds text. What a column holds is seen from the first record in which it is neither null nor an empty list.
Instructions spread over several columns are refused: how they are put together is for the user to say.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from ..runtime.inputs import SURROGATE
from .text import Conversation, Document, Unusable

TEXT, CHAT, TURNS, OTHER = "text", "chat", "from/value", ""  # what a column holds
UNKNOWN, LOOK = "unknown", 1000  # records, at most, to find that out
INSTRUCTIONS = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"),
                ("prompt", "response"), ("query", "response"), ("question", "answer"), ("input", "output"),
                ("chosen", "rejected"))  # Alpaca, Dolly, TRL and others


def pick(records: Iterable[Any], wanted: str | None) -> tuple[Iterator[Document], bool]:
    """(documents, whether they are conversations) of records: strings themselves, of objects the chosen column.

    Nulls are left out. The first record is read at once, the others as their documents are asked for. Raises Unusable
    naming the record that does not fit.
    """
    numbered = ((number, record) for number, record in enumerate(records, 1) if record is not None)
    begun, kinds = looked_at(numbered, wanted)
    column = None if kinds is None else choose(kinds, wanted)
    chat = column is not None and kinds[column] == CHAT
    return picked(itertools.chain(begun, numbered), column, CHAT if chat else TEXT), chat


def picked(numbered: Iterable[tuple[int, Any]], column: str | None, kind: str) -> Iterator[Document]:
    """The documents of (number, record): the records themselves, or what they have in a column."""
    for number, record in numbered:
        if column is not None:
            if not isinstance(record, dict) or column not in record:
                raise Unusable(f"record {number} has no column {column!r}; correct it or change --column")
            record = record[column]
        if record is not None:
            yield checked(record, number, kind)


def looked_at(numbered: Iterator[tuple[int, Any]],
              wanted: str | None) -> tuple[list[tuple[int, Any]], dict[str, str] | None]:
    """(the records that it took to see what each column of the first one holds, that: {name: kind}, None if there are
    no columns).

    A null or an empty list says nothing; after LOOK records, a column of these alone holds nothing of use.
    """
    begun, kinds = [], None
    for number, record in numbered:
        begun.append((number, record))
        if kinds is None:
            if not isinstance(record, dict):
                return begun, None
            kinds = dict.fromkeys(record, UNKNOWN)
        for name, value in record.items() if isinstance(record, dict) else ():
            if kinds.get(name) == UNKNOWN and value not in (None, []):
                kinds[name] = kind_of(value)
        if decided(kinds, wanted) or len(begun) == LOOK:
            break
    return begun, kinds and {name: OTHER if kind == UNKNOWN else kind for name, kind in kinds.items()}


def kind_among(values: Iterable[Any]) -> str:
    """What a column holds, by the first of its values that says something, of at most LOOK."""
    return kind_of(next((value for value in itertools.islice(values, LOOK) if value not in (None, [])), None))


def decided(kinds: dict[str, str], wanted: str | None) -> bool:
    """Whether it is known what all columns hold, as far as that has a part in `choose`."""
    if wanted is not None or "text" in kinds:
        return kinds.get("text" if wanted is None else wanted) != UNKNOWN
    return kinds.get("messages") == CHAT or UNKNOWN not in kinds.values()


def checked(value: Any, number: int, kind: str) -> Document:
    """A record's text or conversation. Raises Unusable naming the record."""
    if kind == CHAT:
        if kind_of(value) != CHAT:
            raise Unusable(f"record {number} is not a conversation (a list of messages with role and content); correct "
                           "it or change --column")
        return messages(value, number)
    if not isinstance(value, str):
        raise Unusable(f"record {number} is of type {type(value).__name__}, not text; correct it or change --column")
    if not value.isascii() and SURROGATE.search(value):
        raise Unusable(f"record {number} holds half of a surrogate pair (a cut emoji); correct it")
    return value


def messages(value: list[dict], number: int) -> Conversation:
    """A conversation with plain content, and without the entries that a table has filled up with nulls.

    Content in parts is joined. Raises Unusable for a part that is not text.
    """
    found = []
    for message in value:
        message = {key: entry for key, entry in message.items() if entry is not None or key == "content"}
        content = message["content"]
        if isinstance(content, list):
            if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
                raise Unusable(f"record {number}: a message holds more than text; leave the record out")
            message["content"] = content = "".join(part["text"] for part in content)
        if not isinstance(content, str | None):
            raise Unusable(f"record {number}: a message's content is of type {type(content).__name__}, not text; "
                           "correct it")
        if SURROGATE.search(content or ""):
            raise Unusable(f"record {number} holds half of a surrogate pair (a cut emoji); correct it")
        found.append(message)
    return found


def kind_of(value: Any) -> str:
    """What a record's entry holds: TEXT, CHAT, TURNS (a conversation in ShareGPT's words) or OTHER."""
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        return OTHER
    if all(isinstance(part.get("role"), str) and "content" in part for part in value):
        return CHAT
    return TURNS if all("from" in part and "value" in part for part in value) else OTHER


def has_text(document: Document) -> bool:
    """Whether a document is more than white space."""
    parts = [document] if isinstance(document, str | None) else [message["content"] for message in document]
    return any(part and part.strip() for part in parts)


def choose(columns: dict[str, str], wanted: str | None) -> str:
    """The name of the column to use. columns: {name: what it holds, as `kind_of` says}. Raises Unusable."""
    if wanted is not None and wanted not in columns:
        raise Unusable(f"no column {wanted!r}; --column must be one of {listed(columns)}")
    turns = next((name for name, kind in columns.items() if kind == TURNS), None)
    if turns and wanted in (None, turns) and "text" not in columns and columns.get("messages") != CHAT:
        raise Unusable(f"its column {turns} holds conversations as from and value; write them as role (user, "
                       "assistant) and content, so that the tokenizer's chat template takes them")
    if wanted is not None:
        return wanted
    if "text" in columns:
        return "text"
    if columns.get("messages") == CHAT:
        return "messages"
    with_text = [name for name, kind in columns.items() if kind == TEXT]
    if len(with_text) == 1:
        return with_text[0]
    if pair := next((pair for pair in INSTRUCTIONS if set(pair) <= set(columns)), None):
        raise Unusable(f"its columns {listed(columns)} are instructions and answers: write each row as a column "
                       f'messages, [{{"role": "user", "content": {pair[0]}}}, {{"role": "assistant", "content": '
                       f"{pair[1]}}}], so that the tokenizer's chat template joins them, or name one by --column")
    raise Unusable(f"which column is the text? Name it with --column: one of {listed(columns)}")


def listed(names: Iterable[str]) -> str:
    """Names joined by commas."""
    return ", ".join(names) or "(none)"
