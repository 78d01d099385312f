"""Which kernel runs: the fastest one measured for (N, K, dtype, tokens) on this device, or else an estimate.

    M, N, K   tokens, outputs (with SwiGLU gate and up together), inputs

    reference   row-major weights: unpack and F.linear     weights that were not prepared, CPUs without a compiler
    tiles       cpu/linear.py, compiled C++                CPU, any number of tokens on most
    kernel      cpu/integers.py, compiled C++              CPU, int8 and int4 weights, dense ones too
    expand      expand part by part, torch products        CPU, many tokens where torch has units of its own for them
    decode      mma.sp, gpu/decode.py                      1 to 64 tokens, NVIDIA compute capability 8.0 and up
    middle      expand and tl.dot, gpu/expand.py           any GPU
    sparselt    cuSPARSELt, gpu/prefill.py                 needs prefill_copy=True
    scratch     expand, then cuBLAS, gpu/prefill.py        any GPU

`python -m oneshot_kernels.gpu.tune` (on a CPU `.cpu.tune`) measures and writes `<cache>/<device>-triton<version>.json`;
the folder is $ONESHOT_KERNELS_CACHE, else where compiled kernels are kept (cpu/build.py).
"""

import functools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .cpu import build, layout, library
from .cpu import linear as cpu_linear
from .gpu.prefill import sparselt_refuses
from .problem import Choice, Problem

try:
    import triton
except ImportError:  # there is no wheel for this platform; the CPU works, the GPU kernels do not
    triton, INTERPRET = None, False
else:
    from .gpu import decode, expand
    from .gpu.mma_sp import INTERPRET

if TYPE_CHECKING:
    from .cpu.integers import IntegerLinear
    from .linear import Sparse24Linear

TILES_UNTIL = {"avx512": 16, "neon": 64}
"""{variant: tokens up to which tiles should pay}, estimates. NEON was not measured. AVX-512: of bfloat16 where torch's
products have units of their own (`library.bfloat16_units`). Any number of tokens elsewhere: a 2:4 weight takes half of
the multiplications (cpu/many.h), or has tile registers (cpu/amx_many.h)."""

INTEGERS_UNTIL = 128
"""An estimate, the same for bfloat16 inputs of integer weights, where a CPU has units for torch's product alone."""

NOT_ON_CPU = (False, 0, True)

MIDDLE_UNTIL = 512
"""An estimate: on an H200 dense products are memory-bound up to 184 tokens; expansion pays somewhat beyond that."""


