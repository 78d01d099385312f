"""Grids: which integers a weight is rounded to, and what that takes in bytes.

    b     bits of a code
    s     the scale that a group of inputs of one row shares, float16

A frozen value, as the patterns are: `int8`, `int4`, any `int<b>` of 2 to 16 bits. Symmetric: no offset.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..prune.patterns import NM, Dense, Pattern
from ..prune.patterns import parse as parse_pattern

GROUP = 128  # inputs that share a scale
BITS = (8, 4)  # always shown; beside them the width of equal bytes


@dataclass(frozen=True)
class Integers:
    """Symmetric integers of `bits` bits, a float16 scale for each `group` inputs of a row."""

    bits: int
    group: int = GROUP

    def __str__(self):
        return f"int{self.bits}"

    def bytes(self, R: int, C: int) -> int:
        """Codes and scales of an (R, C) weight: R·C·b/8 + 2·R·ceil(C/group)."""
        return -(-R * C * self.bits // 8) + 2 * R * -(-C // self.group)


def parse(text: str) -> Integers:
    """The grid that `text` names. Raises ValueError when there is none."""
    match = re.fullmatch(r"int(\d+)", text)
    if not match or not 2 <= int(match[1]) <= 16:
        raise ValueError(f"{text}: no such integers; give int2 to int16")
    return Integers(int(match[1]))


def equal_bits(pattern: Pattern) -> int | None:
    """The widest codes that, with their scales, take no more bytes than the pattern at 16 bits a weight; None below 2.

    2:4 and 0.5 come to 9 bits a weight, so 8 with 1/8 for the scales.
    """
    C = GROUP * (pattern.m if isinstance(pattern, NM) else 100)
    bits = next((b for b in range(16, 1, -1) if Integers(b).bytes(1, C) <= pattern.bytes(1, C, 2)), None)
    return None if isinstance(pattern, Dense) else bits


def widths(pattern_texts: Iterable[str]) -> list[str]:
    """The int<b> rows to show beside these patterns, widest first."""
    equal = {equal_bits(parse_pattern(text)) for text in pattern_texts} - {None}
    return [str(Integers(b)) for b in sorted({*BITS, *equal}, reverse=True)]
