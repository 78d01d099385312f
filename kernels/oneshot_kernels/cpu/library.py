"""Load a compiled library: the best variant for this CPU that passes its own test, or none and one warning.

    load("column_loop", declare, self_test)     ctypes.CDLL or None
    why("column_loop")                          "avx512", or why there is none

A variant that computes wrong results here (a compiler's fault, a virtual machine that lies about its CPU) is disabled
for the process with a RuntimeWarning, and the next best is tried.
"""

import ctypes
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch  # before any library: its OpenMP runtime is the one that is used

from . import build


@dataclass(frozen=True)
class Loaded:
    """A library that was asked for. cdll: None if there is none; about: the variant, or why not."""

    cdll: ctypes.CDLL | None
    about: str


UNTRIED = "not loaded yet"
_lock, _loaded = threading.RLock(), {}


def load(name: str, declare: Callable[[ctypes.CDLL], None],
         self_test: Callable[[ctypes.CDLL], str | None]) -> ctypes.CDLL | None:
    """The library of `<name>.cpp`, compiled at the first call. None, after one warning, if there is none that works.

    declare: sets the argument types. self_test: says what is wrong with the results, or None.
    """
    if name not in _loaded:
        with _lock:
            if name not in _loaded:
                _loaded[name] = _load(name, declare, self_test)
    return _loaded[name].cdll


def why(name: str) -> str:
    """The variant that runs, or why there is none, in words; UNTRIED before `load`."""
    return _loaded[name].about if name in _loaded else UNTRIED


def forget() -> None:
    """Start again, for tests: nothing is loaded, nothing was warned of."""
    with _lock:
        _loaded.clear()
        _warn_once.cache_clear()


def compiled(name: str) -> Iterator[tuple[str, ctypes.CDLL]]:
    """(variant, library) of all that this CPU runs and the compiler knows, the best first. Raises build.Unavailable."""
    missed = []
    for variant in build.variants(name):
        try:
            path = build.build(name, build.VARIANTS[variant].flags)
        except build.Unavailable as error:
            if build.VARIANTS[variant].only is None:
                raise
            missed.append(f"{name}, variant {variant}: {error}")
            continue
        while missed:
            warnings.warn(f"{missed.pop()}; {variant} is used, which is slower here. A newer compiler may know it",
                          RuntimeWarning, stacklevel=4)
        cdll = ctypes.CDLL(str(path))
        give_team(cdll)
        yield variant, cdll


def _load(name: str, declare: Callable[[ctypes.CDLL], None],
          self_test: Callable[[ctypes.CDLL], str | None]) -> Loaded:
    """See `load`."""
    try:
        for variant, cdll in compiled(name):
            declare(cdll)
            if not (fault := self_test(cdll)):
                return Loaded(cdll, variant)
            warnings.warn(f"{name}, variant {variant}, FAILED its self-test on this CPU and is not used: {fault}. "
                          "Please report this", RuntimeWarning, stacklevel=3)
        return Loaded(None, "every variant failed its self-test")
    except (build.Unavailable, OSError) as error:
        _warn_once(str(error))
        return Loaded(None, str(error))


@functools.cache
def _warn_once(reason: str) -> None:
    """One warning for each reason, however many libraries it concerns."""
    warnings.warn(f"compiled CPU kernels are not used, plain torch is (slower, same results): {reason}", RuntimeWarning,
                  stacklevel=4)


def threads() -> int:
    """How many threads a kernel may use: torch's."""
    return torch.get_num_threads()


def bfloat16_units() -> bool:
    """Whether torch multiplies bfloat16 matrices faster than float32 ones here: AMX, or AMD's AVX512-BF16.

    CPUs without such instructions emulate them. Intel's AVX512-BF16 does as many products a second as its float32 does,
    and torch's are 1.7 times as slow there (results/LOG.md). False of a torch before 2.10, which does not say.
    """
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("amx_bf16") or (can.get("avx512_bf16") and "Intel" not in can.get("cpu_name", "")))


def huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask Linux for pages of 2 MB under a tensor that is read as a whole, over and over; returns the tensor.

    Eight streams through pages of 4 KB cost a tenth of the speed (Zen 5). A system that cannot do it changes nothing.
    """
    page, first, size = 2 << 20, tensor.data_ptr(), tensor.numel() * tensor.element_size()
    start, end = -(-first // page) * page, (first + size) // page * page
    libc = ctypes.CDLL(None) if sys.platform == "linux" and start < end else None
    for advice in (14, 25) if libc else ():  # MADV_HUGEPAGE; MADV_COLLAPSE: now, not some day
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return tensor


def give_team(cdll: ctypes.CDLL) -> None:
    """Tell the library where torch's OpenMP runtime starts its threads (see parallel.h)."""
    if start := _openmp():
        cdll.set_team.argtypes, cdll.set_team.restype = [ctypes.c_void_p], None
        cdll.set_team(start)


@functools.cache
def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime of this process, or None."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = {line.split(None, 5)[5].strip() for line in maps if len(line.split(None, 5)) == 6}
    except OSError:
        return None
    for path in sorted(p for p in paths if any(f"/{name}" in p for name in ("libgomp", "libiomp5", "libomp"))):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    return None