def uses_fragments(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights should be in fragment order: 16-bit floats on a GPU with Triton, or under the interpreter."""
    on_gpu = device.type == "cuda" and triton is not None
    return (on_gpu or (INTERPRET and device.type == "cpu")) and dtype in (torch.float16, torch.bfloat16)


def dimensions(dtype: torch.dtype, device: torch.device) -> int:
    """The order that weights should be in, as the dimensions of `values`: 4 fragments, 3 tiles, 2 row-major."""
    if uses_fragments(dtype, device):
        return 4
    tiles = device.type == "cpu" and not INTERPRET and dtype in cpu_linear.TYPES and cpu_linear.available()
    return 3 if tiles else 2


def on_cpu(values: torch.Tensor) -> tuple[bool, int, bool]:
    """The last three fields of a Problem: tiles, threads, native."""
    return (True, library.threads(), layout.is_native(values, cpu_linear.lanes())) if values.ndim == 3 else NOT_ON_CPU


def refusals(problem: Problem) -> dict[str, str | None]:
    """{GPU path: why it cannot run this problem, or None}, in order of preference for few tokens."""
    emulated = INTERPRET and problem.device.type == "cpu"
    old = not (emulated or torch.version.hip) and torch.cuda.get_device_capability(problem.device) < (8, 0)
    no_mma_sp = "mma.sp needs compute capability 8.0" if old else None
    if torch.version.hip:
        no_mma_sp = "mma.sp is an NVIDIA instruction"
    many = f"more than {decode.MAX_TOKENS} tokens" if problem.tokens > decode.MAX_TOKENS else None
    no_copy = None if problem.prefill_copy else "no prefill copy was kept (prefill_copy=True)"
    return {
        "decode": no_mma_sp or many,
        "middle": "bfloat16 needs compute capability 8.0" if old and problem.dtype == torch.bfloat16 else None,
        "sparselt": no_copy or sparselt_refuses(problem.rows, problem.k, problem.dtype, problem.device),
        "scratch": None,
    }


def choose(problem: Problem) -> Choice:
    """The Choice for a problem. Cached: the table is read once per process, or again after `forget`."""
    return _choose(problem, table_path(problem.device))


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, path: Path) -> Choice:
    if problem.tiles:
        return _choose_on_cpu(problem, path)
    if problem.form:
        return _choose_for_integers(problem, path)
    if not problem.fragments:
        where = "on CPU" if problem.device.type == "cpu" else "row-major weights on a GPU"
        return Choice("reference", None, "only path", f"{where}: unpack, then F.linear")
    if problem.device.type == "cpu" and not INTERPRET:
        return Choice("reference", None, "only path", "on CPU: unpack, then F.linear")
    refused = refusals(problem)
    usable = [name for name, reason in refused.items() if reason is None]
    return _measured(problem, path, usable) or _estimate(problem, usable)


@functools.lru_cache(maxsize=4096)
def takes_tiles(tokens: int, rows: int, k: int, dtype: torch.dtype, shape: torch.Size, threads: int) -> bool:
    """Whether a 2:4 weight (rows, k) whose values have this shape goes through cpu/linear.py at once. Cached."""
    fits = tuple(shape) == layout.shapes(rows, k, cpu_linear.lanes())[dtype != torch.bfloat16]
    problem = Problem(tokens, rows, k, dtype, torch.device("cpu"), False, tiles=True, threads=threads)
    return tokens > 0 and fits and choose(problem).path == "tiles"


def _measured(problem: Problem, path: Path, usable: list[str]) -> Choice | None:
    """The fastest of the usable paths in the table, or None if none was measured."""
    measured = _nearest(load_table(path).get(problem.key, {}), problem.tokens)
    timed = {name: row for name, row in measured.items() if name in usable}
    if not timed:
        return None
    best = min(timed, key=lambda name: timed[name]["us"])
    times = ", ".join(
        f"{name} {row['us']:.1f} us" for name, row in sorted(timed.items(), key=lambda item: item[1]["us"])
    )
    return Choice(best, _config(best, timed[best]["config"]), f"measured, {path}", times)


def _choose_on_cpu(problem: Problem, path: Path) -> Choice:
    """The Choice for a weight in tiles."""
    if not problem.native:
        return Choice("expand", None, "only path", "cast to another dtype since it was prepared; call prepare() again")
    if choice := _measured(problem, path, ["tiles", "expand"]):
        return choice
    variant = library.why("linear")
    if variant == "neon" or (variant == "avx512" and problem.dtype == torch.bfloat16 and library.bfloat16_units()):
        if problem.tokens > TILES_UNTIL[variant]:
            return Choice("expand", None, "estimate, untuned", "many tokens: expand once, dense product")
        return Choice("tiles", None, "estimate, untuned", f"up to {TILES_UNTIL[variant]} tokens time is weight bytes")
    return Choice("tiles", None, "estimate, untuned", "any number of tokens: the kernel has its own way for many")


def _choose_for_integers(problem: Problem, path: Path) -> Choice:
    """The Choice for an integer weight."""
    if problem.rounds:
        return Choice("kernel", None, "only path", "it multiplies whole numbers")
    if choice := _measured(problem, path, ["kernel", "expand"]):
        return choice
    source, own = "estimate, untuned", library.why("integers") == "amx"  # tile registers of its own
    if problem.dtype != torch.bfloat16 or own or not library.bfloat16_units():
        return Choice("kernel", None, source, "torch's product has no better units for these inputs")
    if problem.tokens < INTEGERS_UNTIL:
        return Choice("kernel", None, source, f"below {INTEGERS_UNTIL} tokens time is weight bytes")
    return Choice("expand", None, source, "many tokens: torch's product has units for bfloat16")


def _estimate(problem: Problem, usable: list[str]) -> Choice:
    """The Choice for a problem that was not measured."""
    source = "estimate, untuned"
    if "decode" in usable:
        config = decode.default_config(problem.tokens, problem.k, problem.swiglu)
        return Choice("decode", config, source, f"up to {decode.MAX_TOKENS} tokens time is weight bytes")
    if "middle" in usable and problem.tokens <= MIDDLE_UNTIL:
        config = expand.default_config(problem.tokens, problem.rows, problem.k)
        return Choice("middle", config, source, f"up to {MIDDLE_UNTIL} tokens expanding in registers should pay")
    if "sparselt" in usable:
        return Choice("sparselt", 0, source, "many tokens, and a prefill copy is there")
    return Choice("scratch", None, source, "many tokens, no prefill copy: expand once, dense product")


def fallback(problem: Problem) -> Choice:
    """The Choice if the decode kernel has failed its self-test."""
    config = expand.default_config(problem.tokens, problem.rows, problem.k)
    return Choice("middle", config, "self-test", "the decode kernel failed its self-test on this GPU")


def explain(layer: "Sparse24Linear | IntegerLinear", tokens: int) -> str:
    """One line that says which path a layer uses for this many tokens, why, and why not the others."""
    problem = layer.problem(tokens)
    choice = choose(problem)
    device = torch.cuda.get_device_name(problem.device) if problem.device.type == "cuda" else str(problem.device)
    text = f"{problem.key}, {tokens} tokens on {device}: {choice.path} ({choice.source}; {choice.reason})"
    if choice.config is not None:
        text += f", {choice.config}"
    if problem.tiles:
        return f"{text}, {library.why('linear')}"
    if problem.form:
        return f"{text}, inputs {'rounded to int8' if problem.rounds else 'as they are'}, {library.why('integers')}"
    if choice.path == "reference":
        tried = problem.device.type == "cpu" and library.why("linear") != library.UNTRIED
        return f"{text}; no compiled kernel: {library.why('linear')}" if tried and not cpu_linear.available() else text
    refused = [f"{name}: {reason}" for name, reason in refusals(problem).items() if reason]
    return text + (f"; not {'; not '.join(refused)}" if refused else "")


# The table


def table_path(device: torch.device) -> Path:
    """The file with this device's measurements."""
    return Path(os.environ.get("ONESHOT_KERNELS_CACHE") or build.cache_folder()) / _table_name(device)


@functools.cache
def _table_name(device: torch.device) -> str:
    """The table's name, which only devices with the same kernels share."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu":  # several processors may share a home, and virtual ones a name
        name += f" {build.processor('model name', 'cpu family', 'model', 'CPU implementer', 'CPU part')}"
        name += f" {library.why('linear')}" if cpu_linear.available() else ""
    version = triton.__version__ if triton else "none"
    return re.sub(r"[^A-Za-z0-9]+", "-", name) + f"-triton{version}.json"


@functools.lru_cache(maxsize=64)
def load_table(path: Path) -> dict:
    """{key: {tokens: {path: {"us": float, "config": ...}}}}; empty if nothing was measured.

    Raises ValueError for a damaged file, rather than silently running untuned.
    """
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["entries"]
        return {key: {int(tokens): row for tokens, row in rows.items()} for key, rows in entries.items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of oneshot_kernels.gpu.tune; delete it and tune again") from error


def save_table(path: Path, entries: dict, about: dict) -> None:
    """Write the table atomically (a reader sees the old file or the new one), and drop cached choices.

    about: further entries of the file, such as the device and versions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump({**about, "entries": entries}, file, indent=1, sort_keys=True)
    os.replace(temporary, path)
    forget()


def forget() -> None:
    """Drop all cached choices and tables."""
    _choose.cache_clear()
    takes_tiles.cache_clear()
    load_table.cache_clear()


def _nearest(rows: dict[int, dict], tokens: int) -> dict:
    """The row measured for the next larger number of tokens; beyond all of them, for the largest."""
    if not rows:
        return {}
    return rows[min((t for t in rows if t >= tokens), default=max(rows))]


def _config(path: str, config: Any) -> Any:
    """The launch parameters of a path, from the table's plain values."""
    kind = {"decode": decode.Config, "middle": expand.Config}.get(path)
    return kind(**config) if kind else config
