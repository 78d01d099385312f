"""What runs on this machine: python -m oneshot_kernels.selftest

Compiles what has to be compiled (ten seconds, once), tests every variant that this CPU runs, and says what a 2:4 layer
will use. Exit code 1 if anything computes wrong results; that a part cannot run here is no fault.
"""

import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from . import Sparse24Linear, dispatch, explain, reference
from .cpu import bandwidth, build, column_loop, integers, library, linear, step

LIBRARIES: dict[str, ModuleType] = {"linear": linear, "integers": integers, "step": step, "column_loop": column_loop,
                                    "bandwidth": bandwidth}


def on_cpu() -> Iterator[tuple[str, bool]]:
    """(a line, whether it is a fault) for every variant of every library."""
    for name, module in LIBRARIES.items():
        try:
            for variant, cdll in library.compiled(name):
                module._declare(cdll)
                fault = module._self_test(cdll)
                yield f"CPU, {name}, {variant}: {fault or 'right'}", fault is not None
        except (build.Unavailable, OSError) as error:
            yield f"CPU, {name}: not here ({error})", False


def on_gpu() -> Iterator[tuple[str, bool]]:
    """The same for a GPU."""
    if not torch.cuda.is_available() or dispatch.triton is None:
        yield f"GPU: not here ({'no CUDA device' if dispatch.triton else 'no Triton'})", False
        return
    from .gpu import decode, selftest

    for tokens in (1, 16, 64):
        device = torch.device("cuda", torch.cuda.current_device())
        config = decode.default_config(tokens, 4096)
        error = selftest.measure(selftest.variant(config, tokens, 4096, torch.bfloat16, device, False, False))
        wrong = not error <= selftest.LIMIT
        yield f"GPU, decode, {tokens} tokens: {'WRONG' if wrong else 'right'} (relative error {error:.2g})", wrong


def main() -> int:
    """Print all lines, then what layers use. Exit code."""
    faults = 0
    for line, fault in (*on_cpu(), *on_gpu()):
        print(line, flush=True)
        faults += fault
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.bfloat16, torch.float32):
        weight = reference.random_24(2048, 2048, dtype, torch.Generator().manual_seed(0)).to(device)
        layer = Sparse24Linear.from_packed(*reference.pack(weight)[:2])
        for tokens in (1, 64, 1024):
            print(explain(layer, tokens), flush=True)
    for bits in (8, 4) if device == "cpu" and integers.available() else ():
        dense = torch.nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16)
        dense.weight.data = weight.bfloat16()
        layer = integers.IntegerLinear.from_linear(dense, bits=bits, sparse=True)
        for tokens in (1, 64, 1024):
            print(explain(layer, tokens), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
