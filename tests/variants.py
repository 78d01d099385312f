"""The variants of a compiled CPU library, one at a time."""

import ctypes

import pytest
from oneshot_kernels.cpu import build, library

NAMES = ("avx512", "avx2", "neon")


def use(module, name, variant, monkeypatch):
    """Make `module` run this variant of the library `name`; skip where the CPU cannot."""
    if variant not in build.variants():
        pytest.skip(f"this CPU does not run {variant}")
    cdll = ctypes.CDLL(str(build.build(name, build.VARIANTS[variant][2])))
    library.give_team(cdll)
    module._declare(cdll)
    monkeypatch.setattr(module, "_library", lambda: cdll)
