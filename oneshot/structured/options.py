"""Flags of making a model smaller, before it is pruned any further."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..prune import solvers
from ..runtime.flag import flag
from .budget import BYS
from .depth import ORDERS

SMALLER = ("shrink", "layers", "drop", "kv_groups", "query_heads",
           "experts")  # the flags of which any makes the model smaller


def shrinks(settings: Mapping[str, Any]) -> bool:
    """Whether settings {flag: value}, of a run or of a record, ask for a smaller model."""
    return any(settings.get(name) is not None for name in SMALLER)


@dataclass(frozen=True)
class ShrinkOptions:
    """See structured/__init__.py."""

    shrink: float | None = flag(None, "share of the transformer blocks (--by) that is left: a smaller dense model with "
                                      "fewer blocks, KV groups and neurons; --pattern and --method then prune that one",
                                section="smaller", preset=True, added=True)
    by: str = flag("parameters", "what the share is of: parameters or bytes of the blocks, or latency, the measured "
                                 "time of decoding a token", section="smaller", choices=BYS, preset=True, added=True)
    layers: int | None = flag(None, "how many transformer blocks are left; with --shrink their neurons give the rest",
                              section="smaller", preset=True, added=True)
    drop: str | None = flag(None, "transformer blocks that go, by their numbers from 0: '3,7'; attention or MLP alone: "
                                  "'mlp:3,attn:7' (loads after `import oneshot` only)", section="smaller", preset=True,
                            added=True)
    kv_groups: int | None = flag(None, "how many KV groups are left in each attention; with --shrink the neurons "
                                       "give the rest", section="smaller", preset=True, added=True)
    query_heads: int | None = flag(None, "how many query heads are left in each KV group, in place of --kv-groups",
                                   section="smaller", preset=True, added=True)
    uneven: bool = flag(False, "let layers differ in width where that loses less; such a model loads after `import "
                               "oneshot` only", section="smaller", preset=True, added=True)
    experts: int | None = flag(None, "of a mixture: how many experts are left in each layer, those that matter most on "
                                     "the calibration text", section="smaller", preset=True, added=True)
    shrink_method: str = flag("obs", "solver that chooses and refits neurons and KV groups, any of --method",
                              section="smaller", preset=True, added=True)
    order: str = flag("kl", "order in which blocks go: kl, by the KL to the dense model, measured anew after each; "
                            "influence, by how little they change the hidden state", section="smaller", choices=ORDERS,
                      preset=True, added=True)
    tries: int = flag(8, "how many mixtures of blocks, KV groups and neurons are tried; 1: neurons alone",
                      section="smaller", preset=True, added=True)
    shrink_target: float = flag(0.0, "as --dense-target, for making the model smaller", section="smaller", preset=True,
                                added=True)

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        if self.shrink is not None and not 0 < self.shrink < 1:
            raise ValueError(f"--shrink {self.shrink:g}: give a share between 0 and 1, such as 0.75")
        if self.experts is not None and self.experts < 1:
            raise ValueError(f"--experts {self.experts}: must be at least 1")
        for name in ("kv_groups", "query_heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.kv_groups is not None and self.query_heads is not None:
            raise ValueError("--query-heads: an attention loses either query heads or whole KV groups (--kv-groups); "
                             "give one of them")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"--layers {self.layers}: must be at least 1")
        if self.tries < 1:
            raise ValueError(f"--tries {self.tries}: must be at least 1")
        if not 0 <= self.shrink_target <= 1:
            raise ValueError(f"--shrink-target {self.shrink_target:g}: give a share from 0 to 1")
        self.dropped_parts  # noqa: B018 - raises for a list that cannot be read
        if self.drop is not None and self.layers is not None:
            raise ValueError("--drop: says which blocks go, --layers how many are left; give one of them")
        solvers.chain_named(self.shrink_method, "--shrink-method")

    @property
    def shrinks(self) -> bool:
        """Whether the model is made smaller."""
        return shrinks(vars(self))

    @property
    def says_what_goes(self) -> bool:
        """Whether blocks or heads are named, so that no mixture is searched for."""
        return any(value is not None for value in (self.drop, self.layers, self.kv_groups, self.query_heads))

    @property
    def dropped_blocks(self) -> tuple[int, ...]:
        """The numbers of the whole blocks of `--drop`."""
        return tuple(number for part, number in self.dropped_parts if not part)

    @property
    def dropped_parts(self) -> tuple[tuple[str, int], ...]:
        """("" or "attn" or "mlp", number of the block) of all that `--drop` names.

        Raises ValueError naming the flag for anything else.
        """
        parts = [part.strip() for part in (self.drop or "").split(",") if part.strip()]
        if self.drop is not None and not parts:
            raise ValueError("--drop: nothing given")
        found = [re.fullmatch(r"(?:(attn|mlp):)?(\d{1,6})", part) for part in parts]
        for part, match in zip(parts, found, strict=True):
            if not match:
                raise ValueError(f"--drop {part}: give numbers of blocks such as 3,7, or mlp:3,attn:7")
        return tuple(sorted({(match[1] or "", int(match[2])) for match in found}))
