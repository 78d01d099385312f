"""Proofs: what the program promises of its results is checked on the results, also under `python -O`."""


class ProofError(RuntimeError):
    """A result is not what was promised. A fault of this program, never of its user."""


def prove(holds: bool, broken: str) -> None:
    """Raise ProofError saying what is `broken` unless `holds`."""
    if not holds:
        raise ProofError(f"{broken}; this is a fault of oneshot, please report it with the command")
