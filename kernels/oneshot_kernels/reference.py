"""The packed 2:4 format, and the slow reference that every kernel is tested against. Plain torch, on any device.

    N   outputs of the linear (rows of the weight)      G   groups of four neighbours in a row, K / 4
    K   inputs of the linear, divisible by 4            M   tokens
    i0 < i1   positions (0..3) of a group's two kept weights

**The format.** A weight `W` (N, K) with at most two nonzeros in every `W[n, 4g : 4g+4]` is stored as two row-major
tensors without padding, which take 0.5625 of the dense bytes at 16 bits per weight:

`values` (N, K/2), the dtype of W: `values[n, 2g]` is `W[n, 4g + i0]` and `values[n, 2g + 1]` is `W[n, 4g + i1]`.

`metadata` (N, ceil(K/8)), uint8: byte `b` of row `n` describes group 2b in its low four bits and group 2b + 1 in its
high four bits; the four bits of a group are `i0 | i1 << 2`. With an odd number of groups the last high half is 0.

**Canonical form**, so that equal weights give equal bytes: a group with fewer than two nonzeros is filled up with its
lowest zero positions. Zeros are stored and restored as +0.0: `pack` drops the sign of a negative zero. Everything else,
including NaN payloads, is restored bit for bit.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that `pack` accepts. The GPU kernels accept the two 16-bit ones; float32 is for CPUs."""

INVALID = 255
_CHUNK = 1 << 24  # number of weights handled at a time, which limits temporaries to about 200 MB


class Packed(NamedTuple):
    """A weight (N, K) in the packed format. `shape` is (N, K), the shape before packing."""

    values: torch.Tensor
    metadata: torch.Tensor
    shape: tuple[int, int]


def _canonical_codes() -> list[int]:
    """For each 4-bit pattern of nonzeros (bit p = position p): i0 | i1 << 2, or INVALID for three or four nonzeros."""
    codes = []
    for pattern in range(16):
        nonzero = [p for p in range(4) if pattern >> p & 1]
        zero = [p for p in range(4) if not pattern >> p & 1]
        i0, i1 = sorted((nonzero + zero)[:2])
        codes.append(i0 | i1 << 2 if len(nonzero) <= 2 else INVALID)
    return codes


def _codes(groups: torch.Tensor) -> torch.Tensor:
    """(rows, G, 4) weights -> (rows, G) uint8 codes, INVALID where a group is not 2:4."""
    nonzero = (groups != 0).to(torch.uint8)
    pattern = nonzero[..., 0] | nonzero[..., 1] << 1 | nonzero[..., 2] << 2 | nonzero[..., 3] << 3
    return torch.tensor(_canonical_codes(), dtype=torch.uint8, device=groups.device)[pattern.int()]


