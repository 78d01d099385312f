"""SparseGPT and Wanda at 2:4, this program against llm-compressor, on SmolLM2 with the same windows of tokens.

    python -m venv build/peer
    build/peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 'transformers<=5.17' datasets
    python scripts/bench/versus_llmcompressor.py --peer build/peer/bin/python --shared ../shared

One process a side and method (one_side.py), one after the other on the same machine. Each side keeps its own habits:
llm-compressor computes in the dtype that the weights are loaded in, this program on a CPU in float32 unless it gets
--compute stored, so both are run in both. Perplexity (in bfloat16) and zeros are of the saved folders, by this program.
Rows go into results/bench/llmcompressor.json as soon as they are there (the same command continues), the table into
its .md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import written

from oneshot import models
from oneshot.data import choose
from oneshot.measure import perplexity
from oneshot.pipeline.command import load
from oneshot.pipeline.compress import sparsity
from oneshot.report import table
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text
from oneshot.settings import parse

RUNS = [(method, side, dtype, computes) for method in ("wanda", "sparsegpt") for computes in ("float32", "bfloat16")
        for side, dtype in (("llmcompressor", computes), ("oneshot", "bfloat16"))]
LESS = 2.0  # asked: so many times less processor time, at no worse perplexity and no more memory


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(arguments(argv)), interrupted=lambda: "the same command continues")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/versus_llmcompressor.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer", help="the Python of an environment with llm-compressor; needed unless --page")
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of data/")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--nsamples", default="32")
    p.add_argument("--seqlen", default="512")
    p.add_argument("--eval-windows", default="64")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--page", action="store_true", help="measure nothing: the page of the JSON in --out")
    return p.parse_args(argv)


def work(args: argparse.Namespace) -> None:
    """Measure what is missing and write both files."""
    file = args.out / "llmcompressor.json"
    if not args.page:
        if not args.peer or not Path(args.peer).is_file():
            raise ValueError(f"--peer {args.peer}: give the Python of an environment with llm-compressor (see --help)")
        measure(args, file)
    page = markdown(json.loads(file.read_text()))
    write_text(page, args.out / "llmcompressor.md")
    print(page, end="")


def measure(args: argparse.Namespace, file: Path) -> None:
    """Run every side and method that has no row yet."""
    models.quiet()
    data = args.shared / "data"
    [cfg] = parse(["--model", args.model, "--method", "wanda", "--pattern", "2:4", "--no-dense", "--no-progress",
                   "--calibration", str(data / "c4_sample.jsonl"), "--nsamples", args.nsamples, "--seqlen", args.seqlen,
                   "--evaluate", str(data / "wikitext2_test.txt"), "--eval-windows", args.eval_windows,
                   "--compute", "stored"])
    model, tokenizer = load(cfg)
    calibration, texts = choose.calibration(cfg, model, tokenizer), choose.evaluation(cfg, model, tokenizer)
    (text,) = texts.values()
    settings = {"calibration": calibration.sha256, "text": text.sha256, "model": models.fingerprint(model)}
    found = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "nsamples": len(calibration.ids), "seqlen": calibration.ids.shape[1], "rows": [],
                 "eval_windows": len(text.ids), "dense_ppl": perplexity.perplexity(model, text.ids)[0]}
    with tempfile.TemporaryDirectory() as folder:
        source, tokens = Path(folder) / "dense", Path(folder) / "tokens.pt"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        torch.save(calibration.ids, tokens)
        for method, side, dtype, computes in RUNS:
            if any((r["method"], r["side"], r["computes"]) == (method, side, computes) for r in found["rows"]):
                continue
            out = Path(folder) / f"{method}-{side}-{computes}"
            python = args.peer if side == "llmcompressor" else sys.executable
            print(f"{method} by {side} in {computes}", file=sys.stderr, flush=True)
            done = subprocess.run([python, str(Path(__file__).with_name("one_side.py")), side, str(source), str(tokens),
                                   method, dtype, computes, str(out)], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"--peer: {side} {method}: {done.stderr.strip().splitlines()[-1:]}")
            pruned = type(model).from_pretrained(out, dtype=model.dtype).eval()
            models.compute_as_stored(pruned)
            found["rows"].append(json.loads((out / "measured.json").read_text()) | {
                "sparsity": sparsity(pruned), "ppl": perplexity.perplexity(pruned, text.ids)[0]})
            found["environment"] = environment.environment("cpu")
            write_json(found, file)


def markdown(found: dict) -> str:
    """The page: one table, and the ratios that are asked for."""
    rows, ratios = found["rows"], []
    head = ["method", "program", "weights in", "computes in", "seconds", "processor seconds", "peak GiB", "zeros",
            "ppl"]
    lines = [[r["method"], f"{r['side']} {r['version']}", r["dtype"], r["computes"], f"{r['seconds']:.0f}",
              f"{r['cpu_seconds']:.0f}", f"{r['peak_bytes'] / 2**30:.2f}", f"{100 * r['sparsity']:.2f} %",
              f"{r['ppl']:.2f}"] for r in rows]
    for r in rows:
        ours = next((o for o in rows if (o["side"], o["method"], o["computes"]) == (
            "oneshot", r["method"], r["computes"])), None)
        if ours and r is not ours:
            time, memory = (r[key] / ours[key] for key in ("cpu_seconds", "peak_bytes"))
            worse = ours["ppl"] / r["ppl"]
            missed = [what for what, kept in (("time", time >= LESS), ("perplexity", worse <= 1),
                                              ("memory", memory >= 1)) if not kept]
            ratios.append(f"- {r['method']} in {r['computes']}: {r['side']} takes {time:.2f} times the processor time "
                          f"and {memory:.2f} times the memory; {ours['side']} has {worse:.3f} times its perplexity: "
                          f"{'MISSED: ' + ', '.join(missed) if missed else 'met'}.")
    text = (f"Calibration: {found['nsamples']} windows of {found['seqlen']} tokens of C4, the same for both. "
            f"Perplexity: WikiText-2 test @{found['seqlen']}, the first {found['eval_windows']} windows; dense "
            f"{found['dense_ppl']:.2f}. Times are of the pruning call alone; peak: resident memory of the process.")
    return "\n".join(["# SmolLM2 at 2:4, this program and llm-compressor\n",
                      written("versus_llmcompressor.py", found["environment"]), text, "",
                      table.render(head, lines, "markdown", text={*head[:4]}),
                      f"Asked: at least {LESS:g} times less processor time at no worse perplexity and no more "
                      "memory.\n", *ratios, ""])


if __name__ == "__main__":
    sys.exit(main())
