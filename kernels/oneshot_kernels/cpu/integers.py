"""Linear layers with int8 or int4 weights for few tokens on a CPU, compiled: 2:4 and dense. For an output head, say.

    N, K   outputs, inputs      K'  K rounded up to 64      L, T   lanes, tiles ceil(N / L), as in layout.py

A weight is `scale · code`: int8 with a scale for each row and codes of 8 bits, int4 with one for each row and 64
columns (an fp16 number) and codes from -8 to 7. The input stays as it is (`plain`), or it is rounded too, to int8 with
one scale for each token and 64 columns, which is faster; sums are then exact within 64 columns. Many bfloat16 tokens
are faster as they are where there are tile registers (amx.h): from MANY on x is not rounded (`stays`). See codes.py.
There int4's scale · code is rounded to bfloat16 first; where torch's products take over (dispatch.py), int8's too.

    values   dense: bytes (T, steps, L, 4), a step being four columns, K'/4 in all. int8: the codes of a step. int4:
             codes + 8 of two steps, the first in the low half: half as many steps.
             2:4: bytes (T, K'/32, 1 + steps, L, 4): for 32 columns their indices, then four steps, each of the kept
             four of eight columns (int4: two). Byte 2h + s of an index has, for each of the four steps, two bits from
             2·step on: the position of kept weight s of the step's group h
    scale    int8: float32 (N,). int4: float16 (T, K'/64, L)
"""

import ctypes
import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import dispatch, reference
from . import library
from .codes import BLOCK, emulate, round_groups, round_rows, value
from .linear import TYPES, in_parts, threads_for

CPU = torch.device("cpu")
MANY = 65
"""Tokens, see above: from so many on unfolding a weight costs less than the scales of its sums."""


class IntegerWeight(NamedTuple):
    """A weight (N, K) = `shape` for `linear`, see above. bits: 8 or 4."""

    values: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    bits: int

    @property
    def sparse(self) -> bool:
        """Whether it is 2:4."""
        return self.values.ndim == 5

    def problem(self, tokens: int, dtype: torch.dtype, plain: bool) -> dispatch.Problem:
        """The Problem that `dispatch.choose` decides on, for this many tokens of a dtype. plain: as for `linear`."""
        rounds = not (plain or stays(tokens, dtype))
        return dispatch.Problem(tokens, *self.shape, dtype, CPU, False, threads=library.threads(), rounds=rounds,
                                form=f"int{self.bits}{' 2:4' * self.sparse}")


