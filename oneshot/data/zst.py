"""The bytes of .zst files, by Python's own module where it has one, else by the package zstandard."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .text import Unusable

CHUNK = 2**17  # bytes read at once


def open_zst(path: Path) -> BinaryIO:
    """A .zst file's bytes. Raises Unusable where nothing can unpack it."""
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            raise Unusable(".zst files need zstandard: pip install zstandard") from error
        return io.BufferedReader(Frames(open(path, "rb"), lambda: zstandard.ZstdDecompressor().decompressobj()), CHUNK)
    return zstd.open(path, "rb")


class Frames(io.RawIOBase):
    """The bytes of all frames of a file, one after the other; zstandard's own reader takes a cut file for a whole one.

    new: makes an object that unpacks one frame: decompress(bytes), eof, unused_data.

    Reading raises EOFError if the file ends within a frame.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any]) -> None:
        self.file, self.new = file, new
        self.frame, self.packed, self.plain = None, b"", memoryview(b"")

    def readable(self) -> bool:
        """Yes, as io asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next bytes; how many there were, 0 at the end of the file."""
        while not self.plain:
            if not (packed := self.packed or self.file.read(CHUNK)):
                if self.frame is not None:
                    raise EOFError("it ends too early")
                return 0
            self.frame = self.frame or self.new()
            self.plain = memoryview(self.frame.decompress(packed))
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        n = min(len(buffer), len(self.plain))
        buffer[:n], self.plain = self.plain[:n], self.plain[n:]
        return n

    def close(self) -> None:
        """Close the file below as well."""
        self.file.close()
        super().close()
