"""What the compiler makes of the kernels, read off the machine code on CPU. Figures are per compiled variant."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiling needs Triton, whose wheel brings ptxas (pip install triton)")

HERE = Path(__file__).parent


@functools.cache
def everything() -> list[dict]:
    """codegen.py's facts, from a process without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1] / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "codegen.py"), "sm_90", "sm_80", "sm_89", "gfx942"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-6000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def compiled(architecture: str) -> dict[str, dict]:
    """{variant: facts} of one architecture."""
    return {row["name"]: row for row in everything() if row["architecture"] == architecture}


def decode_variants() -> dict[str, dict]:
    return {name: row for name, row in compiled("sm_90").items() if name.startswith("decode")}


def test_every_variant_compiles_without_spills():
    rows = compiled("sm_90")
    assert len(rows) == 12
    for name, row in rows.items():
        assert row["spills"] == 0 and row["stack"] == 0, (name, row)
        assert row["shared"] <= 99 * 1024, (name, row)  # the limit of a block on Ada; Hopper's is 227 KiB


def test_the_assembly_gets_one_fragment_per_warp():
    """Four consecutive elements a lane, 128 a warp: the map that mma_sp.py relies on and Triton does not promise."""
    for name, row in decode_variants().items():
        assert row["asm_layouts"], name
        for layout in row["asm_layouts"]:
            parts = ("sizePerThread = [4]", "threadsPerWarp = [32]", f"warpsPerCTA = [{row['warps']}]")
            assert all(part in layout for part in parts), (name, layout)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("decode, 8 tokens", 8),  # k-blocks under one metadata load
        ("decode, 32 tokens, ragged K, float16", 32),  # four token tiles
        ("decode, norm and swiglu", 16),  # gate and up
        ("decode, 64 tokens", 64),  # eight token tiles
    ],
)
def test_products_are_sparse_tensor_core_instructions(name, count):
    row = decode_variants()[name]
    assert row["hmma_sp"] == count and row["tensor_core"] == count


@pytest.mark.parametrize("name", ["decode, 8 tokens", "decode, norm and swiglu", "decode, 64 tokens"])
def test_weights_are_copied_asynchronously_16_bytes_at_a_time(name):
    """Per pipeline stage and row tile: eight copies of values, one of metadata. x goes straight to registers."""
    row = decode_variants()[name]
    tiles = 2 if "swiglu" in name else 1
    assert row["copies"] == row["copies_16_bytes"] == 9 * tiles * row["stages"]


def test_the_bench_compiles_what_it_runs_first():
    """The kernels of gpu_bench that the interpreter cannot judge: the raw instruction and the ceilings."""
    rows = {name: row for name, row in compiled("sm_90").items() if name.startswith("bench")}
    assert rows["bench: fragment map"]["hmma_sp"] == 1
    assert rows["bench: mma.sp rate"]["hmma_sp"] >= 4 and rows["bench: read"]["loads_16_bytes"] >= 8
    for name in ("bench: fragment map", "bench: mma.sp rate"):
        for layout in rows[name]["asm_layouts"]:
            assert "sizePerThread = [4]" in layout and f"warpsPerCTA = [{rows[name]['warps']}]" in layout, layout


def test_the_portable_kernels_compile_for_amd():
    rows = compiled("gfx942")
    assert list(rows) == ["middle, 512 tokens", "scratch", "column loop, 2:4"]
    assert rows["middle, 512 tokens"]["tensor_core"] > 0 and all(row["spills"] == 0 for row in rows.values())
    assert all(row["shared"] <= 64 * 1024 for row in rows.values())  # what a workgroup has there


def test_registers_leave_room_for_several_blocks():
    """65536 registers: 64 or fewer a thread at 8 warps let four blocks share a multiprocessor."""
    assert decode_variants()["decode, 8 tokens"]["registers"] <= 64


def test_middle_kernel_uses_tensor_cores_and_wide_copies():
    row = compiled("sm_90")["middle, 512 tokens"]
    assert row["tensor_core"] > 0 and row["copies_16_bytes"] > 0


def test_scratch_expansion_loads_16_bytes_at_a_time():
    assert compiled("sm_90")["scratch"]["loads_16_bytes"] > 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89"])
def test_older_architectures_compile(architecture):
    rows = compiled(architecture)
    assert list(rows) == ["decode, 8 tokens", "middle, 512 tokens", "scratch", "column loop, 2:4"]
    assert rows["decode, 8 tokens"]["hmma_sp"] == 8
    assert rows["middle, 512 tokens"]["tensor_core"] > 0
    assert all(row["spills"] == 0 for row in rows.values())
