"""Linear layers with int8 weights for few tokens on a CPU, compiled: 2:4 and dense. For the output head, for instance.

    N, K   outputs, inputs      K'  K rounded up to 64      L, T   lanes, tiles ceil(N / L), as in layout.py

A weight is `scale · code`, one scale for each row, codes whole numbers up to 127. The input is rounded too, to int8
with one scale for each token and 64 columns; both are symmetric. Sums are exact within 64 columns, then float32.

    values   int8, dense (T, K'/4, L, 4): four columns of a row side by side; 2:4 (T, K'/8, L, 4): the four kept of 8
    indices  int32 (T, K'/32, L), 2:4 only: byte 2h + s of a word has, for each of four steps of eight columns, two bits
             from 2·step on: the position of kept weight s of the step's group h
"""

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import reference
from . import library
from .linear import SERIAL, TYPES

BLOCK = 64


class Int8Weight(NamedTuple):
    """A weight (N, K) = `shape` for `linear`; indices: None for a dense one. scale: float32 (N,)."""

    values: torch.Tensor
    indices: torch.Tensor | None
    scale: torch.Tensor
    shape: tuple[int, int]


class Int8Linear(nn.Module):
    """nn.Linear with an int8 weight, dense or 2:4, for inference on a CPU: y = x Wᵀ + bias, rounded as above.

    Its tensors are made for this machine and are in no state dict: save the model before.
    """

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        for name, tensor in (("values", weight.values), ("indices", weight.indices), ("scale", weight.scale),
                             ("bias", bias)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_linear(cls, layer: nn.Linear, *, sparse: bool = False) -> "Int8Linear":
        """Round a layer's weight to the nearest codes. sparse: as 2:4, which the weight must be.

        Raises ValueError for a weight that is not finite or not 2:4, and where nothing can be compiled.
        """
        if not available():
            raise ValueError(f"int8 layers need the compiled kernels: {library.why('int8')}")
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(prepare(*round_rows(layer.weight.detach()), sparse=sparse), bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N), in x's dtype."""
        return torch.ops.oneshot_kernels.linear_int8(x, self.values, self.indices, self.scale, self.bias,
                                                     self.out_features)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.values.device)  # float32, whatever the model is cast to
        return self

    def extra_repr(self) -> str:
        """What print(model) shows."""
        form = "dense" if self.indices is None else "2:4"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, int8 {form}"


def round_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale): int8 (N, K) and float32 (N,), the row's largest |w| / 127; the nearest codes, ties to even.

    Raises ValueError for a weight that is not finite.
    """
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise ValueError("a weight with NaN or infinity cannot be rounded to int8")
    scale = weight.abs().amax(1) / 127
    scale[scale == 0] = 1
    return (weight / scale[:, None]).round().to(torch.int8), scale


def prepare(codes: torch.Tensor, scale: torch.Tensor, *, sparse: bool, lanes: int | None = None) -> Int8Weight:
    """Put codes (N, K), int8, in the order of the kernel. Raises ValueError for sparse codes that are not 2:4.

    lanes: those of another variant than the one that is loaded.
    """
    (n, k), lanes = codes.shape, lanes or lanes_of()
    if sparse:
        values, metadata, _ = reference.pack(codes.float())  # small whole numbers: exact
        four = F.pad(values.to(torch.int8), (0, -k % BLOCK // 2, 0, -n % lanes))
        i = torch.stack((metadata & 15, metadata >> 4), -1).flatten(1)[:, : k // 4].int()
        i = F.pad(i, (0, -k % BLOCK // 4, 0, -n % lanes)).unflatten(1, (-1, 4, 2))  # (N', chunks, step, h)
        step = torch.arange(4, dtype=torch.int32).mul_(2)[:, None]
        first, second = (i & 3) << step, (i >> 2) << step
        byte = torch.stack((first, second), -1).sum(2).flatten(2).to(torch.uint8)  # (N', chunks, 2h + s)
        words = byte.contiguous().view(torch.int32).view(-1, lanes, byte.shape[1])
        indices = words.transpose(1, 2).contiguous()
    else:
        four, indices = F.pad(codes, (0, -k % BLOCK, 0, -n % lanes)), None
    values = four.reshape(-1, lanes, four.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return Int8Weight(library.huge_pages(values), indices, scale.float().contiguous(), (n, k))


def linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (M, K), contiguous -> (M, N) in x's dtype. Nothing is checked here."""
    n, k = weight.shape
    y = x.new_empty(x.shape[0], n)
    pointers = (None if t is None else t.data_ptr() for t in (x, *weight[:3], bias, y))
    threads = library.threads() if n * k >= SERIAL else 1
    if _library().linear_int8(*pointers, x.shape[0], n, k, TYPES[x.dtype], threads):
        raise RuntimeError(f"no memory for {x.shape[0]} tokens of {k} inputs")
    return y


