"""SparseGPT's loop over the columns of one block, compiled (arXiv 2301.00774, algorithm 1), and its torch reference.

    b, R    columns of the block, rows of the weight: W (b, R) is held transposed
    U       (b, b), upper triangular: this block of the Cholesky factor of the inverse Hessian
    q_j     the new value of column j: 0 where it is removed, else w_j, or w_j rounded to a `Grid`

Column by column from the left, the error of a column is compensated by all columns right of it:

    e_j = (w_j - q_j) / U_jj,        w_k -= e_j U_jk    for all k > j

What a block is when all blocks before it are done, which takes most of the operations, is here too (`current`): for
blocks of 128 columns torch spends as long on the inverse of a triangle, and on reading small strided matrices.
"""

import ctypes
from dataclasses import dataclass

import torch

from . import library

NAMES = {torch.float32: "column_loop_float32", torch.float64: "column_loop_float64"}
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-12}
"""Largest accepted relative error in the self-test, where no decision is close; a wrong result is off by about 1."""


@dataclass(frozen=True)
class Grid:
    """Where kept weights go: `scale · k` with a whole number k from `low` to `high`, ties to the even one.

    scale: (ceil(b / width), R), not zero, the dtype of W; one for each row and each `width` columns. codes: int8
    (b, R), is filled with k (0 where the weight is removed); None if nobody wants to know.
    """

    scale: torch.Tensor
    width: int
    low: int
    high: int
    codes: torch.Tensor | None = None


def available(W: torch.Tensor) -> bool:
    """Whether `solve` can run on a weight like W; compiles and tests the library at the first call for a CPU tensor."""
    return W.device.type == "cpu" and W.dtype in NAMES and _library() is not None


def kind(device: str) -> str:
    """What runs the loop on a device: a variant of the library such as "avx512", or "torch"."""
    return library.why("column_loop") if available(torch.empty(0, device=device)) else "torch"


def solve(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: tuple[int, int] | None = None,
          grid: Grid | None = None) -> None:
    """Run the loop in place: W (b, R) becomes Ŵ.

    mask: bool (b, R), True where a weight is kept: given, or, with nm = (n, m), filled with the n of every m columns
    whose (w_j / U_jj)² is highest when the loop gets there (of equal ones the right-most). float32 or float64 on a CPU;
    rows are independent, so any number of threads gives the same bits. The values are `reference`'s to rounding.

    Raises ValueError for tensors of other shapes, dtypes or layouts, and RuntimeError if there is no library
    (`available`) or no memory.
    """
    _check(W, U, mask, nm, grid)
    cdll = _library()
    if cdll is None:
        raise RuntimeError(f"the compiled column loop is not available: {library.why('column_loop')}")
    _run(cdll, W, U, mask, nm, grid, library.threads())


