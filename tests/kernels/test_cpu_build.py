"""The compiled CPU libraries: built once, chosen by CPUID, checked before use, done without where they cannot be."""

import ctypes
import os
import platform
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from oneshot_kernels.cpu import build, library
from variants import needs_compiler


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of its own, and nothing loaded before or after."""
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "cache"))
    build.features.cache_clear()
    library.forget()
    yield
    build.features.cache_clear()
    library.forget()


@pytest.fixture
def compiled(monkeypatch):
    """How often the compiler ran."""
    calls, real = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda *args: (calls.append(args), real(*args)))
    return calls


@needs_compiler
def test_built_once_by_whoever_comes_first(compiled):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.build("features", ()), range(4)))
    assert len(paths) == len(compiled) == 1
    assert sorted(p.suffix for p in build.cache_folder().iterdir()) == [".lock", ".so"]  # no temporary file is left
    assert build.build("features", ("-DX=1",)) not in paths and len(compiled) == 2  # other flags, another library


@needs_compiler
def test_a_changed_source_is_compiled_anew(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "a.cpp").write_text('#include "a.h"\nextern "C" int a() { return A; }')
    found = []
    for value in (1, 2):
        (tmp_path / "a.h").write_text(f"#define A {value}\n")
        found.append(ctypes.CDLL(str(build.build("a", ()))).a())
    assert found == [1, 2] and len(compiled) == 2


@needs_compiler
def test_a_source_that_does_not_compile_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "a.cpp").write_text("int a() { return nothing; }")
    with pytest.raises(build.Unavailable, match=r"cannot compile a\.cpp: .*error.*nothing"):
        build.build("a", ())
    assert [p.suffix for p in build.cache_folder().iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(build, "compiler", lambda: "/bin/true")
    with pytest.raises(build.Unavailable, match="cannot be compiled into"):
        build.build("features", ())


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64" or not os.path.exists("/proc/cpuinfo"), reason="x86-64 Linux")
def test_variants_are_those_that_the_system_lists():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    want = [name for name, flag in (("avx512", "avx512_vnni"), ("avx2", "avx2")) if flag in flags]
    assert build.variants("column_loop") == want
    tiles = {"amx_tile", "amx_bf16", "amx_int8"} <= set(flags) and "avx512" in want
    assert build.variants("linear") == build.variants("integers") == ["amx"] * tiles + want


@needs_compiler
def test_a_compiler_too_old_for_a_variant_of_one_library_leaves_the_next_best(monkeypatch):
    monkeypatch.setattr(build, "variants", lambda _: ["new", "old"])
    monkeypatch.setattr(library, "give_team", lambda cdll: None)
    flags = ("-mnothing-known",)
    monkeypatch.setitem(build.VARIANTS, "new", build.Variant(build.machine(), None, flags, ("features",)))
    monkeypatch.setitem(build.VARIANTS, "old", build.Variant(build.machine(), None, ()))
    with pytest.warns(RuntimeWarning, match="features, variant new: .*cannot compile.*slower") as seen:
        assert library.load("features", lambda cdll: None, lambda cdll: None) is not None
    assert len(seen) == 1
    assert library.why("features") == "old"
    library.forget()
    monkeypatch.setitem(build.VARIANTS, "new", build.Variant(build.machine(), None, flags))
    with pytest.warns(RuntimeWarning, match="nothing-known"):
        assert library.load("features", lambda cdll: None, lambda cdll: None) is None


@needs_compiler
@pytest.mark.skipif(build.machine() != "x86_64", reason="x86-64")
def test_tile_registers_compile_on_a_machine_without_them():
    if build.features() & build.VARIANTS["amx"].bit:
        pytest.skip("this CPU has them: other tests compile and run them")
    amx = build.VARIANTS["amx"]
    assert all(build.build(name, (*amx.flags, "-O0")).is_file() for name in amx.only)  # not to be run: half the time


def test_without_a_compiler_there_is_one_warning_for_all_libraries(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.warns(RuntimeWarning, match=r"plain torch.*no C\+\+ compiler \(CXX=/nonexistent/c\+\+\)") as seen:
        for _ in range(2):
            for name in ("column_loop", "features"):
                assert library.load(name, lambda cdll: None, lambda cdll: None) is None
    assert len(seen) == 1 and "no C++ compiler" in library.why("column_loop")


@needs_compiler
def test_a_wrong_variant_is_disabled_loudly(monkeypatch):
    monkeypatch.setitem(build.VARIANTS, "second", build.Variant(build.machine(), None, ()))
    monkeypatch.setattr(build, "variants", lambda _: ["second", "second"])
    monkeypatch.setattr(library, "give_team", lambda cdll: None)
    faults = ["off by one", None]
    with pytest.warns(RuntimeWarning, match="features, variant second, FAILED its self-test.*off by one") as seen:
        assert library.load("features", lambda cdll: None, lambda cdll: faults.pop(0)) is not None
    assert library.why("features") == "second" and len(seen) == 1
    library.forget()
    with pytest.warns(RuntimeWarning, match="FAILED") as seen:
        assert library.load("features", lambda cdll: None, lambda cdll: "wrong") is None
    assert len(seen) == 2 and library.why("features") == "every variant failed its self-test"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load("features", lambda cdll: None, lambda cdll: None) is None  # for the rest of the process
