"""Compile kernels for NVIDIA GPUs without one, and read facts off the machine code. A program, not a test.

    python tests/kernels/codegen.py sm_90 sm_80

prints one JSON line per variant: all of them and the bench's own kernels for sm_90, the first of each kernel for the
others, and what AMD gets for gfx942.
Must run without TRITON_INTERPRET (a kernel defined under the interpreter cannot be compiled), hence a
process of its own. Needs only Triton's wheel, which brings ptxas and cuobjdump.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import gpu_checks as checks
import gpu_measure as measure
from oneshot_kernels.gpu import column_loop as loop_module
from oneshot_kernels.gpu import decode as decode_module
from oneshot_kernels.gpu import expand as expand_module
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

_FLAGS = dict.fromkeys(("SWIGLU", "NORM", "HAS_BIAS", "HAS_RESIDUAL", "FP16", "INTERP"), False)
_FLAGS |= dict.fromkeys(("WHOLE_K", "EVEN_WARPS", "DIRECT_X"), True)
_RAGGED = {"WHOLE_K": False, "EVEN_WARPS": False, "DIRECT_X": False}
# name -> (constexprs that differ from _FLAGS, tokens and K that pick decode.default_config)
DECODE = {
    "decode, 8 tokens": ({"HAS_BIAS": True, "HAS_RESIDUAL": True}, 8, 4096),
    "decode, 32 tokens, ragged K, float16": ({**_RAGGED, "FP16": True}, 32, 172),
    "decode, norm and swiglu": ({"NORM": True, "SWIGLU": True}, 8, 4096),
    "decode, 64 tokens": ({}, 64, 4096),
}
# name -> (tokens, N, K) that pick expand.default_config
MATMUL = {"middle, 512 tokens": (512, 28672, 4096)}


# name -> constexprs that differ from those of a given mask of 128 columns
COLUMN_LOOP = {"column loop, 2:4": {"N": 2, "M": 4},
               "column loop, 2:4 and codes": {"N": 2, "M": 4, "GRID": True, "CODES": True},
               "column loop, 256 columns and scales": {"B": 256, "GRID": True}}


def compile_kernel(
    kernel, signature: dict, constants: dict, architecture: str, warps: int, aligned_sizes: tuple[str, ...] = ()
):
    """Compile as a launch would: 16-byte aligned pointers, `aligned_sizes` divisible by 16."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in aligned_sizes]
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options={"num_warps": warps})


