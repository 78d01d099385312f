"""One token through a Llama-like model by one compiled call: step.cpp, and what it is told of a model."""

import ctypes
from typing import Any

import torch

from .. import reference
from . import library

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


class Linear(ctypes.Structure):
    """A weight as step.cpp sees it."""

    _fields_ = [*((name, POINTER) for name in ("values", "indices", "scale", "bias")),
                *((name, NUMBER) for name in ("N", "K", "form"))]


class Block(ctypes.Structure):
    """A transformer block, likewise, with its part of the cache."""

    _fields_ = [("qkv", Linear * 3), ("o", Linear), ("gate_up", Linear * 2), ("down", Linear),
                *((name, POINTER) for name in ("before", "after", "q_norm", "k_norm", "keys", "cached"))]


class Model(ctypes.Structure):
    """The whole model, likewise."""

    _fields_ = [("blocks", ctypes.POINTER(Block)),
                *((name, NUMBER) for name in ("count", "hidden", "heads", "kv_heads", "head_dim", "mlp", "type",
                                              "threads")),
                ("eps", ctypes.c_double), ("scaling", ctypes.c_double),
                *((name, POINTER) for name in ("cosines", "sines", "norm")), ("head", Linear),
                ("floats", POINTER), ("integers", POINTER)]


def run(model: Model, embedding: torch.Tensor, position: int, capacity: int, logits: torch.Tensor) -> None:
    """Fill `logits` (V,) for the token whose embedding (H,) this is; its keys and values go into the model's caches.

    position: the number of tokens before it. capacity: for how many the caches have room. Nothing is checked here.
    """
    if _library().step(ctypes.byref(model), embedding.data_ptr(), position, capacity, logits.data_ptr()):
        raise RuntimeError(f"no memory for one token behind {position} others")


def available() -> bool:
    """Whether the library is there; compiles and tests it at the first call."""
    return _library() is not None


def address(function: Any) -> int | None:
    """Where a compiled function begins; None without one."""
    return None if function is None else ctypes.cast(function, POINTER).value


def _library() -> ctypes.CDLL | None:
    """The compiled library, or None."""
    return library.load("step", _declare, _self_test)


def _declare(cdll: ctypes.CDLL) -> None:
    """The functions' argument types."""
    cdll.step.argtypes, cdll.step.restype = [POINTER, POINTER, NUMBER, NUMBER, POINTER], ctypes.c_int


@torch.no_grad()
def _self_test(cdll: ctypes.CDLL) -> str | None:
    """What is wrong with three tokens through two blocks of dense rows, or None."""
    generator, heads, groups, size = torch.Generator().manual_seed(0), 4, 2, 20

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    shapes = {"q": (80, 37), "k": (40, 37), "v": (40, 37), "o": (37, 80), "gate": (45, 37), "up": (45, 37),
              "down": (37, 45), "before": (37,), "after": (37,), "q_norm": (20,), "k_norm": (20,)}
    blocks = [{name: random(*shape) for name, shape in shapes.items()} for _ in range(2)]
    norm, head, cosines, sines = random(37), random(51, 37), random(3, size), random(3, size)
    caches = [[torch.zeros(groups, 3, size) for _ in range(2)] for _ in blocks]
    structs = (Block * 2)(*[
        Block((Linear * 3)(*[_rows(b[name]) for name in "qkv"]), _rows(b["o"]),
              (Linear * 2)(_rows(b["gate"]), _rows(b["up"])), _rows(b["down"]),
              *[b[name].data_ptr() for name in ("before", "after", "q_norm", "k_norm")], *[t.data_ptr() for t in own])
        for b, own in zip(blocks, caches, strict=True)])
    model = Model(structs, 2, 37, heads, groups, size, 45, 0, 2, 1e-5, 0.3, cosines.data_ptr(), sines.data_ptr(),
                  norm.data_ptr(), _rows(head))
    past = [None, None]
    for t in range(3):
        x, logits = random(37), torch.full((51,), torch.nan)
        cdll.step(ctypes.byref(model), x.data_ptr(), t, 3, logits.data_ptr())
        want = reference.llama_token(x, blocks, past, (cosines[t], sines[t]), heads=heads, eps=1e-5, scaling=0.3)
        want = reference.rms_norm(want, norm.double(), 1e-5) @ head.double().T
        error = reference.relative_error(logits, want)
        if not error <= 1e-5:
            return f"token {t}: relative error {error:.3g}"
    return None


def _rows(weight: torch.Tensor) -> Linear:
    """A dense weight (N, K) without bias, row by row."""
    return Linear(weight.data_ptr(), None, None, None, *weight.shape, 0)
