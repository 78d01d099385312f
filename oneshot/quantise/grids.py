"""Grids: the integers that a weight is rounded to, and their storage in bytes.

    b     bits per code
    s     scale, float16, shared by a group of inputs within one row

A grid is a frozen dataclass, like a pattern. It is written `int8`, `int4`, or `int<b>` for any b from 2 to 16, and is
symmetric: there is no zero point.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..prune.patterns import NM, Dense, Pattern
from ..prune.patterns import parse as parse_pattern

GROUP = 128  # inputs that share a scale
BITS = (8, 4)  # always compared with; in addition the width that takes as many bytes as the pattern


@dataclass(frozen=True)
class Integers:
    """Symmetric integers of `bits` bits, with one float16 scale per `group` inputs of a row."""

    bits: int
    group: int = GROUP

    def __str__(self) -> str:
        return f"int{self.bits}"

    def bytes(self, R: int, C: int) -> int:
        """Bytes of the codes and scales of an (R, C) weight: R·C·b/8 + 2·R·ceil(C/group)."""
        return -(-R * C * self.bits // 8) + 2 * R * -(-C // self.group)


def parse(text: str) -> Integers:
    """The grid written as `text`, such as "int8". Raises ValueError when there is no such grid."""
    match = re.fullmatch(r"int(\d+)", text)
    if not match or not 2 <= int(match[1]) <= 16:
        raise ValueError(f"{text}: no such integers; give int2 to int16")
    return Integers(int(match[1]))


def equal_bits(pattern: Pattern) -> int | None:
    """The widest codes that take, with their scales, no more bytes than the pattern at 16 bits per weight.

    None if that is below 2 bits, or for the dense pattern. 2:4 and 0.5 take 9 bits per weight: 8 for the code, as the
    scales take 1/8.
    """
    C = GROUP * (pattern.m if isinstance(pattern, NM) else 100)
    bits = next((b for b in range(16, 1, -1) if Integers(b).bytes(1, C) <= pattern.bytes(1, C, 2)), None)
    return None if isinstance(pattern, Dense) else bits


def widths(pattern_texts: Iterable[str]) -> list[str]:
    """The names of the integers to compare with these patterns, widest first."""
    equal = {equal_bits(parse_pattern(text)) for text in pattern_texts} - {None}
    return [str(Integers(b)) for b in sorted({*BITS, *equal}, reverse=True)]
