"""Uniform: the same pattern everywhere."""

from dataclasses import dataclass

from ..patterns import Pattern
from . import Blocks, Measured, Plan

needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Config:
    pass


def plan(measured: Measured, blocks: Blocks, pattern: Pattern, cfg: Config) -> Plan:
    """The same pattern for every linear."""
    return {name: pattern for block in blocks for name in block}