@torch.library.custom_op("oneshot_kernels::linear_int8", mutates_args=())
def _op(x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor | None, scale: torch.Tensor,
        bias: torch.Tensor | None, n: int) -> torch.Tensor:
    """x (..., K) -> (..., n). Raises ValueError if the tensors do not fit together."""
    k = x.shape[-1]
    blocks, lanes = -(-k // BLOCK), lanes_of()
    shape = (-(-n // lanes), blocks * BLOCK // (4 if indices is None else 8), lanes, 4)
    fits = tuple(values.shape) == shape and tuple(scale.shape) == (n,) and x.dtype in TYPES and (
        bias is None or (tuple(bias.shape) == (n,) and bias.dtype == x.dtype)) and (
        indices is None or tuple(indices.shape) == (shape[0], 2 * blocks, lanes))
    if not fits:
        raise ValueError(f"int8 layer: x {tuple(x.shape)} {x.dtype} and {n} outputs do not fit values "
                         f"{tuple(values.shape)} or the bias")
    flat = x.reshape(-1, k).contiguous()
    return linear(flat, Int8Weight(values, indices, scale, (n, k)), bias).view(*x.shape[:-1], n)


@_op.register_fake
def _(x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor | None, scale: torch.Tensor,
      bias: torch.Tensor | None, n: int) -> torch.Tensor:
    """The shape and dtype of the result, for torch.compile."""
    return x.new_empty(*x.shape[:-1], n)


def available() -> bool:
    """Whether the library is there; compiles and tests it at the first call."""
    return _library() is not None


def lanes_of() -> int:
    """L. Only where `available`."""
    return _library().lanes()


def round_input(x: torch.Tensor) -> torch.Tensor:
    """x (M, K) as the kernel sees it, rounded to codes with a scale for each token and 64 columns; float64."""
    parts = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    most = parts.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # `127 / most` would be 127 times a rounded reciprocal
    rounded = (parts * torch.where(most > 0, inverse, 0)).round().double() * (most / 127).double()
    return rounded.flatten(1)[:, : x.shape[1]]


def emulate(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The reference, in float64: x (M, K), rounded as the kernel rounds it, times scale · codes (N, K) -> (M, N)."""
    return F.linear(round_input(x), codes.double() * scale.double()[:, None], None if bias is None else bias.double())


def _library() -> ctypes.CDLL | None:
    """The compiled library, or None."""
    return library.load("int8", _declare, _self_test)


def _declare(cdll: ctypes.CDLL) -> None:
    """The functions' argument types."""
    cdll.lanes.argtypes, cdll.lanes.restype = [], ctypes.c_int
    cdll.linear_int8.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 5
    cdll.linear_int8.restype = ctypes.c_int


def _self_test(cdll: ctypes.CDLL) -> str | None:
    """What is wrong on small products that go through every part of the code, or None."""
    generator = torch.Generator().manual_seed(0)
    n, k, m = 5 * cdll.lanes() + 3, 172, 15
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    for sparse in (True, False):
        weight = torch.randn(n, k, generator=generator)
        if sparse:
            weight = reference.random_24(n, k, torch.float32, generator)
        codes, scale = round_rows(weight)
        made, y = prepare(codes, scale, sparse=sparse, lanes=cdll.lanes()), torch.full((m, n), torch.nan)
        pointers = (None if t is None else t.data_ptr() for t in (x, *made[:3], bias, y))
        cdll.linear_int8(*pointers, m, n, k, TYPES[x.dtype], 2)
        error = reference.relative_error(y, emulate(x, codes, scale, bias))
        if not error <= 1e-6:
            return f"{'2:4' if sparse else 'dense'} int8: relative error {error:.3g}"
    return None