class IntegerLinear(nn.Module):
    """nn.Linear with an int8 or int4 weight, dense or 2:4, for inference on a CPU: y = x Wᵀ + bias.

    round_inputs: whether inputs are rounded to int8 too, which is faster (many may stay as they are, see `stays`). Its
    tensors are made for this machine and are in no state dict: save the model before.
    """

    def __init__(self, weight: IntegerWeight, bias: torch.Tensor | None, round_inputs: bool = False) -> None:
        super().__init__()
        self.round_inputs = round_inputs
        (self.out_features, self.in_features), self.bits = weight.shape, weight.bits
        for name, tensor in (("values", weight.values), ("scale", weight.scale), ("bias", bias)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_linear(cls, layer: nn.Linear, *, bits: int = 8, sparse: bool = False,
                    round_inputs: bool = False) -> "IntegerLinear":
        """Round a layer's weight to the nearest codes. bits: 8 or 4. sparse: as 2:4, which the weight must be.
        round_inputs: see the class.

        Raises ValueError for a weight that is not finite or not 2:4, and where nothing can be compiled.
        """
        if not available():
            raise ValueError(f"integer layers need the compiled kernels: {library.why('integers')}")
        bias = None if layer.bias is None else layer.bias.detach()
        rounded = round_rows(layer.weight.detach()) if bits == 8 else round_groups(layer.weight.detach())
        return cls(prepare(*rounded, bits=bits, sparse=sparse), bias, round_inputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N), in x's dtype."""
        plainly = type(x) is torch.Tensor and not (x.requires_grad and torch.is_grad_enabled())
        if plainly and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return compute(x, self.values, self.scale, self.bias, self.out_features, self.bits, not self.round_inputs)
        return torch.ops.oneshot_kernels.linear_integers(x, self.values, self.scale, self.bias, self.out_features,
                                                         self.bits, not self.round_inputs)

    @property
    def packed(self) -> IntegerWeight:
        """The weight."""
        return IntegerWeight(self.values, self.scale, (self.out_features, self.in_features), self.bits)

    def problem(self, tokens: int) -> dispatch.Problem:
        """The Problem that `dispatch.choose` decides on, for this many tokens of the bias' dtype, else of bfloat16."""
        dtype = torch.bfloat16 if self.bias is None else self.bias.dtype
        return self.packed.problem(tokens, dtype, not self.round_inputs)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K) as a dense matrix, scale · code rounded to a dtype."""
        out = torch.empty(self.out_features, self.in_features, dtype=dtype)
        return expand(self.packed, 0, out)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.values.device)  # the same numbers, whatever the model is cast to
        return self

    def extra_repr(self) -> str:
        """What print(model) shows."""
        form = "2:4" if self.values.ndim == 5 else "dense"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, int{self.bits} {form}" + (
            ", inputs in int8" if self.round_inputs else "")


def prepare(codes: torch.Tensor, scale: torch.Tensor, *, sparse: bool, bits: int = 8,
            lanes: int | None = None) -> IntegerWeight:
    """Put codes (N, K), int8, and their scales (of `round_rows` or `round_groups`) in the order of the kernel.

    lanes: those of another variant than the one that is loaded. Raises ValueError for sparse codes that are not 2:4,
    for int4 codes beyond -8 to 7, and for int4 scales that fp16 does not have.
    """
    (n, k), lanes = codes.shape, lanes or lanes_of()
    if bits == 4 and (bool(((codes < -8) | (codes > 7)).any()) or not torch.equal(scale.half().float(), scale.float())):
        raise ValueError("int4 wants codes from -8 to 7 and scales that are fp16 numbers (round_groups)")
    if sparse:
        values, metadata, _ = reference.pack(codes.float())  # small whole numbers: exact
        four = F.pad(values.to(torch.int8), (0, -k % BLOCK // 2, 0, -n % lanes))
        i = torch.stack((metadata & 15, metadata >> 4), -1).flatten(1)[:, : k // 4].int()
        i = F.pad(i, (0, -k % BLOCK // 4, 0, -n % lanes)).unflatten(1, (-1, 4, 2))  # (N', chunks, step, h)
        step = torch.arange(4, dtype=torch.int32).mul_(2)[:, None]
        first, second = (i & 3) << step, (i >> 2) << step
        byte = torch.stack((first, second), -1).sum(2).flatten(2).to(torch.uint8)  # (N', chunks, 2h + s)
        indices = byte.view(-1, lanes, byte.shape[1], 4).transpose(1, 2)[:, :, None]  # (T, chunks, 1, lanes, 4)
    else:
        four, indices = F.pad(codes, (0, -k % BLOCK, 0, -n % lanes)), None
    values = four.reshape(-1, lanes, four.shape[1] // 4, 4).transpose(1, 2)
    if bits == 4:
        halves = (values + 8).view(torch.uint8)
        values = (halves[:, ::2] | halves[:, 1::2] << 4).view(torch.int8)
    if indices is not None:
        values = torch.cat((indices.view(torch.int8), values.unflatten(1, (indices.shape[1], -1))), 2)
    values = library.huge_pages(values.contiguous())
    if bits == 8:
        return IntegerWeight(values, scale.float().contiguous(), (n, k), 8)
    scale = F.pad(scale.half(), (0, 0, 0, -n % lanes)).view(-1, lanes, scale.shape[1]).transpose(1, 2).contiguous()
    return IntegerWeight(values, scale, (n, k), 4)


def linear(x: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None = None,
           plain: bool = False) -> torch.Tensor:
    """x (M, K), contiguous -> (M, N) in x's dtype. plain: x is not rounded (nor if it `stays`). Nothing is checked."""
    plain = plain or stays(len(x), x.dtype)
    if plain and len(x) > 1 and dispatch.choose(weight.problem(len(x), x.dtype, plain)).path == "expand":
        return through_dense(x, weight, bias)
    return by_kernel(x, weight, bias, plain)


def by_kernel(x: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None = None,
              plain: bool = False) -> torch.Tensor:
    """`linear` by the compiled kernel. plain: x is not rounded."""
    n, k = weight.shape
    y = x.new_empty(x.shape[0], n)
    pointers = (None if t is None else t.data_ptr() for t in (x, *weight[:2], bias, y))
    threads = threads_for(len(x), n, k)
    if _library().linear_integers(*pointers, x.shape[0], n, k, TYPES[x.dtype], weight.bits, weight.sparse, plain,
                                  threads):
        raise RuntimeError(f"no memory for {x.shape[0]} tokens of {k} inputs")
    return y


