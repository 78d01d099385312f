"""Mixed: which grid each linear is rounded to, as `--quantise` says: one for all, then others by names.

    int4:64                                              all linears alike
    int4:64,model.layers.0.*=int8:row,*.down_proj=none   globs of full names; the last entry that matches counts
    none,model.layers.3.*=int4:64                        none: not rounded
    int8:row,lm_head=int8:row                            the output head as well, which only its full name means
"""

import fnmatch
import glob
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .grids import Grid
from .grids import parse as parse_grid

NONE = "none"


@dataclass(frozen=True)
class Grids:
    """The grid of every linear; None: not rounded. default: of those that no glob matches. others: ((glob, grid),)."""

    default: Grid | None
    others: tuple[tuple[str, Grid | None], ...] = ()

    def __str__(self) -> str:
        return ",".join([str(self.default or NONE), *(f"{own}={grid or NONE}" for own, grid in self.others)])

    def of(self, name: str) -> Grid | None:
        """The grid of the linear of this full name."""
        return next((grid for own, grid in reversed(self.others) if fnmatch.fnmatchcase(name, own)), self.default)

    def named(self, name: str) -> Grid | None:
        """The grid of the output head, whose full name is an entry of its own."""
        return dict(self.others).get(name)

    @property
    def kinds(self) -> tuple[Grid, ...]:
        """The different grids, in the order of the entries."""
        found = dict.fromkeys((self.default, *(grid for _, grid in self.others)))
        return tuple(grid for grid in found if grid is not None)

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise ValueError, which goes behind the flag's name, for what does not fit a model.

        shapes: {full name: (R, C)} of its linears. An entry must match one of them that no later one matches, a shape
        must fit its grid, and something must be rounded.
        """
        later: set[str] = set()
        for own, grid in reversed(self.others):
            if not (found := fnmatch.filter(shapes, own)):
                raise ValueError(f"{own}={grid or NONE}: matches none of the model's {len(shapes)} linears, such as "
                                 f"{next(iter(shapes), 'none')}")
            if later.issuperset(found):
                raise ValueError(f"{own}={grid or NONE}: counts for none of its {len(found)} linears, later entries "
                                 "match them all; the last that matches counts, so put it behind them or leave it out")
            later.update(found)
        for name, shape in shapes.items():
            try:
                if grid := self.of(name):
                    grid.check(*shape)
            except ValueError as error:
                raise ValueError(f"{error} ({name})") from None
        if not any(map(self.of, shapes)):
            raise ValueError(f"{self}: rounds none of the model's linears; leave it out")

    def renamed(self, names: Mapping[str, str]) -> "Grids":
        """The same for linears that are called otherwise now. names: {name now: name before}."""
        own = {name: self.of(before) for name, before in names.items()}
        return replace(self, others=tuple((glob.escape(name), grid) for name, grid in own.items()
                                          if grid != self.default or self.named(name))) if self.others else self


def parse(text: str) -> Grids:
    """The Grids written as `text`, see above. Raises ValueError, which goes behind the flag's name, for other text."""
    first, *others = (part.strip() for part in text.split(","))
    if "=" in first:
        raise ValueError(f"{first:.60}: the first entry is for all linears, such as int4:64, or none")
    found = []
    for part in others:
        own, sign, grid = part.rpartition("=")
        if not sign or not own:
            raise ValueError(f"{part:.60}: only the first entry is for all linears; say whose it is, such as "
                             f"*.down_proj={part:.20}")
        found.append((own.strip(), one(grid.strip())))
    made = Grids(one(first), tuple(found))
    if not made.kinds:
        raise ValueError(f"{text:.60}: rounds nothing; leave it out")
    return made


def one(text: str) -> Grid | None:
    """The grid written as `text`, or None for "none". Raises ValueError when there is no such grid."""
    return None if text == NONE else parse_grid(text)
