"""Every flag there is, and what its metadata says of it."""

import functools
from dataclasses import Field, dataclass, fields
from types import ModuleType

from .. import heal
from ..prune import allocate, solvers
from .config import RunConfig

PACKAGES = {"method": solvers, "allocate": allocate, "heal": heal}  # the flag that names parts: their package


@dataclass(frozen=True)
class Known:
    """One flag. name: as an attribute or a part's, "nsamples", "sparsegpt.damping". chosen_by: the flag that names its
    part ("method", "allocate", "heal"), None of RunConfig's own."""

    name: str
    field: Field
    chosen_by: str | None = None

    @property
    def default(self):
        return self.field.default

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value: it turns a default."""
        return isinstance(self.default, bool)

    @property
    def option(self) -> str:
        """As it is written on the command line: "--nsamples", "--no-dense"."""
        name = self.name.replace("_", "-")
        return f"--no-{name}" if self.default is True else f"--{name}"

    @property
    def options(self) -> list[str]:
        """The same, and its name before."""
        before = self.metadata.get("was")
        return [self.option] + ([f"--{before.replace('_', '-')}"] if before else [])

    @property
    def metadata(self):
        """See runtime/flag.py."""
        return self.field.metadata

    @property
    def type(self) -> type:
        """What its value is read as."""
        return next((k for k in (int, float) if self.field.type in (k, k | None, k.__name__)), str)


def parts(package: ModuleType) -> list[str]:
    """The names of a package's parts."""
    found = package.names()
    return found["solver"] + found["refiner"] if isinstance(found, dict) else found


@functools.cache
def known() -> dict[str, Known]:
    """{name: Known} of every flag: RunConfig's, then every part's."""
    found = {f.name: Known(f.name, f) for f in fields(RunConfig) if f.metadata}
    for chosen_by, package in PACKAGES.items():
        for part in parts(package):
            for f in fields(package.module(part).Config):
                found[f"{part}.{f.name}"] = Known(f"{part}.{f.name}", f, chosen_by)
    return found


def python_names() -> list[str]:
    """The settings that Python's functions take by name."""
    return [k.name for k in known().values() if not k.chosen_by and k.metadata["python"]]


def part_names() -> list[str]:
    """The settings of parts: "sparsegpt.damping"."""
    return [k.name for k in known().values() if k.chosen_by]


def changes_preset() -> set[str]:
    """The flags that, given beside `--method best`, change its recipe."""
    return {k.name for k in known().values() if k.metadata.get("preset")}


def tells_apart(name: str) -> bool:
    """Whether tables tell two runs apart by a setting of a record; parts' always, and what is not known any more."""
    return name not in ("preset",) and (name not in known() or known()[name].metadata.get("shown", True))


def todays_names(given: dict) -> dict:
    """Settings by the names they have today: {"recover": ...} becomes {"heal": ...}."""
    before = {k.metadata["was"]: k.name for k in known().values() if k.metadata.get("was")}
    return {before.get(name, name): value for name, value in given.items()}
