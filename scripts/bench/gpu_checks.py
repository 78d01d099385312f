"""gpu.py, part one: is everything right? Each function raises `Wrong` where it is not.

M, N, K   tokens, outputs, inputs        T   token tiles of 8 in the decode kernel
"""

import concurrent.futures
import multiprocessing

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from oneshot_kernels import dispatch, ops, reference
from oneshot_kernels.gpu import decode, expand, prefill, tune
from oneshot_kernels.gpu.fragment import to_fragments
from oneshot_kernels.gpu.mma_sp import INTERPRET, mma_sp
from oneshot_kernels.gpu.selftest import random_24, relative_error

TENSOR_CORE = 1e-6
"""Float32 accumulation inside the tensor cores, relative: exact products, truncated sums."""


class Wrong(Exception):
    """A kernel computed something it should not have."""


@triton.jit
def one_instruction(a_ptr, b_ptr, metadata_ptr, c_ptr, STEP: tl.constexpr, FP16: tl.constexpr, INTERP: tl.constexpr):
    """One warp's mma.sp on registers given as they are."""
    i = tl.arange(0, 128)
    a, b, metadata = tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(metadata_ptr + i)
    tl.store(c_ptr + i, mma_sp(a, b, tl.zeros((128,), tl.float32), metadata, STEP, 1, FP16, INTERP))


def fragment_map(device: torch.device, dtype: torch.dtype) -> None:
    """One raw mma.sp for each metadata word and selector, every register checked against the documented map.

    Small integers: products and sums are exact, so the comparison is too.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    weight = (random_24(16, 256, torch.float32, generator) * 8).round().to(dtype)
    x = torch.randint(-8, 9, (8, 256), generator=generator, device=device).to(dtype)
    values, metadata = to_fragments(reference.pack(weight))
    for step in range(8):
        columns = slice(32 * step, 32 * step + 32)
        # B: lane 4g + q, register r = columns 8r + 2q and the next, of token g
        b = x[:, columns].reshape(8, 4, 4, 2).transpose(1, 2).contiguous().view(torch.int32)
        c = torch.full((8, 4, 2, 2), torch.nan, device=device)  # g, q, r, j
        a = values[0, step].contiguous().view(torch.int32)
        one_instruction[(1,)](a, b, metadata, c, STEP=step, FP16=dtype == torch.float16, INTERP=INTERPRET, num_warps=1)
        got = c.permute(2, 0, 1, 3).reshape(16, 8)  # row g + 8r, token 2q + j
        want = weight[:, columns].float() @ x[:, columns].float().T
        if not torch.equal(got, want):
            bad = (got != want).nonzero().tolist()
            raise Wrong(f"mma.sp fragment map, k-block {step}, {dtype}: {len(bad)} of 128 outputs differ: {bad[:8]}")


def _variant_error(path: str, config: decode.Config | expand.Config, tokens: int, k: int, device: str) -> float | None:
    """Error of one plain launch as the tables run it; None if it does not fit the device."""
    device = torch.device(device)
    generator = torch.Generator(device=device).manual_seed(0)
    dtype = torch.float16 if INTERPRET else torch.bfloat16
    packed = reference.pack(random_24(32, k, dtype, generator))
    x = torch.randn(tokens, k, generator=generator, device=device).to(dtype)
    try:
        y = ops.run(dispatch.Choice(path, config, "check", ""), x, *to_fragments(packed), 32)
    except triton.runtime.errors.OutOfResources:
        return None
    return relative_error(y, reference.linear(x, packed))


def variants(device: torch.device, tokens: int, configs: dict[str, list], ks: tuple[int, ...], workers: int) -> None:
    """Every launch configuration of the sweep, for whole and uneven K. Compiles in parallel: fills Triton's cache."""
    jobs = [(path, c, tokens, k, str(device)) for path, of_path in configs.items() for c in of_path for k in ks]
    if workers == 1:
        errors = [_variant_error(*job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            errors = list(pool.map(_variant_error, *zip(*jobs, strict=True)))
    for (path, config, _, k, _), error in zip(jobs, errors, strict=True):
        if error is not None and not error <= 4e-3:
            raise Wrong(f"{path}, {config}, {tokens} tokens, K = {k}: relative error {error:.3g}")


STRANGE = [  # N, K, M, extras; a toy run takes the first two
    (7, 4, 1, {}),
    (20, 36, 3, {"swiglu": True, "norm": True, "bias": True}),
    (16, 36, 9, {"bias": True}),
    (33, 172, 70, {"bias": True, "residual": True}),
    (40, 512, 17, {"norm": True}),
    (40, 512, 3, {"swiglu": True, "norm": True, "bias": True, "residual": True}),
    (48, 11 * 256, 64, {"residual": True}),
    (160, 1024 + 36, 33, {"norm": True, "residual": True}),
]


def paths(device: torch.device, dtype: torch.dtype, toy: bool) -> list[dict]:
    """Every path at strange shapes against float64: at most twice what dense torch errs at the same precision."""
    rows = []
    for n, k, m, options in STRANGE[: 2 if toy else None]:
        generator = torch.Generator(device=device).manual_seed(n + k + m)

        def random(*shape, generator=generator):
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        swiglu = options.get("swiglu", False)
        weight = random_24(2 * n if swiglu else n, k, dtype, generator)
        packed = reference.pack(weight)
        x = random(m, k)
        extras = {
            "bias": random(weight.shape[0]) if "bias" in options else None,
            "residual": random(m, n) if "residual" in options else None,
            "norm_gain": random(k) if "norm" in options else None,
            "norm_eps": 1e-5,
            "swiglu": swiglu,
        }
        truth = reference.linear(x, packed, **extras)
        limit = 2 * relative_error(_dense(x, weight, **extras), truth) + TENSOR_CORE
        fragments = to_fragments(packed, 2 if swiglu else 1)
        for path, config in _runnable(m, k, weight, device):
            blob = prefill.compress(weight) if path == "sparselt" else None
            tune.poison(m, n, dtype, device)
            choice = dispatch.Choice(path, config, "check", "")
            y = ops.run(choice, x, *fragments, n, **extras, prefill_copy=blob)
            error = relative_error(y, truth)
            if not error <= limit:
                raise Wrong(f"{path} {config} at N={n} K={k} M={m} {options}: relative error {error:.3g} > {limit:.3g}")
            rows.append({"n": n, "k": k, "tokens": m, "method": path, "error": error})
        scratch = expand.expand(*fragments, 16 * fragments[0].shape[0], k) if not swiglu else None
        if scratch is not None and not torch.equal(scratch[:n], weight):
            raise Wrong(f"scratch expansion at N={n} K={k} is not bit-exact")
    return rows


def _runnable(m: int, k: int, weight: torch.Tensor, device: torch.device):
    if m <= decode.MAX_TOKENS:
        yield "decode", decode.default_config(m, k)
        yield "decode", decode.Config(row_tiles=2, warps=4, stages=2, direct_x=False)
    yield "middle", expand.default_config(m, weight.shape[0], k)
    yield "middle", expand.Config(rows=64, tokens=16, columns=64, split=2)
    yield "scratch", None
    if prefill.sparselt_refuses(*weight.shape, weight.dtype, device) is None:
        yield "sparselt", 0


def _dense(x, weight, *, bias, residual, norm_gain, norm_eps, swiglu):
    """What dense torch computes, in the dtype of x."""
    h = x if norm_gain is None else reference.rms_norm(x, norm_gain, norm_eps)
    y = F.linear(h, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual
