"""gpu_bench, part three: a section of tables.md and the picture, from the rows of the CSV files alone."""

import math
from pathlib import Path

BEGIN, END = "<!-- gpu_bench begin -->", "<!-- gpu_bench end -->"
LIMIT = 16 / 9
"""Dense bytes over packed bytes: no kernel bound by weight bytes can be faster than this over dense."""
_OURS = "ours: "


def write_report(folder: Path, kernels: list[dict], decode: list[dict], stamp: dict, finished: bool) -> None:
    """Rewrite the section between the markers of tables.md (the rest of the file is others') and the picture."""
    section = "\n".join([BEGIN, *_section(kernels, decode, stamp, finished), END])
    path = folder / "tables.md"
    text = path.read_text() if path.exists() else ""
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + section + rest.partition(END)[2]
    else:
        text = (text.rstrip() + "\n\n" if text.strip() else "") + section + "\n"
    path.write_text(text)
    if table := _speedups(kernels):
        draw(folder / "figures" / "kernels_speedup.png", table, stamp)


def best_of_ours(kernels: list[dict]) -> dict[tuple, dict]:
    """{(n, k, tokens): row}: the fastest of our paths, cuSPARSELt's not counted."""
    best = {}
    for row in kernels:
        key = (row.get("n"), row.get("k"), row.get("tokens"))
        mine = row["stage"] == "table" and row["method"].startswith(_OURS) and _is_time(row.get("us"))
        if mine and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    return best


def _is_time(value) -> bool:
    return isinstance(value, float) and value > 0


def _speedups(kernels: list[dict]) -> dict[tuple, dict[int, float]]:
    """{(n, k): {tokens: speed-up over F.linear}}."""
    lines = {}
    for (n, k, tokens), row in best_of_ours(kernels).items():
        if isinstance(row.get("speedup"), float):
            lines.setdefault((int(n), int(k)), {})[int(tokens)] = row["speedup"]
    return lines


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _section(kernels: list[dict], decode: list[dict], stamp: dict, finished: bool) -> list[str]:
    lines = ["## 2:4 kernels on a GPU", ""]
    speedups = _speedups(kernels)
    if not speedups:
        return [*lines, "Not measured yet: `scripts/gpu_bench.py` has not run on a GPU."]
    versions = f"torch {stamp['torch']}, triton {stamp['triton']}, commit {stamp['commit']}"
    state = "" if finished else " **Unfinished run.**"
    lines += [f"{stamp['device']}, {stamp['dtype']}, {versions}.{state} `python scripts/gpu_bench.py`", ""]
    lines += [
        "Speed-up over `F.linear`, fastest of our kernels (the limit while weight bytes decide is 1.78):",
        "",
    ]
    tokens = sorted({m for line in speedups.values() for m in line})
    lines += ["| N x K | " + " | ".join(map(str, tokens)) + " |", "|---|" + "---|" * len(tokens)]
    for (n, k), line in sorted(speedups.items()):
        cells = [f"{line[m]:.2f}" if m in line else "" for m in tokens]
        lines.append(f"| {n}x{k} | " + " | ".join(cells) + " |")
    means = [_geometric_mean([line[m] for line in speedups.values() if m in line]) for m in tokens]
    lines.append("| geometric mean | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    lines += ["", *_against_sparselt(kernels), *_fewer_bits(kernels)]
    lines += [*_ceilings(kernels), *_mlp(kernels), *_decode(decode)]
    return lines


def _against_sparselt(kernels: list[dict]) -> list[str]:
    theirs = {
        (r["n"], r["k"], r["tokens"]): r["us"] for r in kernels if r["stage"] == "table" and r["method"] == "sparselt"
    }
    ours = best_of_ours(kernels)
    ratios = [theirs[key] / row["us"] for key, row in ours.items() if key[2] <= 64 and _is_time(theirs.get(key))]
    if not ratios:
        return []
    text = f"Against cuSPARSELt's best algorithm, up to 64 tokens: geometric mean {_geometric_mean(ratios):.2f}x"
    return [f"{text}, worst {min(ratios):.2f}x, over {len(ratios)} shapes and sizes.", ""]


def _fewer_bits(kernels: list[dict]) -> list[str]:
    """What dense weights of fewer bits reach, for honesty: bits and zeros compete for the same bytes."""
    rows = [r for r in kernels if r["stage"] == "table" and isinstance(r.get("speedup"), float) and r["tokens"] <= 64]
    means = {name: [r["speedup"] for r in rows if r["method"] == name] for name in ("int8", "int4")}
    parts = [f"{name} {_geometric_mean(values):.2f}x" for name, values in means.items() if values]
    if not parts:
        return []
    text = f"Dense weights of fewer bits, torch's own kernels, up to 64 tokens: {', '.join(parts)} over `F.linear`"
    return [f"{text} (geometric means; they round the weights).", ""]


def _ceilings(kernels: list[dict]) -> list[str]:
    rows = {row["method"]: row for row in kernels if row["stage"] == "ceiling"}
    if "read" not in rows:
        return []
    text = f"Ceilings measured in the same run: read {rows['read']['tb_per_s']:.2f} TB/s"
    rates = [f"{name} {rows[name]['tflop_per_s']:.0f} TFLOP/s" for name in ("matmul", "mma.sp") if name in rows]
    return [", ".join([text, *rates]) + ".", ""]


def _mlp(kernels: list[dict]) -> list[str]:
    rows = [row for row in kernels if row["stage"] == "mlp" and row["method"] == "fused"]
    if not rows:
        return []
    lines = ["| RMSNorm + gate_up + SwiGLU, tokens | µs | over the dense chain |", "|---|---|---|"]
    return [*lines, *(f"| {int(r['tokens'])} | {r['us']:.1f} | {r['speedup']:.2f} |" for r in rows), ""]


def _decode(decode: list[dict]) -> list[str]:
    if not decode:
        return []
    lines = [
        "| Llama-3-8B shape, random weights | batch | ms a step | tokens/s | speed-up | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in decode:
        speedup = f"{row['speedup']:.2f}" if isinstance(row.get("speedup"), float) else ""
        cells = (f"{row['ms_per_step']:.2f}", f"{row['tokens_per_s']:.0f}", speedup, f"{row['peak_gib']:.1f}")
        lines.append(f"| {row['method']} | {int(row['batch'])} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def draw(path: Path, speedups: dict[tuple, dict[int, float]], stamp: dict) -> None:
    """Speed-up over dense against tokens, one line per shape, the limit drawn in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for (n, k), line in sorted(speedups.items()):
        tokens = sorted(line)
        axes.plot(tokens, [line[m] for m in tokens], marker="o", markersize=3, label=f"{n}x{k}")
    axes.axhline(LIMIT, color="black", linestyle="--", linewidth=1)
    axes.text(1, LIMIT, " limit of weight bytes, 1.78x", va="bottom", fontsize=8)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up over F.linear")
    axes.set_title(f"2:4 linear layers, {stamp['dtype']}, {stamp['device']}", fontsize=10)
    axes.legend(fontsize=7, ncols=2, title="N x K", title_fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
