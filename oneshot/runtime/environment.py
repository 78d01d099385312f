"""Where a run happened: commit, device, versions, peak memory. Part of every record."""

import contextlib
import datetime
import errno
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from .distributed import world


def environment(device: str) -> dict:
    """The record's `environment`: versions, device, threads, date, commit (None outside a checkout), as plain values.

    These are what a reader needs to judge or reproduce a number.
    """
    commit = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)results")  # runs write into results/
    return {
        "oneshot": version("oneshot"), "commit": commit,
        "dirty": bool(changed) if commit else None,
        "device": device_name(device), "threads": torch.get_num_threads(), "python": platform.python_version(),
        **({"processes": world()} if world() > 1 else {}),
        **{name: version(name) for name in ("torch", "transformers", "triton", "datasets", "tokenizers",
                                            "lm_eval")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*args: str) -> str | None:
    """The output of a git command in this package's checkout; None when the package is not in a checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=20)
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True,
                                 timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and tracked.returncode == 0 else None


def device_name(device: str) -> str:
    """The name of the GPU, such as "NVIDIA H200", or of the CPU, such as "cpu (AMD EPYC ...)"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"cpu ({name})"


def resolve_device(device: str) -> str:
    """Resolve "auto" to "cuda" if torch finds a GPU, else to "cpu"; return any other device unchanged."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def check_device(device: str, flag: str = "--device") -> None:
    """Raise ValueError naming the flag when the device does not exist on this machine."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"{flag} {device}: give auto, cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{flag} {device}: this torch ({torch.__version__}) sees no CUDA device; use cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{flag} {device}: there are {torch.cuda.device_count()} CUDA devices")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{flag} {device}: only cpu and cuda are supported")


def processor() -> dict:
    """What torch knows of the CPU: {instructions: whether it has them}, its name; {} of a torch that does not say."""
    return getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has none


def fast_bfloat16(device: str | torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones (a CPU: AMX, or AMD's AVX512-BF16)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    from oneshot_kernels.cpu import library  # where a CPU's products are known

    return library.bfloat16_units()


def emulates_bfloat16(device: str | torch.device) -> bool:
    """Whether the device is a CPU without instructions for bfloat16 products, which then take several times as long."""
    can = processor()
    return torch.device(device).type == "cpu" and not (can.get("amx_bf16") or can.get("avx512_bf16"))


def slower(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether the device is a CPU that multiplies matrices of this dtype slower than float32 ones."""
    if torch.device(device).type != "cpu" or dtype.itemsize > 2:
        return False
    can = processor()
    return not (fast_bfloat16(device) if dtype == torch.bfloat16 else can.get("amx_fp16") or can.get("avx512_fp16"))


def others() -> float:
    """Cores that other processes take: the load average of a minute less this process's threads, at least 0."""
    return max(0.0, os.getloadavg()[0] - torch.get_num_threads()) if hasattr(os, "getloadavg") else 0.0


def check_name(path: str | Path | None, flag: str) -> None:
    """Raise ValueError naming the flag if no file system takes a path of this name."""
    try:
        os.lstat(path or ".")
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{flag} {str(path)[:50]}...: {error.strerror}; choose another") from None


def check_writable(path: str | Path, flag: str) -> None:
    """Raise ValueError naming the flag unless files can be written into the folder `path`, which need not exist yet."""
    there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} {path}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: no permission to write into {there}; choose another folder")


def total_memory(device: str) -> int | None:
    """The GPU's memory in bytes; None for a CPU, whose memory may be swapped."""
    return torch.cuda.get_device_properties(device).total_memory if torch.device(device).type == "cuda" else None


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that are free on a device: the GPU's, or what the system can give this process; None if it does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return None


def freed_memory(block: int) -> int:
    """Bytes that glibc keeps, at most, of tensors below 32 MB that are gone: 60 to 350 MB were seen.

    block: bytes of a transformer block as it computes.
    """
    return min(2**28, 2**26 + block // 2)


def reset_peak_memory(device: str) -> None:
    """Start a new measurement of peak memory, if the system supports it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # elsewhere than on Linux the peak since the start of the process is reported
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Peak memory in bytes: the GPU's peak allocation, or the process's peak resident set size."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
