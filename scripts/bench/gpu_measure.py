"""gpu.py, part two: how fast? Functions return rows for the CSV files; times in µs, NaN in a toy run.

M, N, K   tokens, outputs, inputs
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from oneshot_kernels import dispatch, ops, reference, sparsify
from oneshot_kernels.gpu import timing, tune
from oneshot_kernels.gpu.fragment import to_fragments
from oneshot_kernels.gpu.mma_sp import INTERPRET, mma_sp
from oneshot_kernels.gpu.selftest import random_24, relative_error


@dataclass(frozen=True)
class Bench:
    """Where and how to measure. `toy` runs everything once at toy size and times nothing."""

    device: torch.device
    dtype: torch.dtype
    toy: bool

    def time(self, calls: list[Callable[[], object]]) -> float:
        """Median µs of a call."""
        if not self.toy:
            return timing.graph_microseconds(calls)
        calls[0]()
        return math.nan

    def copies(self, weight_bytes: int) -> int:
        """Distinct weight copies, for a cold L2."""
        return 1 if self.toy else timing.copies_needed(weight_bytes, self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        """Random activations."""
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def weight(self, n: int, k: int) -> torch.Tensor:
        """A random 2:4 weight."""
        return random_24(n, k, self.dtype, torch.Generator(device=self.device).manual_seed(n + k))


@triton.jit
def read(x_ptr, sum_ptr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Sum so many blocks: nothing but reading."""
    first = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.zeros((BLOCK,), tl.int32)
    for block in tl.static_range(BLOCKS):
        total += tl.load(x_ptr + first + block * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def mma_sp_rate(a_ptr, c_ptr, ITERATIONS, WARPS: tl.constexpr, INTERP: tl.constexpr):
    """mma.sp again and again on what is in registers."""
    i = tl.arange(0, WARPS * 128)
    a = tl.load(a_ptr + i)
    codes = tl.full((WARPS * 128,), 0x44444444, tl.int32)
    acc0 = tl.zeros((WARPS * 128,), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for _ in range(ITERATIONS):  # four chains hide the instruction's latency
        acc0 = mma_sp(a, a, acc0, codes, 0, WARPS, False, INTERP)
        acc1 = mma_sp(a, a, acc1, codes, 1, WARPS, False, INTERP)
        acc2 = mma_sp(a, a, acc2, codes, 2, WARPS, False, INTERP)
        acc3 = mma_sp(a, a, acc3, codes, 3, WARPS, False, INTERP)
    tl.store(c_ptr + tl.program_id(0) * WARPS * 128 + i, acc0 + acc1 + acc2 + acc3)


def ceilings(bench: Bench) -> list[dict]:
    """The limits of this card: pure read (TB/s), dense product and mma.sp from registers (dense-equivalent TFLOP/s)."""
    block, blocks = (64, 2) if bench.toy else (4096, 8)
    programs = 2 if bench.toy else 16384  # 2 GiB
    x = torch.randint(-100, 100, (programs * block * blocks,), dtype=torch.int32, device=bench.device)
    sums = torch.empty(programs, dtype=torch.int32, device=bench.device)
    us = bench.time([lambda: read[(programs,)](x, sums, BLOCK=block, BLOCKS=blocks, num_warps=8)])
    if int(sums.long().sum()) != int(x.long().sum()):
        raise RuntimeError("the read ceiling's kernel did not read everything")
    rows = [{"stage": "ceiling", "method": "read", "us": us, "tb_per_s": x.nbytes / us / 1e6}]

    size = 64 if bench.toy else 8192
    a, b = bench.randn(size, size), bench.randn(size, size)
    us = bench.time([lambda: a @ b] * (1 if bench.toy else 4))
    rows.append({"stage": "ceiling", "method": "matmul", "us": us, "tflop_per_s": 2 * size**3 / us / 1e6})

    warps, programs, iterations = (1, 1, 1) if bench.toy else (8, 132 * 8, 4096)
    words = torch.randint(0, 1 << 14, (warps * 128,), dtype=torch.int32, device=bench.device)
    out = torch.empty(programs, warps * 128, device=bench.device)
    launch = functools.partial(mma_sp_rate[(programs,)], words, out, iterations, num_warps=warps)
    us = bench.time([lambda: launch(WARPS=warps, INTERP=INTERPRET)])
    flops = programs * warps * iterations * 4 * 2 * 16 * 32 * 8
    rows.append({"stage": "ceiling", "method": "mma.sp", "us": us, "tflop_per_s": flops / us / 1e6})
    return rows


def sweep(bench: Bench, shape: tune.Shape, tokens: int, configs: dict[str, list]) -> list[dict]:
    """Every candidate of every path of ours at one shape and number of tokens."""
    packed_bytes = shape.rows * shape.k * 9 // 8
    candidates = tune.time_candidates(
        shape, tokens, bench.dtype, bench.device, bench.time, bench.copies(packed_bytes), configs
    )
    common = {"stage": "sweep", "n": shape.rows, "k": shape.k, "tokens": tokens}
    return [{**common, "method": row.pop("path"), **row} for row in candidates]


def fused_mlp(bench: Bench, hidden: int, intermediate: int, tokens: int) -> list[dict]:
    """RMSNorm + gate and up + SwiGLU: one launch of ours against the dense chain, graph against graph."""
    weight, x = bench.weight(2 * intermediate, hidden), bench.randn(tokens, hidden)
    gain = torch.rand(hidden, device=bench.device).to(bench.dtype) + 0.5
    packed = reference.pack(weight)
    truth = reference.linear(x, packed, norm_gain=gain, norm_eps=1e-5, swiglu=True)
    copies = bench.copies(weight.nbytes * 9 // 16)
    fragments = [to_fragments(packed, 2) for _ in range(copies)]
    dense = [weight.clone() for _ in range(copies)]

    def dense_chain(w):
        gate, up = F.linear(reference.rms_norm(x, gain, 1e-5), w).chunk(2, dim=-1)
        return F.silu(gate) * up

    common = {"stage": "mlp", "n": 2 * intermediate, "k": hidden, "tokens": tokens}
    calls = [functools.partial(dense_chain, w) for w in dense]
    rows = [{**common, "method": "dense", "error": relative_error(calls[0](), truth), "us": bench.time(calls)}]
    best = None
    for config in tune.decode_candidates(tokens)[: 1 if bench.toy else None]:
        choice = dispatch.Choice("decode", config, "bench", "")
        options = {"norm_gain": gain, "norm_eps": 1e-5, "swiglu": True}
        calls = [functools.partial(ops.run, choice, x, *f, intermediate, **options) for f in fragments]
        tune.poison(tokens, intermediate, bench.dtype, bench.device)
        try:
            error = relative_error(calls[0](), truth)
        except triton.runtime.errors.OutOfResources:
            continue
        if not error <= tune.LIMIT:
            raise RuntimeError(f"fused MLP, {config}, {tokens} tokens: relative error {error:.3g}")
        us = bench.time(calls)
        if best is None or us < best["us"]:
            best = {**common, "method": "fused", "config": str(config), "error": error, "us": us}
    return [*rows, best]


LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TOY_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


@torch.no_grad()
def decode_model(bench: Bench, batches: tuple[int, ...]) -> list[dict]:
    """One decoding step of a random-weight Llama, dense and then packed in place: CUDA graph against CUDA graph."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(TOY_LLAMA if bench.toy else LLAMA_3_8B))
    torch.set_default_dtype(bench.dtype)
    with bench.device:
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(bench.weight(*module.weight.shape))
    rows, logits = [], {}
    for variant in ("dense", "packed"):
        if variant == "packed":
            report = sparsify(model)
            if len(report.fused) != 2 * config.num_hidden_layers:
                raise RuntimeError(f"not every block was fused: {report.fused}")
        for batch in batches:
            if not bench.toy:
                torch.cuda.reset_peak_memory_stats()
            ms, logits[variant, batch] = _decoding_step(bench, model, config, batch)
            row = {"stage": "decode", "method": variant, "batch": batch, "ms_per_step": ms}
            row["tokens_per_s"] = batch * 1e3 / ms
            row["peak_gib"] = math.nan if bench.toy else torch.cuda.max_memory_allocated() / 2**30
            if variant == "packed":
                row["error"] = relative_error(logits[variant, batch], logits["dense", batch].double())
                if not row["error"] <= 5e-2:
                    raise RuntimeError(f"packed logits at batch {batch} are off by {row['error']:.3g}")
            rows.append(row)
    return rows


def _decoding_step(bench: Bench, model, config, batch: int) -> tuple[float, torch.Tensor]:
    """(ms of one step behind about 128 tokens of context, logits). StaticCache, with room for every replay."""
    from transformers import StaticCache

    context = 2 if bench.toy else 128
    ids = torch.arange(batch * context, device=bench.device).view(batch, context) % config.vocab_size
    cache = StaticCache(config=config, max_cache_len=2 * context)
    model(ids, past_key_values=cache, cache_position=torch.arange(context, device=bench.device))
    position = torch.tensor([context], device=bench.device)
    out = {}

    def step():
        options = {
            "past_key_values": cache,
            "cache_position": position,
            "position_ids": position.expand(batch, 1),
        }
        out["logits"] = model(ids[:, :1], **options).logits

    us = bench.time([step])
    return us / 1e3, out["logits"].float()
