"""Which kernel runs: the fastest one measured for (N, K, dtype, tokens) on this device, else a labelled estimate.

    M, N, K   tokens, outputs (gate and up counted together with SwiGLU), inputs

    reference   row-major weights: unpack and F.linear     CPU, float32, and weights nobody prepared
    decode      mma.sp, decode.py                          1 to 64 tokens, NVIDIA compute capability 8.0 and up
    middle      expand and tl.dot, expand.py               any GPU
    sparselt    cuSPARSELt, prefill.py                     needs prefill_copy=True
    scratch     expand, then cuBLAS, prefill.py            any GPU

`python -m oneshot_kernels.tune` measures and writes `<cache>/<device>-triton<version>.json`; the cache folder is
$ONESHOT_KERNELS_CACHE, else $XDG_CACHE_HOME/oneshot_kernels, else ~/.cache/oneshot_kernels.
"""

import functools
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from .gpu.prefill import sparselt_refuses

try:
    import triton
except ImportError:  # no wheel for this platform: CPU works, GPU kernels do not
    triton, INTERPRET = None, False
else:
    from .gpu import decode, expand
    from .gpu.mma_sp import INTERPRET

MIDDLE_UNTIL = 512
"""Estimate, untuned: dense leaves the memory roof at 184 tokens on an H200, expansion pays somewhat beyond that."""


@dataclass(frozen=True)
class Problem:
    """What a choice depends on. `rows` and `k` are the weight's shape, `swiglu` halves the outputs."""

    tokens: int
    rows: int
    k: int
    dtype: torch.dtype
    device: torch.device
    fragments: bool = True
    prefill_copy: bool = False
    swiglu: bool = False

    @property
    def key(self) -> str:
        """The table's key: one entry per weight shape, dtype and epilogue."""
        return f"{self.rows}x{self.k} {str(self.dtype).removeprefix('torch.')}" + (" swiglu" if self.swiglu else "")


@dataclass(frozen=True)
class Choice:
    """The path, its launch parameters (a Config, an algorithm number, or None) and where the decision comes from."""

    path: str
    config: object
    source: str
    reason: str


def uses_fragments(dtype: torch.dtype, device: torch.device) -> bool:
    """True where weights belong in fragment order: 16-bit floats on a GPU with Triton, or under the interpreter."""
    on_gpu = device.type == "cuda" and triton is not None
    return (on_gpu or (INTERPRET and device.type == "cpu")) and dtype in (torch.float16, torch.bfloat16)


def refusals(problem: Problem) -> dict[str, str | None]:
    """For each GPU path, in order of preference at few tokens: why it cannot run this problem, or None."""
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
    """The path for this problem. Cached: the table is read once per process (`forget` rereads it)."""
    return _choose(problem, table_path(problem.device))


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, path: Path) -> Choice:
    if not problem.fragments:
        where = "on CPU" if problem.device.type == "cpu" else "row-major weights on a GPU"
        return Choice("reference", None, "only path", f"{where}: unpack, then F.linear")
    if problem.device.type == "cpu" and not INTERPRET:
        return Choice("reference", None, "only path", "on CPU: unpack, then F.linear")
    refused = refusals(problem)
    usable = [name for name, reason in refused.items() if reason is None]
    measured = _nearest(load_table(path).get(problem.key, {}), problem.tokens)
    timed = {name: row for name, row in measured.items() if name in usable}
    if timed:
        best = min(timed, key=lambda name: timed[name]["us"])
        times = ", ".join(
            f"{name} {row['us']:.1f} us" for name, row in sorted(timed.items(), key=lambda item: item[1]["us"])
        )
        return Choice(best, _config(best, timed[best]["config"]), f"measured, {path}", times)
    return _estimate(problem, usable)


def _estimate(problem: Problem, usable: list[str]) -> Choice:
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
    """What runs where the decode kernel failed its self-test."""
    config = expand.default_config(problem.tokens, problem.rows, problem.k)
    return Choice("middle", config, "self-test", "the decode kernel failed its self-test on this GPU")


def explain(layer, tokens: int) -> str:
    """One line: which path a `Sparse24Linear` takes for this many tokens, who says so, and what was refused."""
    problem = layer.problem(tokens)
    choice = choose(problem)
    device = torch.cuda.get_device_name(problem.device) if problem.device.type == "cuda" else str(problem.device)
    text = f"{problem.key}, {tokens} tokens on {device}: {choice.path} ({choice.source}; {choice.reason})"
    if choice.config is not None:
        text += f", {choice.config}"
    if choice.path == "reference":
        return text
    refused = [f"{name}: {reason}" for name, reason in refusals(problem).items() if reason]
    return text + (f"; not {'; not '.join(refused)}" if refused else "")


# The table


def table_path(device: torch.device) -> Path:
    """Where this device's measurements live."""
    return _table_path(device, os.environ.get("ONESHOT_KERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _table_path(device: torch.device, own: str | None, xdg: str | None) -> Path:
    folder = Path(own) if own else Path(xdg or Path.home() / ".cache") / "oneshot_kernels"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    version = triton.__version__ if triton else "none"
    return folder / (re.sub(r"[^A-Za-z0-9]+", "-", name) + f"-triton{version}.json")


@functools.lru_cache(maxsize=64)
def load_table(path: Path) -> dict:
    """{key: {tokens: {path: {"us": float, "config": ...}}}}; empty where nothing was measured.

    Raises ValueError for a damaged file, rather than running untuned without a word.
    """
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["entries"]
        return {key: {int(tokens): row for tokens, row in rows.items()} for key, rows in entries.items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of oneshot_kernels.tune; delete it and tune again") from error


def save_table(path: Path, entries: dict, about: dict) -> None:
    """Write the table in one step (a reader sees the old file or the new one), and forget choices made before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump({**about, "entries": entries}, file, indent=1, sort_keys=True)
    os.replace(temporary, path)
    forget()


def forget() -> None:
    """Drop cached choices and tables."""
    _choose.cache_clear()
    load_table.cache_clear()


def _nearest(rows: dict[int, dict], tokens: int) -> dict:
    """The row measured at the next number of tokens up, else at the largest."""
    if not rows:
        return {}
    return rows[min((t for t in rows if t >= tokens), default=max(rows))]


def _config(path: str, config):
    kind = {"decode": decode.Config, "middle": expand.Config}.get(path)
    return kind(**config) if kind else config
