"""What the same bytes would buy without pruning: plain round-to-nearest (RTN) integers for the same linears.

A pruned model's honest rival is not the dense one but a quantised one of equal size. No data, no search: each row is
cut into groups of 128 inputs (the last may be narrower), and a group shares one float16 scale. Symmetric: no offset.

    b        bits of a code; the row of the table is called rtn, its pattern int<b>
    s        a group's scale, max|w| / ((2^b - 1) / 2), rounded to float16
    code     round(w / s), at least -2^(b-1), at most 2^(b-1) - 1
    bytes    R·C·b/8 + 2·R·ceil(C/128)

Simulated: s·code is written back, rounded to the stored dtype, as kernels that compute in that dtype see it.
"""

import torch

from .. import models
from ..prune.patterns import Dense, NM, parse

METHOD = "rtn"
GROUP = 128
BITS = (8, 4)  # always shown; beside them the width of equal bytes


def round_to_nearest(W, bits):
    """(Ŵ, groups whose scale vanished in float16 so that they became zero) for W (R, C), float32 or float64."""
    out, lost = torch.zeros_like(W), 0
    for part, result in zip(W.split(GROUP, dim=1), out.split(GROUP, dim=1), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        s = (largest / ((2**bits - 1) / 2)).half().to(W.dtype)
        code = (part / s).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        result.copy_((s * code).where(s > 0, 0.0))
        lost += int(((s == 0) & (largest > 0)).sum())
    return out, lost


@torch.no_grad()
def quantise(model, pattern):
    """Round every prunable linear of a model at home, in place; warnings. pattern: "int8", any width from 2 to 16.

    Raises ValueError naming the linear that does not fit float16 scales.
    """
    bits, warnings = bits_of(pattern), []
    name, block_list = models.blocks(model)
    for b, block in enumerate(block_list):
        for weight in models.linears(block)[0]:
            W, lost = round_to_nearest(weight.get(), bits)
            if not torch.isfinite(W.sum()):
                raise ValueError(f"{name}.{b}.{weight.name}: its weights are too large for the float16 scales of "
                                 f"{pattern}")
            weight.set(W)
            if lost:
                warnings.append(f"{name}.{b}.{weight.name}: {lost} groups became zero, their float16 scale vanished")
    return warnings


def bits_of(pattern):
    """8 of "int8"."""
    bits = int(pattern.removeprefix("int"))
    assert 2 <= bits <= 16, pattern
    return bits


# ---------------------------------------------------------------- bytes

def stored_bytes(pattern, R, C, itemsize):
    """Bytes of an (R, C) weight: as `Pattern.bytes` has it, and int<b> with a float16 scale for each group."""
    if isinstance(pattern, str):
        return -(-R * C * bits_of(pattern) // 8) + 2 * R * -(-C // GROUP)
    return pattern.bytes(R, C, itemsize)


def model_bytes(model, rows, rest="dense"):
    """{"stored", "dense"}: bytes of all prunable linears, as the layers' patterns let them be stored, and dense.

    rows: the record's layer rows. rest: what a linear without a row is, "dense" or an int<b>.
    """
    found = {row["name"]: parse(row["pattern"], row["group"]) for row in rows}
    stored = dense = 0
    rest = Dense() if rest == "dense" else rest
    name, block_list = models.blocks(model)
    for b, block in enumerate(block_list):
        for weight in models.linears(block)[0]:
            own = found.get(f"{name}.{b}.{weight.name}", rest)
            stored += stored_bytes(own, *weight.shape, weight.stored.itemsize)
            dense += stored_bytes(Dense(), *weight.shape, weight.stored.itemsize)
    return {"stored": stored, "dense": dense}


def equal_bits(pattern):
    """The widest codes that, with their scales, take no more bytes than the pattern at 16 bits a weight; None below 2.

    2:4 and 0.5 come to 9 bits a weight, so 8 with 1/8 for the scales.
    """
    C = GROUP * (pattern.m if isinstance(pattern, NM) else 100)
    bits = next((b for b in range(16, 1, -1) if stored_bytes(f"int{b}", 1, C, 2) <= stored_bytes(pattern, 1, C, 2)),
                None)
    return None if isinstance(pattern, Dense) else bits


def widths(pattern_texts):
    """The int<b> rows to show beside these patterns, widest first."""
    equal = {equal_bits(parse(text)) for text in pattern_texts} - {None}
    return [f"int{b}" for b in sorted({*BITS, *equal}, reverse=True)]