def current(E: torch.Tensor, V: torch.Tensor, before: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """The last b columns of E as they are when all others are done, into `out` (b, R); returns U.

        U = V_BB⁻¹,  out = E_B + Uᵀ (before + V_:Bᵀ E_:)

    E (n, R): of the columns before the block what they lost, of the block what it is. V (n, n): upper triangular, the
    factor of H; a part of a larger matrix will do. before: what columns that are not in E add, (b, R), or None. float32
    or float64 on a CPU; any number of threads gives the same bits.

    Raises ValueError for tensors of other shapes, dtypes or layouts, and RuntimeError if there is no library
    (`available`) or no memory.
    """
    (n, R), b = E.shape, len(out)
    for name, tensor, shape in (("E", E, (n, R)), ("before", out if before is None else before, (b, R)),
                                ("out", out, (min(b, n), R)), ("V", V[:1], (1, n))):
        _like(name, tensor, shape, E.dtype)
    if E.dtype not in NAMES or len(V) != n or V.stride(0) < n:
        raise ValueError(f"column loop: V must be a {n} x {n} float32 or float64 matrix by rows, got {tuple(V.shape)}")
    cdll = _library()
    if cdll is None:
        raise RuntimeError(f"the compiled column loop is not available: {library.why('column_loop')}")
    return _current(cdll, (E, V, before, out), library.threads())


def current_reference(E: torch.Tensor, V: torch.Tensor, before: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """What `current` computes, in torch. Any device."""
    first, b = len(E) - len(out), len(out)
    U = torch.linalg.solve_triangular(V[first:, first:], torch.eye(b, dtype=E.dtype, device=E.device), upper=True)
    lost = V[:first, first:].T @ E[:first] if before is None else torch.addmm(before, V[:first, first:].T, E[:first])
    torch.addmm(E[first:], U.T, lost, out=out)
    return U


def reference(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: tuple[int, int] | None = None,
              grid: Grid | None = None) -> None:
    """What `solve` computes, in the plainest way: one column after the other updates all others. Any device."""
    n, m = nm or (0, 0)
    for j in range(len(W)):
        if m and j % m == 0:
            score = (W[j : j + m] / U.diagonal()[j : j + m, None]).abs()
            mask[j : j + m] = True
            mask[j : j + m].scatter_(0, score.argsort(dim=0, stable=True)[: m - n], False)
        q = W[j] * mask[j]
        if grid:
            s = grid.scale[j // grid.width]
            k = (W[j] / s).round().clamp(grid.low, grid.high) * mask[j]
            q = k * s
            if grid.codes is not None:
                grid.codes[j] = k.to(torch.int8)
        e = (W[j] - q) / U[j, j]
        W[j] = q
        W[j + 1 :] -= U[j, j + 1 :, None] * e


def _library() -> ctypes.CDLL | None:
    """The compiled library, or None."""
    return library.load("column_loop", _declare, _self_test)


def _declare(cdll: ctypes.CDLL) -> None:
    """The functions' argument types."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in NAMES.values():
        function = getattr(cdll, name)
        function.argtypes = [pointer] * 3 + [number] * 4 + [pointer, number, number, number, pointer, number]
        function.restype = ctypes.c_int
        current = getattr(cdll, name + "_current")
        current.argtypes, current.restype = [pointer] * 5 + [number] * 5, ctypes.c_int


def _run(cdll: ctypes.CDLL, W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: tuple[int, int] | None,
         grid: Grid | None, threads: int) -> None:
    """Call the library."""
    U = U.contiguous()
    codes = grid.codes.data_ptr() if grid and grid.codes is not None else None
    rounding = (grid.scale.data_ptr(), grid.width, grid.low, grid.high, codes) if grid else (None, 1, 0, 0, None)
    failed = getattr(cdll, NAMES[W.dtype])(W.data_ptr(), U.data_ptr(), mask.data_ptr(), *W.shape, *(nm or (0, 0)),
                                           *rounding, threads)
    if failed:
        raise RuntimeError(f"no memory for the column loop's work space ({len(W)} columns)")


def _current(cdll: ctypes.CDLL, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
             threads: int) -> torch.Tensor:
    """Call the library. given: (E, V, before, out)."""
    E, V, before, out = given
    b, U = len(out), E.new_empty(len(out), len(out))
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (out, U, E, V, before)]
    if getattr(cdll, NAMES[E.dtype] + "_current")(*pointers, V.stride(0), len(E) - b, b, E.shape[1], threads):
        raise RuntimeError(f"no memory for the column loop's work space ({len(E)} columns)")
    return U


def _check(W: torch.Tensor, U: torch.Tensor, mask: torch.Tensor, nm: tuple[int, int] | None, grid: Grid | None) -> None:
    """Raise ValueError unless the C code can read and write these tensors."""
    if W.ndim != 2 or W.dtype not in NAMES:
        raise ValueError(f"column loop: W must be a float32 or float64 matrix, got {tuple(W.shape)} {W.dtype}")
    wanted = {"W": (W, W.shape, W.dtype), "U": (U, (len(W), len(W)), W.dtype), "mask": (mask, W.shape, torch.bool)}
    if grid:
        groups = -(-len(W) // grid.width) if grid.width > 0 else 0
        wanted["scale"] = grid.scale, (groups, W.shape[1]), W.dtype
        if grid.codes is not None:
            wanted["codes"] = grid.codes, W.shape, torch.int8
    for name, (tensor, shape, dtype) in wanted.items():
        _like(name, tensor.contiguous() if name == "U" else tensor, shape, dtype)
    if nm and not (0 <= nm[0] <= nm[1] and nm[1] > 0 and len(W) % nm[1] == 0):
        raise ValueError(f"column loop: {nm[0]}:{nm[1]} does not fit {len(W)} columns")
    most = 2**22 if grid and grid.codes is None else 2**7  # that far float32 rounds as it should
    if grid and not (-most <= grid.low < grid.high < most and bool((grid.scale != 0).all())):
        raise ValueError(f"column loop: a grid needs scales that are not zero and codes from {-most} to {most - 1}, "
                         f"not {grid.low} to {grid.high}")


def _like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless a tensor is contiguous, on a CPU, and of this shape and dtype."""
    if tensor.device.type != "cpu" or tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or (
            not tensor.is_contiguous()):
        raise ValueError(f"column loop: {name} must be contiguous {tuple(shape)} {dtype} on a CPU, got "
                         f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}")


def _self_test(cdll: ctypes.CDLL) -> str | None:
    """What is wrong on a small problem that goes through every part of the code, or None."""
    generator = torch.Generator().manual_seed(0)
    for dtype, b, R, nm, rounded in ((torch.float32, 24, 70, (2, 4), False), (torch.float64, 15, 21, (3, 5), False),
                                     (torch.float32, 21, 131, None, True), (torch.float64, 10, 3, None, False)):
        W, added = torch.randn(2, b, R, generator=generator, dtype=dtype)
        U = torch.randn(b, b, generator=generator, dtype=dtype).mul_(0.1).triu_(1)
        U += torch.diag(torch.rand(b, generator=generator, dtype=dtype) + 0.5)
        given = torch.rand(b, R, generator=generator) < 0.5
        got, want = ((W.clone(), given.clone(), some_grid(W) if rounded else None) for _ in range(2))
        _run(cdll, got[0], U, got[1], nm, got[2], 2)
        reference(want[0], U, want[1], nm, want[2])
        about, limit = f"{b} columns, {R} rows, {nm or 'given mask'}", LIMITS[dtype]
        error = _distance(got[0], want[0])
        if not torch.equal(got[1], want[1]) or not error <= (0.1 if rounded else limit):
            return f"{about}: relative error {error:.3g}"
        before = added[b // 3 :].contiguous() if nm else None
        got, want = torch.empty(2, b - b // 3, R, dtype=dtype)
        inverses = _current(cdll, (W, U, before, got), 2), current_reference(W, U, before, want)
        error = max(_distance(got, want), _distance(*inverses))
        if not error <= limit:
            return f"{about}, the columns before it: relative error {error:.3g}"
    return None


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error."""
    return float((got - want).norm() / want.norm())


def some_grid(W: torch.Tensor) -> Grid:
    """int4 with a scale for every row and eight columns."""
    scale = torch.stack([part.abs().amax(0) / 7 for part in W.split(8)])
    return Grid(scale, 8, -8, 7, torch.empty_like(W, dtype=torch.int8))
