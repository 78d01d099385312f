"""Compile one C++ file of this folder into the cache, once, and say which variants this CPU can run.

A variant is a set of compiler flags with a name. Never `-march=native`: a cache may be shared by different machines.
A library's name holds a hash of its sources, the compiler's version and the flags, so a stale one is never found.
Two processes compile it once: they wait for a lock, and the finished file takes its place by renaming.

The cache is `kernels/` in $ONESHOT_CACHE, else in $XDG_CACHE_HOME/oneshot, else in ~/.cache/oneshot. The compiler is
$CXX, else g++, else clang++.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math",
          "-ffp-contract=fast")
AVX512 = ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512")
TIMEOUT = 600  # seconds; a compilation takes about ten


class Variant(NamedTuple):
    """Compiler flags for a kind of processor. bit: of features.cpp; None: every processor of this machine has what it
    takes. only: the libraries that differ from the next best variant's; None: all do.
    """

    machine: str
    bit: int | None
    flags: tuple[str, ...]
    only: tuple[str, ...] | None = None


VARIANTS = {  # the best first
    "amx": Variant("x86_64", 4, (*AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), ("linear", "integers")),
    "avx512": Variant("x86_64", 2, AVX512),
    "avx2": Variant("x86_64", 1, ("-march=x86-64-v3",)),
    "neon": Variant("aarch64", None, ("-march=armv8-a",)),
}


class Unavailable(Exception):
    """No library can be had here, for the reason that the text says."""


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    if own := os.environ.get("ONESHOT_CACHE"):
        return Path(own) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oneshot" / "kernels"


def compiler() -> str:
    """Path of the C++ compiler. Raises Unavailable without one."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise Unavailable(f"there is no C++ compiler ({f'CXX={asked}' if asked else 'g++, clang++'})")


def machine() -> str:
    """This machine's architecture, by the name that VARIANTS use."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def processor(*words: str) -> str:
    """What the system says of this machine's processor, by default its name; words: others, as /proc/cpuinfo has them.
    """
    file = Path("/proc/cpuinfo")
    first = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if file.exists() else []
    said = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in first)}
    found = [said[word] for word in words or ("model name",) if said.get(word)]
    return " ".join(found) or platform.processor() or platform.machine()


def variants(library: str) -> list[str]:
    """The names of a library's variants that this CPU runs, the best first. Raises Unavailable without a compiler."""
    here, bits = machine(), features()
    found = [name for name, one in VARIANTS.items()
             if one.machine == here and (one.bit is None or bits & one.bit) and library in (one.only or (library,))]
    if not found:
        raise Unavailable(f"no variant for this processor ({here}: x86-64 needs AVX2)")
    return found


@functools.cache
def features() -> int:
    """The bits of features.cpp."""
    return ctypes.CDLL(str(build("features", ()))).features()


def build(name: str, flags: Sequence[str], using: str | None = None) -> Path:
    """The shared library of `<name>.cpp`, compiled with COMMON and `flags` unless the cache has it.

    using: another compiler than `compiler()`. Raises Unavailable if it cannot be compiled or written.
    """
    command = [using or compiler(), *COMMON, *flags]
    try:
        target = cache_folder() / f"{name}-{_key(name, command)}.so"
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _compile(command, HERE / f"{name}.cpp", target)
    except OSError as error:
        raise Unavailable(f"{name}.cpp cannot be compiled into {cache_folder()}: {error}") from error
    return target


def _key(name: str, command: Sequence[str]) -> str:
    """16 hexadecimal digits that change with the sources, the compiler and the flags."""
    hashed = hashlib.sha256("\0".join(command).encode())
    hashed.update(_version(command[0]))
    for source in [HERE / f"{name}.cpp", *sorted(HERE.glob("*.h"))]:
        hashed.update(source.read_bytes())
    return hashed.hexdigest()[:16]


@functools.cache
def _version(path: str) -> bytes:
    """What the compiler says about itself."""
    return subprocess.run([path, "--version"], capture_output=True, timeout=TIMEOUT).stdout


def _compile(command: Sequence[str], source: Path, target: Path) -> None:
    """Compile into a temporary file beside the target, then rename. Raises Unavailable with its first error."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    try:
        done = subprocess.run([*command, str(source), "-o", temporary], capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
            raise Unavailable(f"{command[0]} cannot compile {source.name}: {lines[0]}")
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {TIMEOUT} s for {source.name}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    import fcntl  # not on Windows, where there is no variant either

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
