"""Local files of text: .txt .jsonl .json .parquet .csv, as they are or packed as .gz or .zst.

Only regular files are read, and only as UTF-8. A .json file is one list, or one value a line as in C4's shards.
"""

import contextlib
import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime.inputs import check_file, parse_json, reason
from . import columns
from .columns import listed
from .text import Document, Text, TextOptions, Unusable
from .zst import open_zst

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
PACKED = (".gz", ".zst")
STRING_TYPES = ("string", "large_string", "string_view")  # the names used by pyarrow and datasets


def kind(path: Path) -> str:
    """Which of SUFFIXES a file is by its name, whether packed or not; its own last suffix if none."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return name.suffix.lower()


def is_known(path: Path) -> bool:
    """Whether a file can be read, by its name."""
    return kind(path) in SUFFIXES


def stem(path: Path) -> str:
    """A file's name without its suffixes: "c4" of c4.json.gz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).stem


def read(path: Path, options: TextOptions) -> Text:
    """The documents of a file. Raises Unusable."""
    found, chat = documents(path, options)
    return Text(found, f"{path.name} ({len(found)} {'conversations' if chat else 'documents'})", chat=chat)


def documents(path: Path, options: TextOptions) -> tuple[list[Document], bool]:
    """(the documents in a file, by its suffix; whether they are conversations)."""
    suffix = kind(path)
    if suffix not in SUFFIXES:
        raise Unusable(f"not a kind of file that can be read; use {listed(SUFFIXES)}, also as .gz or .zst")
    if suffix == ".parquet":
        return parquet(path, options.column)
    if suffix == ".jsonl":
        return columns.pick(lines(path), options.column)
    content = decode(path)
    if suffix == ".txt":
        return content.split("\n") if options.per_line else [content], False
    return columns.pick(table(content) if suffix == ".csv" else values(content), options.column)


def table(content: str) -> list[dict]:
    """The records of a .csv."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    try:
        records = list(csv.DictReader(io.StringIO(content, newline="")))
    except csv.Error as error:
        raise Unusable(f"no .csv that can be read ({reason(error)}); correct it") from error
    if long := [number for number, record in enumerate(records, 1) if None in record]:
        raise Unusable(f"record {long[0]} has more fields than there are columns; quote the text")
    return records


def values(content: str) -> list:
    """The records of a .json: a list; or values, one a line."""
    try:
        records = parse_json(content)
    except ValueError as error:
        filled = [line for line in content.split("\n") if line.strip()]
        if "Extra data: line" not in str(error) or "Extra data: line 1 " in str(error) or len(filled) < 2:
            raise Unusable(f"{error}; correct it, or name it .jsonl if each line is a value") from error
        return [value(line, number) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not isinstance(records, list):
        raise Unusable(f"holds one {type(records).__name__}; it must be a list of strings or of objects")
    return records


def lines(path: Path) -> Iterator[Any]:
    """The records of a .jsonl, one at a time."""
    with opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
        for number, line in enumerate(text, 1):
            if line.strip():
                yield value(line, number)


def value(line: str, number: int) -> Any:
    """The JSON value on a line."""
    try:
        return parse_json(line)
    except ValueError as error:
        raise Unusable(f"line {number}: {error}; correct it") from error


def decode(path: Path) -> str:
    """A file's text, with the same line endings on every machine."""
    with opened(path) as file:
        return file.read().decode("utf-8-sig").replace("\r\n", "\n")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked, while they are read; whatever goes wrong meanwhile is an Unusable."""
    try:
        check_file(path)
        with {".gz": gzip.open, ".zst": open_zst}.get(path.suffix.lower(), open_plain)(path) as file:
            yield file
    except Unusable:
        raise
    except Exception as error:  # of gzip, zlib, zstandard, pyarrow or the decoder
        raise Unusable(f"cannot read {path.name} ({reason(error)}); check the path, use UTF-8") from error


def open_plain(path: Path) -> BinaryIO:
    """The bytes of a file as it is."""
    return open(path, "rb")


def parquet(path: Path, wanted: str | None) -> tuple[list[Document], bool]:
    """(the documents of a .parquet, whether they are conversations)."""
    try:
        from pyarrow import parquet as reader
    except ImportError as error:
        raise Unusable("parquet needs pyarrow: pip install pyarrow") from error
    with opened(path) as file:
        if path.suffix.lower() in PACKED:
            file = io.BytesIO(file.read())
        schema = reader.read_schema(file)
        column = columns.choose({field.name: holds(field.type) for field in schema}, wanted)
        file.seek(0)
        found = reader.read_table(file, columns=[column]).column(column).to_pylist()
        as_chat = holds(schema.field(column).type) == columns.CHAT
        return columns.pick(({column: entry} for entry in found) if as_chat else found, column if as_chat else None)


def holds(kind: Any) -> str:
    """What a column of an Arrow type holds, in the words of columns.py."""
    import pyarrow as pa

    if str(kind) in STRING_TYPES or (pa.types.is_dictionary(kind) and str(kind.value_type) in STRING_TYPES):
        return columns.TEXT
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        names = {field.name for field in kind.value_type}
        return columns.CHAT if {"role", "content"} <= names else \
            columns.TURNS if {"from", "value"} <= names else columns.OTHER
    return columns.OTHER
