"""gpu.py, part three: a section of tables.md and the picture, from the rows of the CSV files alone."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from oneshot.report import section, table
from oneshot.report.figures import drawing
from oneshot.runtime.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = "scripts/bench/gpu.py"
LIMIT = 16 / 9
"""Dense bytes over packed bytes: no kernel bound by weight bytes can be faster than this over dense."""
OURS = "ours: "
FEW = 64  # tokens up to which weight bytes decide


def write_report(folder: Path, kernels: list[dict], decode: list[dict], stamp: dict, finished: bool) -> None:
    """Rewrite the section `kernels` of tables.md (the rest of the file is others') and the picture."""
    path = folder / "tables.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    content = "\n".join(["## 2:4 kernels on a GPU", "", *body(kernels, decode, stamp, finished)]).rstrip()
    write_text(section.replace(text, "kernels", PROGRAM, content), path)
    if found := speedups(kernels):
        drawing.save(picture(found, stamp), folder / "figures" / "kernels_speedup.png")


# ------------------------------------------------------------------ what the rows say

def best_of_ours(kernels: list[dict]) -> dict[tuple, dict]:
    """{(n, k, tokens): row}: the fastest of our paths, cuSPARSELt's not counted."""
    best = {}
    for row in kernels:
        key = (row.get("n"), row.get("k"), row.get("tokens"))
        mine = row["stage"] == "table" and row["method"].startswith(OURS) and is_time(row.get("us"))
        if mine and (key not in best or row["us"] < best[key]["us"]):
            best[key] = row
    return best


def is_time(value) -> bool:
    """Whether a cell holds a time: toy runs and failures have none."""
    return isinstance(value, float) and value > 0


def speedups(kernels: list[dict]) -> dict[tuple[int, int], dict[int, float]]:
    """{(n, k): {tokens: speed-up over F.linear}}."""
    lines = {}
    for (n, k, tokens), row in best_of_ours(kernels).items():
        if isinstance(row.get("speedup"), float):
            lines.setdefault((int(n), int(k)), {})[int(tokens)] = row["speedup"]
    return lines


def geometric_mean(values: list[float]) -> float:
    """The mean of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


# ------------------------------------------------------------------ the section

def body(kernels: list[dict], decode: list[dict], stamp: dict, finished: bool) -> list[str]:
    """The lines of the section below its heading."""
    found = speedups(kernels)
    if not found:
        return [f"Not measured yet: `{PROGRAM}` has not run on a GPU."]
    versions = f"torch {stamp['torch']}, triton {stamp['triton']}, commit {stamp['commit']}"
    state = "" if finished else " **Unfinished run.**"
    tokens = sorted({m for line in found.values() for m in line})
    rows = [[f"{n}x{k}", *(f"{line[m]:.2f}" if m in line else "" for m in tokens)] for (n, k), line in
            sorted(found.items())]
    means = [geometric_mean([line[m] for line in found.values() if m in line]) for m in tokens]
    rows.append(["geometric mean", *(f"{mean:.2f}" for mean in means)])
    return [f"{stamp['device']}, {stamp['dtype']}, {versions}.{state} `python {PROGRAM}`", "",
            "Speed-up over `F.linear`, fastest of our kernels (the limit while weight bytes decide is 1.78):", "",
            table.render(["N x K", *map(str, tokens)], rows, "markdown", text={"N x K"}),
            *against_sparselt(kernels), *fewer_bits(kernels), *ceilings(kernels), *fused_mlp(kernels),
            *decoding(decode)]


def against_sparselt(kernels: list[dict]) -> list[str]:
    """Our fastest beside cuSPARSELt's, where weight bytes decide."""
    theirs = {(r["n"], r["k"], r["tokens"]): r["us"] for r in kernels
              if r["stage"] == "table" and r["method"] == "sparselt"}
    ratios = [theirs[key] / row["us"] for key, row in best_of_ours(kernels).items()
              if key[2] <= FEW and is_time(theirs.get(key))]
    if not ratios:
        return []
    text = f"Against cuSPARSELt's best algorithm, up to {FEW} tokens: geometric mean {geometric_mean(ratios):.2f}x"
    return [f"{text}, worst {min(ratios):.2f}x, over {len(ratios)} shapes and sizes.", ""]


def fewer_bits(kernels: list[dict]) -> list[str]:
    """What dense weights of fewer bits reach, for honesty: bits and zeros compete for the same bytes."""
    rows = [r for r in kernels if r["stage"] == "table" and isinstance(r.get("speedup"), float) and r["tokens"] <= FEW]
    means = {name: [r["speedup"] for r in rows if r["method"] == name] for name in ("int8", "int4")}
    parts = [f"{name} {geometric_mean(values):.2f}x" for name, values in means.items() if values]
    if not parts:
        return []
    text = f"Dense weights of fewer bits, torch's own kernels, up to {FEW} tokens: {', '.join(parts)} over `F.linear`"
    return [f"{text} (geometric means; they round the weights).", ""]


def ceilings(kernels: list[dict]) -> list[str]:
    """What the card itself can do."""
    rows = {row["method"]: row for row in kernels if row["stage"] == "ceiling"}
    if "read" not in rows:
        return []
    text = f"Ceilings measured in the same run: read {rows['read']['tb_per_s']:.2f} TB/s"
    rates = [f"{name} {rows[name]['tflop_per_s']:.0f} TFLOP/s" for name in ("matmul", "mma.sp") if name in rows]
    return [", ".join([text, *rates]) + ".", ""]


def fused_mlp(kernels: list[dict]) -> list[str]:
    """The fused half of an MLP against the dense chain."""
    rows = [[str(int(r["tokens"])), f"{r['us']:.1f}", f"{r['speedup']:.2f}"] for r in kernels
            if r["stage"] == "mlp" and r["method"] == "fused"]
    head = ["RMSNorm + gate_up + SwiGLU, tokens", "µs", "over the dense chain"]
    return [table.render(head, rows, "markdown")] if rows else []


def decoding(decode: list[dict]) -> list[str]:
    """Whole decoding steps, dense and packed."""
    head = ["Llama-3-8B shape, random weights", "batch", "ms a step", "tokens/s", "speed-up", "peak GiB"]
    rows = [[row["method"], str(int(row["batch"])), f"{row['ms_per_step']:.2f}", f"{row['tokens_per_s']:.0f}",
             f"{row['speedup']:.2f}" if isinstance(row.get("speedup"), float) else "", f"{row['peak_gib']:.1f}"]
            for row in decode]
    return [table.render(head, rows, "markdown", text={head[0]})] if rows else []


# ------------------------------------------------------------------ the picture

@drawing.drawn
def picture(found: dict[tuple[int, int], dict[int, float]], stamp: dict) -> "Figure":
    """Speed-up over dense against tokens, one line per shape, the limit drawn in."""
    figure = drawing.new_figure(8, 5)
    axes = figure.subplots()
    for (n, k), line in sorted(found.items()):
        tokens = sorted(line)
        axes.plot(tokens, [line[m] for m in tokens], marker="o", markersize=3, label=f"{n}x{k}")
    axes.axhline(LIMIT, color=drawing.INK, linestyle="--", linewidth=1)
    axes.text(1, LIMIT, " limit of weight bytes, 1.78x", va="bottom", fontsize=8)
    axes.axhline(1, color=drawing.MUTED, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up over F.linear")
    axes.set_title(f"2:4 linear layers, {stamp['dtype']}, {stamp['device']}")
    axes.legend(fontsize=7, ncols=2, title="N x K", title_fontsize=7)
    return figure
