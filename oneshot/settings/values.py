"""Values: whether what was given for a flag is of its kind, whoever gave it: a command line, Python or a file."""

import numbers
import os
from typing import Any

from ..runtime.inputs import check_string
from .known import Known, known

MOST = {int: 2**62, float: 3.4e38}  # seeds get a block's number added and are 64-bit; computing is in float32


def plain(given: dict[str, Any]) -> dict[str, Any]:
    """The settings {flag: value}, paths as text. Raises ValueError naming the first flag whose value is of no use."""
    return {name: checked(known()[name], value) if name in known() else value for name, value in given.items()}


def checked(flag: Known, value: Any) -> Any:
    """One flag's value. Raises ValueError naming the flag."""
    if value is None and flag.default is None:
        return value
    value = os.fspath(value) if flag.type is str and isinstance(value, os.PathLike) else value
    said = f"{flag.option} {value!r:.60}" if not isinstance(value, str) else f"{flag.option} {value:.60}"
    if flag.is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"{said}: must be true or false, not {type(value).__name__}")
    elif flag.type is str:
        if not isinstance(value, str):
            raise ValueError(f"{said}: must be text, not {type(value).__name__}")
        try:
            check_string(value)
        except ValueError as error:
            raise ValueError(f"{ascii(said)[1:-1]}: {error}") from None
        if flag.metadata.get("choices") and value not in flag.metadata["choices"]:
            raise ValueError(f"{said}: give {' or '.join(flag.metadata['choices'])}")
    else:
        kind = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}[flag.type]
        if not isinstance(value, kind[0]) or isinstance(value, bool):
            raise ValueError(f"{said}: must be {kind[1]}, not {type(value).__name__}")
        if value != value or not -MOST[flag.type] <= value <= MOST[flag.type]:
            raise ValueError(f"{said}: must be a number from {-MOST[flag.type]:g} to {MOST[flag.type]:g}")
        value = flag.type(value)
    return value