def facts(compiled) -> dict:
    """Instruction counts, registers, spills, and the layout of every inline-assembly tensor."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        scratch = int(re.search(r"ScratchSize: (\d+)", code).group(1))
        return {"spills": scratch, "shared": compiled.metadata.shared, "tensor_core": code.count("v_mfma_")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(flag):
            return subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout

        sass, usage = dump("-sass"), dump("-res-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ttgir = compiled.asm["ttgir"]
    asm_layouts = set(re.findall(r"elementwise_inline_asm.*?-> tensor<\d+xf32, (#\w+)>", ttgir))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "hmma_sp": len(re.findall(r"\bHMMA\.SP\.16832", sass)),
        "tensor_core": len(re.findall(r"\b(?:HMMA|HGMMA)\.", sass)),
        "copies_16_bytes": len(re.findall(r"\bLDGSTS\.E\.[\w.]*128\b", sass)),
        "copies": len(re.findall(r"\bLDGSTS\.", sass)),
        "loads_16_bytes": len(re.findall(r"\bLDG\.E[\w.]*\.128\b", sass)),
        "asm_layouts": [re.search(re.escape(name) + r" = (.*)", ttgir).group(1) for name in sorted(asm_layouts)],
    }


def decode_variant(architecture: str, name: str) -> dict:
    """Facts about the decode kernel in one of the variants of `DECODE`."""
    constants, tokens, k = DECODE[name]
    config = decode_module.default_config(tokens, k, constants.get("SWIGLU", False))
    float_type = "*fp16" if constants.get("FP16") else "*bf16"
    words = dict.fromkeys(("values_ptr", "metadata_ptr", "x_ptr", "gain_ptr"), "*i32")
    floats = dict.fromkeys(("bias_ptr", "residual_ptr", "y_ptr"), float_type)
    sizes = dict.fromkeys(("M", "N", "NT", "K", "KB8"), "i32")
    constants = {**_FLAGS, "T": -(-tokens // 8), "R": config.row_tiles, **constants}
    constants |= {"WARPS": config.warps, "STAGES": config.stages}
    signature = {**words, **floats, **sizes, "eps": "fp32"}
    compiled = compile_kernel(
        decode_module._decode_kernel, signature, constants, architecture, config.warps
    )
    return {"warps": config.warps, "stages": config.stages, **facts(compiled)}


def matmul_variant(architecture: str, name: str) -> dict:
    """Facts about the middle kernel in one of the variants of `MATMUL`."""
    config = expand_module.default_config(*MATMUL[name])
    words = dict.fromkeys(("values_ptr", "metadata_ptr"), "*i32")
    floats = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "y_ptr"), "*bf16")
    sizes = dict.fromkeys(("M", "N", "NT", "K", "KB"), "i32")
    constants = {"BM": config.tokens, "BN": config.rows, "BK": config.columns, "STAGES": config.stages}
    constants |= {"SPLIT": 1, "HAS_BIAS": True, "HAS_RESIDUAL": True, "FP16": False, "INTERP": False}
    signature = {**words, **floats, **sizes}
    compiled = compile_kernel(
        expand_module._matmul_kernel, signature, constants, architecture, config.warps, aligned_sizes=("N", "K")
    )
    return facts(compiled)


def expand_variant(architecture: str, _name: str) -> dict:
    """Facts about scratch expansion."""
    signature = {"values_ptr": "*i32", "metadata_ptr": "*i32", "w_ptr": "*i16"}
    signature |= dict.fromkeys(("N", "NT", "K", "KB"), "i32")
    constants = {"BN": 32, "BK": 128}
    return facts(
        compile_kernel(expand_module._expand_kernel, signature, constants, architecture, 4, aligned_sizes=("N", "K"))
    )


def column_loop_variant(architecture: str, name: str) -> dict:
    """Facts about the column loop in one of the variants of `COLUMN_LOOP`."""
    floats = dict.fromkeys(("W_ptr", "U_ptr", "scale_ptr"), "*fp32")
    bytes_ = dict.fromkeys(("mask_ptr", "codes_ptr"), "*i8")
    sizes = dict.fromkeys(("b", "R", "width"), "i32") | dict.fromkeys(("low", "high"), "fp32")
    constants = {"B": 128, "BR": loop_module.ROWS, "N": 0, "M": 0, "GRID": False, "CODES": False, **COLUMN_LOOP[name]}
    return facts(compile_kernel(loop_module._kernel, {**floats, **bytes_, **sizes}, constants, architecture,
                                loop_module.warps(constants["B"])))


def bench_variant(architecture: str, name: str) -> dict:
    """Facts about a kernel of scripts/bench/gpu.py: what a first GPU session runs before anything else."""
    kernel, signature, constants, warps = {
        "bench: fragment map": (
            checks.one_instruction,
            {"a_ptr": "*i32", "b_ptr": "*i32", "metadata_ptr": "*i32", "c_ptr": "*fp32"},
            {"STEP": 3, "FP16": False, "INTERP": False},
            1,
        ),
        "bench: mma.sp rate": (
            measure.mma_sp_rate,
            {"a_ptr": "*i32", "c_ptr": "*fp32", "ITERATIONS": "i32"},
            {"WARPS": 8, "INTERP": False},
            8,
        ),
        "bench: read": (measure.read, {"x_ptr": "*i32", "sum_ptr": "*i32"}, {"BLOCK": 4096, "BLOCKS": 8}, 8),
    }[name]
    return {"warps": warps, **facts(compile_kernel(kernel, signature, constants, architecture, warps))}


BENCH = ("bench: fragment map", "bench: mma.sp rate", "bench: read")


def main(*architectures: str) -> None:
    """Print the facts of every variant (sm_90), of each kernel's first (others), or of the portable ones (AMD)."""
    portable = [(matmul_variant, MATMUL), (expand_variant, {"scratch": None}), (column_loop_variant, COLUMN_LOOP)]
    for architecture in architectures:
        kernels = portable if architecture.startswith("gfx") else [(decode_variant, DECODE), *portable]
        if architecture == "sm_90":
            kernels.append((bench_variant, BENCH))
        for variant, names in kernels:
            for name in names if architecture == "sm_90" else list(names)[:1]:
                row = variant(architecture, name)
                print(json.dumps({"architecture": architecture, "name": name, **row}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
