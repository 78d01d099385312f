"""All flags, with what follows from their metadata."""

import functools
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from types import ModuleType
from typing import Any

from .. import heal, quantise
from ..prune import allocate, solvers
from .config import RunConfig

PACKAGES = {"method": solvers, "allocate": allocate, "heal": heal,
            "quantiser": quantise}  # {flag that chooses parts: the parts' package}


@dataclass(frozen=True)
class Known:
    """One flag.

    name: "nsamples", or with its part "sparsegpt.damping". field: where it is declared. chosen_by: the flag that
    chooses its part ("method", "allocate", "heal", "quantiser"); None for RunConfig's own flags.
    """

    name: str
    field: Field
    chosen_by: str | None = None

    @property
    def default(self) -> Any:
        """The default value."""
        return self.field.default

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value but inverts its default."""
        return isinstance(self.default, bool)

    @property
    def option(self) -> str:
        """The flag as it is written on the command line: "--nsamples", "--no-dense"."""
        name = self.name.replace("_", "-")
        return f"--no-{name}" if self.default is True else f"--{name}"

    @property
    def options(self) -> list[str]:
        """All spellings of the flag: `option`, and its former name if it had one."""
        before = self.metadata.get("was")
        return [self.option] + ([f"--{before.replace('_', '-')}"] if before else [])

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What runtime/flag.py has recorded about the flag."""
        return self.field.metadata

    @property
    def type(self) -> type:
        """The type of its value on the command line: int, float or str."""
        return next((k for k in (int, float) if self.field.type in (k, k | None, k.__name__)), str)


def parts(package: ModuleType) -> list[str]:
    """The names of all parts in a package."""
    found = package.names()
    return found["solver"] + found["refiner"] if isinstance(found, dict) else found


@functools.cache
def known() -> dict[str, Known]:
    """{name: Known} of every flag: RunConfig's first, then those of every part."""
    found = {f.name: Known(f.name, f) for f in fields(RunConfig) if f.metadata}
    for chosen_by, package in PACKAGES.items():
        for part in parts(package):
            for f in fields(package.module(part).Config):
                found[f"{part}.{f.name}"] = Known(f"{part}.{f.name}", f, chosen_by)
    return found


def python_names() -> list[str]:
    """The names of the settings that the Python functions accept."""
    return [k.name for k in known().values() if not k.chosen_by and k.metadata["python"]]


def part_names() -> list[str]:
    """The names of the settings of parts, such as "sparsegpt.damping"."""
    return [k.name for k in known().values() if k.chosen_by]


def changes_preset() -> set[str]:
    """The names of the flags that change the recipe when given together with `--method best`."""
    return {k.name for k in known().values() if k.metadata.get("preset")}


def tells_apart(name: str) -> bool:
    """Whether tables use the setting `name` of a record to tell two runs apart.

    Always true for settings of parts, and for those that no longer exist.
    """
    return name not in ("preset",) and (name not in known() or known()[name].metadata.get("shown", True))


def todays_names(given: dict[str, Any]) -> dict[str, Any]:
    """Settings under their current names: {"recover": ...} becomes {"heal": ...}."""
    before = {k.metadata["was"]: k.name for k in known().values() if k.metadata.get("was")}
    return {before.get(name, name): value for name, value in given.items()}
