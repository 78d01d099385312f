"""Grids: the integers that a weight is rounded to, and their storage in bytes.

A grid is a frozen dataclass, like a pattern, with

    group                    columns that share a scale within one row; None: the whole row
    low, high                the smallest and the largest code
    check(R, C)              raise ValueError if a weight of this shape cannot be rounded to it
    scales(W) -> s           (R, groups), for W (R, C): as they are stored, float16 numbers in W's dtype; some may be 0
    round(W, s) -> codes     (R, C), whole numbers in W's dtype; 0 where the scale is 0
    value(codes, s)          (R, C): s · code
    bytes(R, C, pattern)     storage of codes and scales; with a pattern, of the kept weights' codes and their positions

Written as text: `int4` (groups of 128 columns), `int4:64`, `int4:row`, of any width from 2 to 16 bits; `q8_0` and
`q4_0` are GGUF's, which llama.cpp computes with. All are symmetric: there is no zero point.

    R, C    rows (outputs) and columns (inputs) of a weight
    b       bits per code
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..prune.patterns import NM, Dense, Pattern
from ..prune.patterns import parse as parse_pattern

GROUP = 128  # columns that share a scale, unless another number is named
BITS = (8, 4)  # always compared with; in addition the width that takes as many bytes as the pattern


class Scaled:
    """What all grids do alike: codes times scales."""

    group: int | None
    bits: int

    @property
    def low(self) -> int:
        """The smallest code, -2^(b-1)."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest code, 2^(b-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    def width(self, C: int) -> int:
        """How many columns share a scale, of C."""
        return self.group or max(C, 1)

    def groups(self, W: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """W (R, C) cut into its groups; the last may be smaller."""
        return W.split(self.width(W.shape[1]), dim=1)

    def spread(self, s: torch.Tensor, C: int) -> torch.Tensor:
        """The scales (R, groups) of every weight, (R, C)."""
        return s.repeat_interleave(self.width(C), dim=1)[:, :C]

    def value(self, codes: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """s · code, (R, C); 0 where the scale is 0."""
        return codes * self.spread(s, codes.shape[1])

    def round(self, W: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The codes nearest to W (R, C), ties to even."""
        s = self.spread(s, W.shape[1])
        return (W / s).round_().clamp_(self.low, self.high).where(s != 0, 0.0)

    def bytes(self, R: int, C: int, pattern: Pattern | None = None) -> int:
        """Bytes of the codes of an (R, C) weight, b bits each, and of its scales, 2 each.

        pattern: of its zeros; the codes of the kept weights and their positions are stored where that takes less.
        """
        codes, scales = -(-R * C * self.bits // 8), 2 * R * -(-C // self.width(C))
        if pattern is not None:
            kept = R * C - pattern.zeros(R, C)
            codes = min(codes, -(-kept * self.bits // 8) + pattern.positions(R, C))
        return codes + scales


@dataclass(frozen=True)
class Integers(Scaled):
    """Integers of `bits` bits, from -2^(b-1) to 2^(b-1) - 1, with one float16 scale per `group` columns of a row.

    The scale is max|w| / ((2^b - 1) / 2), half a step below which all codes lie.
    """

    bits: int
    group: int | None = GROUP

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.group == GROUP else f":{self.group or 'row'}")

    def check(self, R: int, C: int) -> None:
        """Every shape allows it."""

    def scales(self, W: torch.Tensor) -> torch.Tensor:
        """max|w| / ((2^b - 1) / 2) of each group, rounded to float16: infinite above 65504, 0 below 3e-8."""
        return torch.cat([(largest(part) / ((2**self.bits - 1) / 2)).half().to(W.dtype)
                          for part in self.groups(W)], dim=1)


@dataclass(frozen=True)
class GGUF(Scaled):
    """GGUF's q8_0 and q4_0: blocks of 32 columns, one float16 scale d each; the bits are those of `gguf.quants`.

    q8_0: d = max|w| / 127, code = w/d with ties away from zero. q4_0: d = the signed w of largest |w| / -8, so that it
    becomes the code -8 exactly, code = ⌊w/d + 8.5⌋ - 8. Codes are computed with d before it is rounded to float16.
    """

    bits: int
    group = 32

    def __str__(self) -> str:
        return f"q{self.bits}_0"

    def check(self, R: int, C: int) -> None:
        """Raise ValueError unless C is divisible by 32."""
        if C % self.group:
            raise ValueError(f"{self} needs a width divisible by {self.group}, this one is {C}")

    def exact(self, W: torch.Tensor) -> torch.Tensor:
        """d (R, C/32) before it is rounded to float16; W is float32."""
        parts = W.unflatten(1, (-1, self.group))
        if self.bits == 8:
            return parts.abs().amax(-1) / 127
        return parts.gather(2, parts.abs().argmax(-1, keepdim=True)).squeeze(2) / -8

    def scales(self, W: torch.Tensor) -> torch.Tensor:
        """d, rounded to float16: infinite above 65504, 0 below 3e-8."""
        return self.exact(W.float()).half().to(W.dtype)

    def round(self, W: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The codes that `gguf.quants` gives if s are W's own scales, else the nearest, ties to even."""
        if not torch.equal(self.scales(W), s):
            return super().round(W, s)
        d = self.exact(W.float())
        x = W.float() * self.spread((1 / d).where(d != 0, 0.0), W.shape[1])
        if self.bits == 8:
            whole = x.abs().floor()
            codes = (whole + (x.abs() - whole >= 0.5)) * x.sign()
        else:
            codes = (x + 8.5).trunc().clamp(0, 15) - 8
        return codes.to(W.dtype)

    def bytes(self, R: int, C: int, pattern: Pattern | None = None) -> int:
        """34 or 18 bytes for each 32 weights. GGUF stores zeros, so a pattern changes nothing."""
        return super().bytes(R, C)


Grid = Integers | GGUF


def largest(part: torch.Tensor) -> torch.Tensor:
    """max|w| of each row, (R, 1)."""
    return part.abs().amax(1, keepdim=True)


def parse(text: str) -> Grid:
    """The grid written as `text`, such as "int8" or "int4:64". Raises ValueError when there is no such grid."""
    if text in ("q8_0", "q4_0"):
        return GGUF(int(text[1]))
    match = re.fullmatch(r"int(\d{1,2})(?::(row|\d{1,6}))?", text)
    if not match or not 2 <= int(match[1]) <= 16 or (match[2] or "").startswith("0"):
        raise ValueError(f"{text:.40}: no such integers; give int2 to int16 (a scale for each 128 columns of a row), "
                         "int4:64 or int4:row for other groups, q8_0 or q4_0")
    return Integers(int(match[1]), None if match[2] == "row" else int(match[2] or GROUP))


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