def through_dense(x: torch.Tensor, weight: IntegerWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` of x as it is, for many tokens: `in_parts`, the weight in x's dtype."""
    return in_parts(x, weight.shape[0], lanes_of(), bias, functools.partial(expand, weight))


def expand(weight: IntegerWeight, first: int, out: torch.Tensor) -> torch.Tensor:
    """Write rows of a weight from `first` on, a multiple of the lanes, into out (rows, K), dense; returns it."""
    tile = first // lanes_of()
    values, scale = weight.values[tile:], weight.scale[first if weight.bits == 8 else tile :]
    _library().expand_integers(values.data_ptr(), scale.data_ptr(), out.data_ptr(), *out.shape, TYPES[out.dtype],
                               weight.bits, weight.sparse, library.threads())
    return out


def stays(tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens of a dtype are not rounded, asked or not. Only where `available`."""
    return tokens >= MANY and dtype == torch.bfloat16 and library.why("integers") == "amx"


def compute(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int,
            bits: int, plain: bool = False) -> torch.Tensor:
    """x (..., K) -> (..., n). plain: x is not rounded. Raises ValueError if the tensors do not fit together."""
    if {x.device.type, values.device.type, scale.device.type} != {"cpu"}:
        raise ValueError(f"int{bits} layer: x is on {x.device}, the weight on {values.device}; both must be on the CPU")
    k = x.shape[-1]
    blocks, lanes = -(-k // BLOCK), lanes_of()
    tiles = -(-n // lanes)
    shapes = ((tiles, 2 * bits * blocks, lanes, 4), (tiles, 2 * blocks, 1 + bits // 2, lanes, 4))  # dense, 2:4
    scales = (n,) if bits == 8 else (tiles, blocks, lanes)
    fits = tuple(values.shape) in shapes and tuple(scale.shape) == scales and x.dtype in TYPES and (
        bias is None or (tuple(bias.shape) == (n,) and bias.dtype == x.dtype))
    if not fits:
        raise ValueError(f"int{bits} layer: x {tuple(x.shape)} {x.dtype} and {n} outputs do not fit values "
                         f"{tuple(values.shape)} or the bias")
    flat = x.reshape(-1, k).contiguous()
    return linear(flat, IntegerWeight(values, scale, (n, k), bits), bias, plain).view(*x.shape[:-1], n)


_op = torch.library.custom_op("oneshot_kernels::linear_integers", compute, mutates_args=())


@_op.register_fake
def _(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, n: int,
      bits: int, plain: bool = False) -> torch.Tensor:
    """The shape and dtype of the result, for torch.compile."""
    return x.new_empty(*x.shape[:-1], n)


def available() -> bool:
    """Whether the library is there; compiles and tests it at the first call."""
    return _library() is not None


def lanes_of() -> int:
    """L. Only where `available`."""
    return _library().lanes()


def function() -> Any:
    """The compiled function itself, for step.cpp; None where there is none."""
    return None if _library() is None else _library().linear_integers


def _library() -> ctypes.CDLL | None:
    """The compiled library, or None."""
    return library.load("integers", _declare, _self_test)


def _declare(cdll: ctypes.CDLL) -> None:
    """The functions' argument types."""
    cdll.lanes.argtypes, cdll.lanes.restype = [], ctypes.c_int
    cdll.linear_integers.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 8
    cdll.linear_integers.restype = ctypes.c_int
    cdll.expand_integers.argtypes, cdll.expand_integers.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 6, None


def _self_test(cdll: ctypes.CDLL) -> str | None:
    """What is wrong on small products that go through every part of the code, or None."""
    generator = torch.Generator().manual_seed(0)
    n, k = 4 * cdll.lanes() + 3, 1068  # five tiles, and more than a panel's columns
    every, bias = torch.randn(70, k, generator=generator), torch.randn(n, generator=generator)
    for sparse, bits, plain, dtype in itertools.product((True, False), (8, 4), (False, True), TYPES):
        weight = torch.randn(n, k, generator=generator)
        if sparse:
            weight = reference.random_24(n, k, torch.float32, generator)
        codes, scale = round_rows(weight) if bits == 8 else round_groups(weight)
        made = prepare(codes, scale, sparse=sparse, bits=bits, lanes=cdll.lanes())
        for m in (1, 15, 70):
            x, b, y = every[:m].to(dtype), bias.to(dtype), torch.full((m, n), torch.nan, dtype=dtype)
            cdll.linear_integers(*(t.data_ptr() for t in (x, *made[:2], b, y)), m, n, k, TYPES[dtype], bits, sparse,
                                 plain, 2)
            error = reference.relative_error(y, emulate(x, codes, scale, b, plain))
            if not error <= max(1e-6, torch.finfo(dtype).eps):
                form = f"{'2:4' if sparse else 'dense'} int{bits} {dtype}{', x as it is' * plain}"
                return f"{form}, {m} tokens: relative error {error:.3g}"
        whole = torch.full((n, k), torch.nan)
        cdll.expand_integers(*(t.data_ptr() for t in (*made[:2], whole)), n, k, TYPES[whole.dtype], bits, sparse, 2)
        if not torch.equal(whole, value(codes, scale).float()):
            return f"expanding int{bits}{', 2:4' * sparse}"
    return None
