"""Invented records, for the tests of oneshot.report."""

import random

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def layers(pattern, blocks, kinds=KINDS):
    sparsity = 0.5 if ":" in pattern else float(pattern)
    return [{"name": f"model.layers.{b}.{k}", "block": b, "linear": k, "shape": [64, 32], "pattern": pattern,
             "target_zeros": int(2048 * sparsity), "zeros": int(2048 * sparsity) + (b == 0),
             "surplus": int(b == 0), "relative_error": 0.01 * (b + 1), "error_from": "gram", "seconds": 0.02,
             "info": {"damping": 0.01}}
            for b in range(blocks) for k in kinds]


def record(method="sparsegpt", pattern="2:4", ppl=21.4, *, model="demo", window=256, seed=0, sha="7a" * 32,
           blocks=2, warnings=(), kinds=KINDS, **settings):
    """A record as a run writes it; the dense one if `method` is dense."""
    dense = method == "dense"
    settings = {"model": model, "method": method, "pattern": "dense" if dense else pattern, "seed": seed,
                "solver": {"sparsegpt": {"damping": 0.01, "block_size": 128}}} | settings
    rng = random.Random(f"{settings}{ppl}")
    return {
        "schema": 1, "run_id": f"{model}-{method}-{rng.getrandbits(32):08x}", "status": "finished",
        "settings": settings,
        "model": {"name": model, "family": "llama", "dtype": "bfloat16", "fingerprint": "ab" * 32},
        "data": {"calibration": {"source": "text", "sha256": "9f" * 32, "nsamples": 64, "tokens": 16384},
                 "evaluation": {"builtin": {"source": "text", "sha256": sha, "windows": 60}}},
        "environment": {"oneshot": "0.1.0", "commit": "abc1234", "date": "2026-11-21T03:00:00Z"},
        "layers": [] if dense else layers(pattern, blocks, kinds),
        "blocks": [{"block": b, "seconds": {"collect": 1.0}} for b in range(0 if dense else blocks)],
        "skipped": [{"name": "lm_head.weight", "reason": "never pruned: output head"}],
        "metrics": {"builtin/ppl": ppl},
        "metric_info": {"builtin/ppl": {"window": window, "windows": 60, "tokens": 15300}},
        "sparsity": 0.0 if dense else 0.5 if ":" in pattern else float(pattern), "warnings": list(warnings),
        "peak_memory_bytes": 812_000_000,
        "seconds": {"load": 0.5, "prune": 0 if dense else 10.1, "total": 14.0}}


def sweep():
    """Magnitude, wanda and SparseGPT at three patterns with two seeds each, dense last."""
    runs = [record(m, p, 10 + 10 * i + s / 8, seed=s) for p in ("2:4", "0.5", "0.6")
            for i, m in enumerate(("magnitude", "wanda", "sparsegpt")) for s in (0, 1)]
    return [*runs, record("dense", ppl=9.5)]


def of_version_0_1():
    """A record with the words of version 0.1: recovery, and repair within a block."""
    old = record("alps", recover="block,distil", allocate="owl",
                 recovery={"block": {"steps": 6}, "distil": {"steps": 7}})
    old["blocks"][0] |= {"repair": {"steps": 6}, "seconds": {"collect": 1.0, "repair": 2.0}}
    return old | {"recovery": {"distil": {"steps": 7, "lr": 0.01}}}


def damaged(names, text="prose"):
    """What --damage records: some slices of the text, the first with more loss than the whole."""
    return {"frequency_from": text, "overall": {"tokens": 90, "windows": 9, "increase": 0.5, "half": 0.1},
            "slices": [{"kind": "content", "name": name, "tokens": 30, "windows": 9, "increase": 0.9 - i / 4,
                        "half": 0.1, "verdict": None if i else "more"} for i, name in enumerate(names)],
            "empty": {"content": [text]}, "found": [f"{names[0]} lost 0.9 nats"],
            "tokens": [{"token": f" {names[0]}\n", "count": 12345, "increase": 0.4, "excess": 0.2}],
            "passages": [{"text": text, "window": 2, "position": 5, "increase": 1.25, "passage": f"Once {text}"}]}
