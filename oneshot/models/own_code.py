"""The model's own code: what it raises (a config that does not fit, a missing package) becomes one line."""

import contextlib
from collections.abc import Iterator

from ..runtime.command import out_of_memory
from ..runtime.inputs import reason
from ..runtime.proof import ProofError


@contextlib.contextmanager
def own_code(said: str, passing: tuple[type[BaseException], ...] = (ValueError,)) -> Iterator[None]:
    """Within the context, any exception becomes a ValueError that starts with `said`.

    passing: those that are raised as they are, beside shortage of memory and failed proofs: ValueErrors are already
    worded for the user.
    """
    try:
        yield
    except (*passing, ProofError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        raise ValueError(f"{said}: {kind}{reason(error)}") from error
