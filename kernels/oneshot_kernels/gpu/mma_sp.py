"""The sparse tensor-core instruction as a Triton function, and an emulation of it for the interpreter.

    WARPS     warps in the program; every tensor here is 1-D, (WARPS * 128,): warp, lane, register
    g, q      lane = 4g + q (see fragment.py for the complete map)
    STEP      which of the eight k-blocks of one metadata load, 0..7: word STEP // 2, selector STEP % 2
    pair      int32 with two neighbouring 16-bit floats, the first in the low half

Triton has no sparse dot. But `tl.inline_asm_elementwise(pack=4)` passes four consecutive elements of every operand to
each instance of the assembly, and with four elements per lane and 32 lanes per warp these are exactly one lane's
registers of one `mma.sp.m16n8k32`. Triton does not guarantee that mapping: a test reads it from the compiled layout,
and selftest.py checks it on the GPU itself.

A (weight):  register 2h + r of lane 4g + q = chunk of row g + 8r, group q + 4h
B (x):       register r of lane 4g + q      = pair at columns 8r + 2q, 8r + 2q + 1 of token g
C, D:        register 2r + j of lane 4g + q = row g + 8r, token 2q + j
"""

import os

import triton
import triton.language as tl

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True if kernels run on the CPU under Triton's interpreter. Fixed when the kernels are defined, as in Triton."""

_OPERANDS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r,r,r,r")


@triton.constexpr_function
def _instruction(step, fp16):
    """PTX of one k-block. Metadata word and selector are compile-time constants, so they cost no instruction."""
    kind = "f16" if fp16 else "bf16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}},{{$4,$5,$6,$7}},{{$8,$9,$10,$11}},{{$12,$13,$14,$15}},${16 + step // 2},0x{step % 2};"
    )


@triton.jit
def mma_sp(a, b, c, metadata, STEP: tl.constexpr, WARPS: tl.constexpr, FP16: tl.constexpr, INTERP: tl.constexpr):
    """c + A·B for one k-block per warp. a, b, metadata int32, c float32, all (WARPS * 128,); returns float32."""
    if INTERP:
        return _emulate(a, b, c, metadata, STEP, WARPS, FP16)
    else:
        ASM: tl.constexpr = _instruction(STEP, FP16)
        return tl.inline_asm_elementwise(ASM, _OPERANDS, [a, b, c, metadata], dtype=tl.float32, is_pure=True, pack=4)


@triton.constexpr_function
def _load_b(step):
    """PTX: a lane's four pairs of x for k-block `step`. Pairs 4r + q are 16 bytes apart, k-blocks 64."""
    return " ".join(f"ld.global.nc.b32 ${r}, [$4+{64 * step + 16 * r}];" for r in range(4))


@triton.jit
def load_b(pointer, STEP: tl.constexpr, WARPS: tl.constexpr, INTERP: tl.constexpr):
    """Load a B fragment directly from global memory (L1) into registers -> int32 (WARPS * 128,).

    pointer: (WARPS * 128,), to int32: the lane's first pair in the 256-column block, the same for its four registers.
    In assembly, because Triton's pipeliner would stage x in shared memory like the weights, where at 8 tokens it takes
    as much space as they do. All programs on a multiprocessor read the same x, so it is in L1.
    """
    if INTERP:
        return tl.load(pointer + 16 * STEP + 4 * (tl.arange(0, WARPS * 128) % 4))
    else:
        ASM: tl.constexpr = _load_b(STEP)
        address = pointer.to(tl.int64)
        return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,l,l,l,l", [address], dtype=tl.int32, is_pure=True, pack=4)


@triton.jit
def split_pair(pair, FP16: tl.constexpr):
    """int32 pair -> (low, high) as float32."""
    if FP16:
        low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:  # a bfloat16 is the upper half of a float32
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def join_pair(low, high, FP16: tl.constexpr, INTERP: tl.constexpr):
    """(low, high) float32 -> int32 pair, rounded to nearest even."""
    if FP16:
        low16 = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        high16 = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    elif INTERP:  # the interpreter truncates float32 -> bfloat16; round by hand
        low16 = low.to(tl.int32, bitcast=True)
        low16 = (low16 + 0x7FFF + ((low16 >> 16) & 1)) >> 16
        high16 = high.to(tl.int32, bitcast=True)
        high16 = (high16 + 0x7FFF + ((high16 >> 16) & 1)) >> 16
    else:
        low16 = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        high16 = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return (low16 & 0xFFFF) | (high16 << 16)


@triton.jit
def _emulate(a, b, c, metadata, STEP: tl.constexpr, WARPS: tl.constexpr, FP16: tl.constexpr):
    """`mma_sp` in plain Triton, following the fragment map above: expands the 16 x 32 tile and multiplies in float32.

    For the interpreter only. It can show that packing, addresses, masks and reductions are right, but not that the
    hardware agrees with the map.
    """
    a = tl.reshape(a, (WARPS, 8, 4, 2, 2))  # g q h r
    b = tl.reshape(b, (WARPS, 8, 4, 4))  # token q r
    words = tl.reshape(metadata, (WARPS, 8, 2, 2, 4))  # g selector h word

    selector = tl.arange(0, 2)[None, None, :, None, None] == STEP % 2
    word = tl.arange(0, 4)[None, None, None, None, :] == STEP // 2
    half = tl.sum(tl.sum(tl.where(selector & word, words, 0), axis=4), axis=2)  # g h: 16 columns each

    # rows (r, g), groups (h, q)
    first, second = split_pair(tl.reshape(tl.permute(a, (0, 4, 1, 3, 2)), (WARPS, 16, 8, 1)), FP16)
    r = tl.arange(0, 2)[None, :, None, None, None]
    q = tl.arange(0, 4)[None, None, None, None, :]
    code = tl.reshape((tl.reshape(half, (WARPS, 1, 8, 2, 1)) >> (16 * r + 4 * q)) & 15, (WARPS, 16, 8, 1))
    position = tl.arange(0, 4)[None, None, None, :]
    weight = tl.where((code & 3) == position, first, 0.0) + tl.where((code >> 2) == position, second, 0.0)

    low, high = split_pair(b, FP16)  # -> token, columns (r, q, half of the pair)
    x = tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2, 4)), (WARPS, 8, 32))
    product = tl.dot(tl.reshape(weight, (WARPS, 16, 32)), tl.permute(x, (0, 2, 1)), input_precision="ieee")
    product = tl.permute(tl.reshape(product, (WARPS, 2, 8, 4, 2)), (0, 2, 3, 1, 4))  # r g q j -> g q r j
    return c + tl.reshape(product, (WARPS * 128,))
