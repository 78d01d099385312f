"""`Rounded24Linear`: nn.Linear with a packed 2:4 weight of int8 or int4 codes, as in a checkpoint.

    R, C   outputs, inputs (C divisible by 4)      G   groups of columns, each with a scale      b   bits a code

A weight is `scale · code`. It is stored in three row-major tensors, which take 0.3125 (int8) or 0.1875 (int4) of the
dense bytes at 16 bits a weight, and the scales:

    weight     codes of the two kept weights of every four columns, in the order of reference.py. int8: (R, C/2) int8.
               int4: (R, C/4) uint8, two codes + 8 a byte, the first in the low half
    metadata   (R, ceil(C/8)) uint8, as in reference.py
    scales     (R, G) int16, the bits of float16 numbers: what casts a model to another dtype leaves them alone

`forward` multiplies by exactly these weights. `compiled` gives the layer of cpu/integers.py, which computes with the
codes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import reference
from .cpu import integers


class Rounded24Linear(nn.Module):
    """y = x Wᵀ + bias for a 2:4 W = scale · code, on any device, for inference.

    group: columns that share a scale; None: the whole row. dtype: the one that W is rounded to before it is used.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, bits: int, group: int | None,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """An uninitialised layer, to be loaded from a checkpoint.

        Raises ValueError for a number of inputs that is not divisible by 4, and for other bits than 8 and 4.
        """
        super().__init__()
        if in_features % 4 or bits not in (4, 8):
            raise ValueError(f"2:4 integers need in_features divisible by 4, 8 or 4 bits; got {in_features} and {bits}")
        self.in_features, self.out_features, self.bits, self.group = in_features, out_features, bits, group
        self.dtype = dtype or torch.get_default_dtype()
        width = in_features // (2 if bits == 8 else 4)
        codes = torch.empty(out_features, width, dtype=torch.int8 if bits == 8 else torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        metadata = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("metadata", metadata)
        self.register_buffer("scales", torch.zeros(out_features, self.groups, dtype=torch.int16, device=device))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @classmethod
    def from_codes(cls, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None, *, bits: int,
                   group: int | None, dtype: torch.dtype) -> "Rounded24Linear":
        """A layer of codes (R, C), whole numbers in 2:4, and scales (R, G), float16 numbers.

        Raises ValueError naming row and columns of codes that are not 2:4.
        """
        R, C = codes.shape
        layer = cls(C, R, bias is not None, bits=bits, group=group, device="meta", dtype=dtype)
        values, layer.metadata, _ = reference.pack(codes.float())
        layer.weight = nn.Parameter(nibbles(values) if bits == 4 else values.to(torch.int8), requires_grad=False)
        layer.scales = scales.half().contiguous().view(torch.int16)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    @property
    def rows(self) -> int:
        """R, as a Sparse24Linear has it."""
        return self.out_features

    @property
    def packed(self) -> reference.Packed:
        """The codes as they are stored, and the metadata."""
        return reference.Packed(self.weight.data, self.metadata, (self.out_features, self.in_features))

    @property
    def groups(self) -> int:
        """G."""
        return -(-self.in_features // (self.group or self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, metadata and scales."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.metadata, self.scales))

    def codes(self) -> torch.Tensor:
        """(R, C), whole numbers in float32. Raises ValueError for damaged metadata."""
        return reference.unpack(self._values(), self.metadata)

    def half_scales(self) -> torch.Tensor:
        """(R, G), float16."""
        return self.scales.view(torch.float16)

    def dense(self) -> torch.Tensor:
        """The weight (R, C) in its dtype: scale · code, which float32 holds exactly, rounded once."""
        wide = self.half_scales().float().repeat_interleave(self.group or self.in_features, 1)[:, : self.in_features]
        return (self.codes() * wide).to(self.dtype)

    def check(self) -> None:
        """Raise ValueError for damaged metadata."""
        reference.check(self._values(), self.metadata)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., C) -> (..., R)."""
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def compiled(self, round_inputs: bool = False) -> integers.IntegerLinear:
        """The compiled layer with the same codes and scales (cpu/integers.py). round_inputs: to int8, which is faster.

        Raises ValueError where nothing can be compiled, and for other groups than it knows: int8 by row, int4 by 64.
        """
        if not self.can_compile():
            raise ValueError(f"int{self.bits} with groups of {self.group or 'a whole row'}: no compiled kernel here")
        scale = self.half_scales().float()
        weight = integers.prepare(self.codes().to(torch.int8), scale[:, 0] if self.bits == 8 else scale, sparse=True,
                                  bits=self.bits)
        return integers.IntegerLinear(weight, self.bias, round_inputs)

    def can_compile(self) -> bool:
        """Whether there is a compiled kernel for this layer on this machine."""
        known = (self.bits, self.group) in ((8, None), (4, integers.BLOCK)) or (
            self.bits == 4 and self.groups == 1 and self.in_features <= integers.BLOCK)
        return known and self.weight.device.type == "cpu" and integers.available()

    def _values(self) -> torch.Tensor:
        """The codes of the kept weights, (R, C/2), float32."""
        if self.bits == 8:
            return self.weight.data.float()
        packed = self.weight.data
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1).float() - 8

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, 2:4 int{self.bits}:"
                f"{self.group or 'row'}")


def nibbles(values: torch.Tensor) -> torch.Tensor:
    """(R, n/2) uint8 of whole numbers (R, n) from -8 to 7, n even: the first of two + 8 in the low half of a byte."""
    shifted = (values + 8).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4
