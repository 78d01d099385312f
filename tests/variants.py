"""The variants of a compiled CPU library, one at a time, and the mark of tests that need a compiler."""

import shutil

import pytest
from oneshot_kernels.cpu import library

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
NAMES = ("amx", "avx512", "avx2", "neon")


def use(module, name, variant, monkeypatch):
    """Make `module` run this variant of the library `name`; skip where the CPU cannot."""
    cdll = dict(library.compiled(name)).get(variant)
    if cdll is None:
        pytest.skip(f"this CPU does not run {variant}" + "; see test_cpu_neon.py" * (variant == "neon"))
    module._declare(cdll)
    monkeypatch.setattr(module, "_library", lambda: cdll)
