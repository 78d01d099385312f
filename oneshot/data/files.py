"""Local files of text: .txt .jsonl .json .parquet .csv, as they are or packed as .gz or .zst.

Only regular files are read, and only as UTF-8. A .json file is one list, or one value a line as in C4's shards.

Every kind is read from its beginning, in parts, as far as documents are asked for (`stream`). `datasets` could stream
files too; these readers are for what it does not take or say: lists of strings, values that are no objects, nulls,
which line or record cannot be used.
"""

import contextlib
import csv
import gzip
import io
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..runtime.inputs import check_file, parse_json, reason
from . import columns
from .columns import listed
from .json_list import elements
from .text import Stream, Text, TextOptions, Unusable
from .zst import open_zst

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
PACKED = (".gz", ".zst")
STRING_TYPES = ("string", "large_string", "string_view")  # the names used by pyarrow and datasets
BLOCK = 2**16  # characters, or bytes of a .parquet, read at once
ROWS = 64  # of a .parquet, read at once


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
    text = stream(path, options)
    found = ["".join(text.documents)] if text.parted else list(text.documents)
    return Text(found, f"{text.source} ({len(found)} {'conversations' if text.chat else 'documents'})", chat=text.chat)


def stream(path: Path, options: TextOptions) -> Stream:
    """The documents of a file, by its suffix, as they are read. Raises Unusable."""
    suffix = kind(path)
    if suffix not in SUFFIXES:
        raise Unusable(f"not a kind of file that can be read; use {listed(SUFFIXES)}, also as .gz or .zst")
    if suffix == ".txt":
        found = rows(path) if options.per_line else blocks(path)
        return Stream(found, path.name, parted=not options.per_line)
    if suffix == ".parquet":
        records, wanted = parquet(path, options.column)
    else:
        records, wanted = {".csv": table, ".json": values, ".jsonl": lines}[suffix](path), options.column
    documents, chat = columns.pick(records, wanted)
    return Stream(documents, path.name, chat=chat)


def blocks(path: Path) -> Iterator[str]:
    """The text of a .txt in parts, with the same line endings on every machine."""
    with decoded(path) as file:
        held = ""  # a \r whose \n may begin the next part
        while block := file.read(BLOCK):
            block = held + block
            held = "\r" if block.endswith("\r") else ""
            yield block.removesuffix(held).replace("\r\n", "\n")
        yield held


def rows(path: Path) -> Iterator[str]:
    """The lines of a .txt; what stands behind the last line end is one, too."""
    with decoded(path) as file:
        line = "\n"
        for line in file:
            yield line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line
        if line.endswith("\n"):
            yield ""


def table(path: Path) -> Iterator[dict]:
    """The records of a .csv, one at a time."""
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    with decoded(path, newline="") as file:
        try:
            for number, record in enumerate(csv.DictReader(line.replace("\r\n", "\n") for line in file), 1):
                if None in record:
                    raise Unusable(f"record {number} has more fields than there are columns; quote the text")
                yield record
        except csv.Error as error:
            raise Unusable(f"no .csv that can be read ({reason(error)}); correct it") from error


def values(path: Path) -> Iterator[Any]:
    """The records of a .json, one at a time: those of a list; or values, one a line."""
    with decoded(path) as file:
        number, head = 1, file.readline(BLOCK)
        while head and not head.strip():
            number, head = number + head.endswith("\n"), file.readline(BLOCK)
        if head.lstrip().startswith("["):
            yield from elements(head.lstrip()[1:], file)
            return
        first = head if head.endswith("\n") else head + file.readline()
        found = (value(line, at) for at, line in enumerate(itertools.chain([first], file), number) if line.strip())
        for count, record in enumerate(found, 1):
            if count == 1 and (second := next(found, columns)) is columns:  # columns: no record
                raise Unusable(f"holds one {type(record).__name__}; it must be a list of strings or of objects, or "
                               "named .jsonl")
            yield record
            if count == 1:
                yield second


def lines(path: Path) -> Iterator[Any]:
    """The records of a .jsonl, one at a time."""
    with decoded(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield value(line, number)


def value(line: str, number: int) -> Any:
    """The JSON value on a line."""
    try:
        return parse_json(line)
    except ValueError as error:
        raise Unusable(f"line {number}: {error}; correct it") from error


@contextlib.contextmanager
def decoded(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    r"""A file's text, unpacked, while it is read. newline: "\n", or "" where lines end at \r as well."""
    with opened(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


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


@contextlib.contextmanager
def seekable(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked on disk where it is packed, to be read in any order."""
    with opened(path) as file:
        if path.suffix.lower() not in PACKED:
            yield file
            return
        with tempfile.TemporaryFile() as plain:
            shutil.copyfileobj(file, plain)
            plain.seek(0)
            yield plain


def parquet(path: Path, wanted: str | None) -> tuple[Iterator[dict], str]:
    """(the records of a .parquet, one at a time, with only their column of text or conversations; its name)."""
    try:
        from pyarrow import parquet as reader
    except ImportError as error:
        raise Unusable("parquet needs pyarrow: pip install pyarrow") from error
    with seekable(path) as file:
        column = columns.choose({field.name: holds(field.type) for field in reader.read_schema(file)}, wanted)

    def records() -> Iterator[dict]:
        with seekable(path) as file:
            # By default a whole row group is in memory at once, and a file may be a single one.
            source = reader.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK)
            for batch in source.iter_batches(ROWS, columns=[column], use_threads=False):
                yield from batch.to_pylist()
    return records(), column


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