def _row_chunks(n: int, k: int) -> list[slice]:
    """Slices of rows with at most _CHUNK weights each."""
    step = max(1, _CHUNK // max(1, k))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _check_weight(weight: torch.Tensor) -> None:
    """Raise ValueError for a shape or dtype that cannot be packed."""
    if weight.ndim != 2 or weight.shape[1] % 4 or 0 in weight.shape:
        raise ValueError(
            "2:4 packing needs a non-empty matrix with a number of columns divisible by 4, got shape "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"2:4 packing takes {names}, got {weight.dtype}; convert the weight first")


def is_24(weight: torch.Tensor) -> bool:
    """Whether `weight` (N, K) can be packed: suitable shape and dtype, at most two nonzeros in each group of four."""
    try:
        _check_weight(weight)
    except ValueError:
        return False
    n, k = weight.shape
    return all(bool((weight[rows].reshape(-1, k // 4, 4) != 0).sum(-1).le(2).all()) for rows in _row_chunks(n, k))


def pack(weight: torch.Tensor) -> Packed:
    """Dense 2:4 weight (N, K) -> `Packed`, on the same device.

    Raises ValueError for a shape or dtype that the format does not support, and for a weight that is not 2:4, naming
    the first offending row and its columns.
    """
    _check_weight(weight)
    weight = weight.detach()
    n, k = weight.shape
    values = weight.new_empty(n, k // 2)
    metadata = torch.zeros(n, -(-k // 8), dtype=torch.uint8, device=weight.device)
    for rows in _row_chunks(n, k):
        groups = weight[rows].reshape(-1, k // 4, 4)
        code = _codes(groups)
        bad = code == INVALID
        if bad.any():
            row, group = bad.nonzero()[0].tolist()
            raise ValueError(
                f"not 2:4: row {rows.start + row}, columns {4 * group}..{4 * group + 3} hold "
                f"{groups[row, group].tolist()}, more than two nonzeros; prune the weight to 2:4 before packing"
            )
        i0, i1 = code & 3, code >> 2
        w0, w1, w2, w3 = groups.unbind(-1)
        first = torch.where(i0 == 0, w0, torch.where(i0 == 1, w1, w2))
        second = torch.where(i1 == 1, w1, torch.where(i1 == 2, w2, w3))
        kept = torch.stack((first, second), dim=-1).reshape(-1, k // 2)
        values[rows] = torch.where(kept == 0, 0.0, kept)  # -0.0 becomes +0.0
        metadata[rows, : code[:, 0::2].shape[1]] = code[:, 0::2]
        metadata[rows, : code[:, 1::2].shape[1]] |= code[:, 1::2] << 4
    return Packed(values, metadata, (n, k))


def unpack(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """Packed tensors -> dense (N, K), with the dtype and device of `values`. The bit-exact inverse of `pack`.

    Raises ValueError if the two tensors do not match, or if a group's positions are not i0 < i1 (the file is damaged or
    in another format), naming the first such row.
    """
    _check_packed(values, metadata)
    n, k = values.shape[0], 2 * values.shape[1]
    dense = values.new_empty(n, k)
    for rows in _row_chunks(n, k):
        i0, i1 = _positions(metadata, rows, k)
        first, second = values[rows].reshape(-1, k // 4, 2).unbind(-1)
        zero = first.new_zeros(())
        columns = [torch.where(i0 == p, first, torch.where(i1 == p, second, zero)) for p in range(4)]
        dense[rows] = torch.stack(columns, dim=-1).reshape(-1, k)
    return dense


def check(values: torch.Tensor, metadata: torch.Tensor) -> None:
    """Raise the ValueError that `unpack` would raise, without unpacking; the GPU kernels do not check their inputs."""
    _check_packed(values, metadata)
    n, k = values.shape[0], 2 * values.shape[1]
    for rows in _row_chunks(n, k):
        _positions(metadata, rows, k)


def _positions(metadata: torch.Tensor, rows: slice, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(i0, i1), uint8 (rows, G) each. Raises ValueError, naming the first group whose positions are not i0 < i1."""
    code = torch.stack((metadata[rows] & 15, metadata[rows] >> 4), dim=-1).flatten(1)[:, : k // 4]
    i0, i1 = code & 3, code >> 2
    if not metadata.is_meta and (i0 >= i1).any():
        row, group = (i0 >= i1).nonzero()[0].tolist()
        raise ValueError(
            f"bad metadata: row {rows.start + row}, group {group} holds positions {int(i0[row, group])}, "
            f"{int(i1[row, group])}; the first must be below the second. The file is damaged or not in this format"
        )
    return i0, i1


def _check_packed(values: torch.Tensor, metadata: torch.Tensor) -> None:
    """Raise ValueError if the two tensors do not match."""
    fits = (
        values.ndim == 2
        and values.dtype in DTYPES
        and values.shape[1] % 2 == 0
        and metadata.dtype == torch.uint8
        and tuple(metadata.shape) == (values.shape[0], -(-values.shape[1] // 4))
    )
    if not fits:
        raise ValueError(
            "packed tensors must be values (N, K/2) in a float dtype and metadata (N, ceil(K/8)) in uint8, got "
            f"{tuple(values.shape)} {values.dtype} and {tuple(metadata.shape)} {metadata.dtype}"
        )


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · gain over the last dimension, in x's dtype, rounded as in transformers."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return gain * normed.to(x.dtype)


def linear(
    x: torch.Tensor,
    packed: Packed,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_gain: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    swiglu: bool = False,
) -> torch.Tensor:
    """The reference: what every kernel computes, in a naive way and in float64.

    x: (..., K). bias: (N,). norm_gain: (K,), applies an RMSNorm with `norm_eps` to x first. swiglu: takes the first N/2
    rows as gate, the others as up, and returns silu(gate) · up. residual: of the output's shape, is added last. Returns
    float64 (..., N), with `swiglu` (..., N/2).
    """
    h = x.double()
    if norm_gain is not None:
        h = rms_norm(h, norm_gain.double(), norm_eps)
    y = h @ unpack(packed.values, packed.metadata).double().T
    if bias is not None:
        y = y + bias.double()
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.double()


def llama_token(x: torch.Tensor, blocks: list[dict[str, torch.Tensor]], past: list[tuple | None],
                angles: tuple[torch.Tensor, torch.Tensor], *, heads: int, eps: float, scaling: float) -> torch.Tensor:
    """One token through Llama-like blocks, in float64: its embedding (H,) -> its state behind the last block (H,).

    blocks: weights by the names q k v o gate up down, gains before after and, if there are any, q_norm k_norm, biases
    q_bias and so on. past: (keys, values), each (J, T, D), of each block; gets this token's. angles: cos and sin (D,).
    """
    x = x.double()
    cosine, sine = (t.double() for t in angles)
    for i, block in enumerate(blocks):
        own = {name: t.double() for name, t in block.items()}

        def product(name: str, y: torch.Tensor, own: dict = own) -> torch.Tensor:
            return F.linear(y, own[name], own.get(f"{name}_bias"))
        y = rms_norm(x, own["before"], eps)
        q, k, v = (product(name, y).view(-1, len(cosine)) for name in "qkv")
        q, k = (rms_norm(t, own[gain], eps) if gain in own else t for t, gain in ((q, "q_norm"), (k, "k_norm")))
        q, k = (t * cosine + torch.cat((-t[:, t.shape[1] // 2:], t[:, : t.shape[1] // 2]), 1) * sine for t in (q, k))
        new = k[:, None], v[:, None]
        past[i] = new if past[i] is None else tuple(torch.cat(pair, 1) for pair in zip(past[i], new, strict=True))
        keys, values = (t.repeat_interleave(heads // len(k), 0) for t in past[i])
        shares = (torch.einsum("hd,htd->ht", q, keys) * scaling).softmax(-1)
        x = x + product("o", torch.einsum("ht,htd->hd", shares, values).flatten())
        y = rms_norm(x, own["after"], eps)
        x = x + product("down", F.silu(product("gate", y)) * product("up", y))
    return x


def random_24(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A random 2:4 weight (n, k), scaled for outputs of unit variance, on the generator's device."""
    weight = torch.randn(n, k, generator=generator, device=generator.device) * (2 / k) ** 0.5
    groups = weight.view(n, k // 4, 4)
    kept = groups.abs().topk(2, dim=-1).indices
    return (groups * torch.zeros_like(groups).scatter_(-1, kept, 1.0)).view(n, k).to(dtype)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||; infinite instead of NaN, so that NaN never passes a comparison."""
    error = ((got.double() - truth).norm() / truth.norm()).item()
    return math.inf if math.isnan(error) else error
