"""Packed checkpoints against their dense twins: the same perplexity, at most 0.57x of the bytes, every tensor equal.

    python scripts/bench/packed.py --shared ../shared    # results/bench/packed.json; about ten minutes on a core
    python scripts/tables/tables.py                      # its table in results/tables.md

Three models (the texts are those of small_models.py), each pruned to 2:4 by SparseGPT and saved in bfloat16 and in
float16, once with its zeros and once with `--format packed`. Both are loaded by plain `from_pretrained` and measured on
the same windows, in float32 as always on a CPU. Exit code 1 if a claim does not hold.
"""

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path

import small_models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import oneshot  # noqa: F401 - teaches from_pretrained the packed format
from oneshot import checkpoint, models
from oneshot.checkpoint import packed, verify
from oneshot.data import Tokens, choose
from oneshot.measure.perplexity import perplexity
from oneshot.pipeline import checks, run
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json
from oneshot.settings import parse

MODELS, DTYPES = ("stories260k", "craftgpt-5m", "demo"), ("bfloat16", "float16")
FLAGS = ["--pattern", "2:4", "--seed", "0", "--device", "cpu", "--no-dense", "--no-progress", "--no-layer-errors"]
BYTES_LIMIT = 0.57
PERPLEXITY_LIMIT = 1e-6
"""Relative: eight float32 roundings. The weights are equal; only the order of a sum can differ."""


def main(argv: list[str] | None = None) -> int:
    """Exit code: see above."""
    return exit_code(lambda: work(arguments(argv)))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/packed.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")
    p.add_argument("--out", type=Path, default=Path("results/bench"), help="where packed.json goes")
    p.add_argument("--only", choices=MODELS, help="one model; demo needs no shared folder")
    p.add_argument("--dtype", choices=DTYPES, help="one dtype (default: both)")
    p.add_argument("--method", default="sparsegpt", help="solver")
    p.add_argument("--nsamples", type=int, default=128, help="calibration windows")
    p.add_argument("--windows", type=int, default=128, help="evaluation windows of each text, at most")
    return p.parse_args(argv)


def work(args: argparse.Namespace) -> int:
    """Make and measure all twins, write what was found. Exit code 1 where a claim does not hold."""
    models.quiet()
    rows, where = [], environment.environment("cpu")
    known = {"demo": small_models.DEMO} if args.only == "demo" else small_models.flags_of(args.shared)
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.only] if args.only else MODELS:
            for dtype in [args.dtype] if args.dtype else DTYPES:
                flags = [*known[name], *FLAGS, "--method", args.method, "--dtype", dtype,
                         "--nsamples", str(args.nsamples), "--eval-windows", str(args.windows)]
                rows.append(twins(name, dtype, flags, Path(folder) / f"{name}-{dtype}"))
                print(told(rows[-1]), flush=True)
    settings = {"method": args.method, "pattern": "2:4", "seed": 0, "nsamples": args.nsamples}
    write_json({"settings": settings, "environment": where,
                "limits": {"bytes": BYTES_LIMIT, "perplexity": PERPLEXITY_LIMIT}, "models": rows},
               args.out / "packed.json")
    for text in (wrong := [text for row in rows for text in faults(row)]):
        print(f"FAULT {text}", file=sys.stderr)
    return 1 if wrong else 0


def twins(name: str, dtype: str, flags: list[str], folder: Path) -> dict:
    """Prune and save both forms as the command line does, load both as anyone would, compare: a row of packed.json."""
    folders = {form: folder / form for form in ("dense", "packed")}
    for form, save in folders.items():
        configs = parse([*flags, "--evaluate", "none", "--format", form, "--save", str(save), "--results", str(folder)])
        checks.check(configs)
        run.run(configs[0])
    cfg, = parse(flags)
    loaded = {form: AutoModelForCausalLM.from_pretrained(saved) for form, saved in folders.items()}
    tokenizer = AutoTokenizer.from_pretrained(folders["packed"])
    manifest = checkpoint.read_manifest(folders["packed"])
    sizes = {form: pruned_bytes(saved, manifest["tensors"]) for form, saved in folders.items()}
    compared, different = verify.compare(folders["packed"], folders["dense"])
    return {
        "model": name, "dtype": dtype, "linears": len(manifest["tensors"]),
        "packed_linears": len(packed.linears(loaded["packed"])), "bytes": sizes,
        "file_bytes": {form: weight_files(saved) for form, saved in folders.items()},
        "ratio": sizes["packed"] / sizes["dense"],
        "calibration": (manifest["record"]["data"]["calibration"] or {}).get("source"),
        "perplexity": [{"text": text, **measured(loaded, tokens)}
                       for text, tokens in choose.evaluation(cfg, loaded["dense"], tokenizer).items()],
        "faults": {**{form: verify.verify(saved)[1] for form, saved in folders.items()}, "twin": different},
        "tensors_compared": compared,
    }


def measured(loaded: dict[str, nn.Module], tokens: Tokens) -> dict:
    """Perplexity of both on the same windows, and their relative difference."""
    values = {form: perplexity(model, tokens.ids, tokens.mask)[0] for form, model in loaded.items()}
    return {"source": tokens.source, "window": tokens.ids.shape[1], "windows": len(tokens.ids),
            "tokens": tokens.n_tokens, **values,
            "relative_difference": abs(values["packed"] - values["dense"]) / values["dense"]}


def pruned_bytes(folder: Path, linears: dict[str, dict]) -> int:
    """Bytes that the weights of `linears` take in a folder's files, metadata included, read off the files' headers.

    Raises ValueError naming the linear whose weight is not there.
    """
    keys = {f"{name}.{part}" for name in linears for part in ("weight", "metadata")}
    found = {key: entry["data_offsets"] for file in folder.glob("*.safetensors")
             for key, entry in header(file).items() if key in keys}
    if missing := [name for name in linears if f"{name}.weight" not in found]:
        raise ValueError(f"{folder.name}: no tensor {missing[0]}.weight in its files")
    return sum(end - start for start, end in found.values())


def header(file: Path) -> dict[str, dict]:
    """A safetensors file's table: {tensor: {"dtype", "shape", "data_offsets"}}."""
    with file.open("rb") as f:
        return json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))


def weight_files(folder: Path) -> int:
    """Bytes of the whole safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def faults(row: dict) -> list[str]:
    """The claims that a row breaks, as texts."""
    name = f"{row['model']} {row['dtype']}"
    found = [f"{name}: {text}" for texts in row["faults"].values() for text in texts]
    if row["packed_linears"] != row["linears"]:
        found.append(f"{name}: {row['packed_linears']} of {row['linears']} linears are packed")
    if not row["ratio"] <= BYTES_LIMIT:
        found.append(f"{name}: {row['ratio']:.4f}x of the dense bytes, more than {BYTES_LIMIT}")
    return found + [f"{name}: perplexity on {p['text']} differs by {p['relative_difference']:.1e}"
                    for p in row["perplexity"] if not p["relative_difference"] <= PERPLEXITY_LIMIT]


def told(row: dict) -> str:
    """A row in one line, for progress."""
    texts = ", ".join(f"{p['text']} {p['dense']:.6g} / {p['packed']:.6g}" for p in row["perplexity"])
    return f"{row['model']} {row['dtype']}: {row['ratio']:.4f}x; perplexity dense / packed: {texts}"


if __name__ == "__main__":
    sys.exit(main())
