"""Compile kernels for NVIDIA GPUs without one, and read facts off the machine code. A program, not a test.

    python tests/kernels/codegen.py sm_90 sm_80

prints one JSON line per variant: all of them for sm_90, the first of each kernel for the others.
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
from oneshot_kernels import decode as decode_module
from oneshot_kernels import expand as expand_module
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


def compile_kernel(
    kernel, signature: dict, constants: dict, capability: int, warps: int, aligned_sizes: tuple[str, ...]
):
    """Compile as a launch would: 16-byte aligned pointers, `aligned_sizes` divisible by 16."""
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in aligned_sizes]
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def facts(compiled) -> dict:
    """Instruction counts, registers, spills, and the layout of every inline-assembly tensor."""
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


def decode_variant(capability: int, name: str) -> dict:
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
        decode_module._decode_kernel, signature, constants, capability, config.warps, aligned_sizes=()
    )
    return {"warps": config.warps, "stages": config.stages, **facts(compiled)}


def matmul_variant(capability: int, name: str) -> dict:
    """Facts about the middle kernel in one of the variants of `MATMUL`."""
    config = expand_module.default_config(*MATMUL[name])
    words = dict.fromkeys(("values_ptr", "metadata_ptr"), "*i32")
    floats = dict.fromkeys(("x_ptr", "bias_ptr", "residual_ptr", "y_ptr"), "*bf16")
    sizes = dict.fromkeys(("M", "N", "NT", "K", "KB"), "i32")
    constants = {"BM": config.tokens, "BN": config.rows, "BK": config.columns, "STAGES": config.stages}
    constants |= {"SPLIT": 1, "HAS_BIAS": True, "HAS_RESIDUAL": True, "FP16": False, "INTERP": False}
    signature = {**words, **floats, **sizes}
    compiled = compile_kernel(
        expand_module._matmul_kernel, signature, constants, capability, config.warps, aligned_sizes=("N", "K")
    )
    return facts(compiled)


def expand_variant(capability: int, _name: str) -> dict:
    """Facts about scratch expansion."""
    signature = {"values_ptr": "*i32", "metadata_ptr": "*i32", "w_ptr": "*i16"}
    signature |= dict.fromkeys(("N", "NT", "K", "KB"), "i32")
    constants = {"BN": 32, "BK": 128}
    return facts(
        compile_kernel(expand_module._expand_kernel, signature, constants, capability, 4, aligned_sizes=("N", "K"))
    )


def main(*architectures: str) -> None:
    """Print the facts of every variant (sm_90), or of each kernel's first (others)."""
    kernels = [(decode_variant, DECODE), (matmul_variant, MATMUL), (expand_variant, {"scratch": None})]
    for architecture in architectures:
        for variant, names in kernels:
            for name in names if architecture == "sm_90" else list(names)[:1]:
                row = variant(int(architecture.removeprefix("sm_")), name)
                print(json.dumps({"architecture": architecture, "name": name, **row}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
