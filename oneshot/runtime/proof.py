"""Proofs: what the program promises about its results is checked on the results, under `python -O` too."""


class ProofError(RuntimeError):
    """A result does not have a promised property: a bug in this program, never an error of its user."""


def prove(holds: bool, broken: str) -> None:
    """Raise ProofError unless `holds`. broken: says which promise is broken, as the start of the message."""
    if not holds:
        raise ProofError(f"{broken}; this is a bug in oneshot, please report it with the command")
