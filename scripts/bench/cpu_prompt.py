"""Tokens per second of a prompt on a CPU, one forward pass over all its tokens: 2:4 against dense, interleaved.

    python scripts/bench/cpu_prompt.py                     # results/bench/cpu_prompt.json; minutes; then cpu_table.py
    python scripts/bench/cpu_prompt.py --toy --out DIR     # the same at toy size, for the tests

    transformers bf16, f32   the model as transformers runs it; float32 is faster where a CPU has no units for bfloat16
    dense, 2:4               the layers of oneshot_kernels; bf16, f32, int8, int4, whose inputs stay as they are
    rounded                  inputs are rounded to int8 too, and so is the output head

All have the same weights, 2:4 by magnitude. One token costs the reading of all weights (cpu_decode.py); a prompt costs
multiplications, of which 2:4 has half. Every way takes its turn in every round; medians over the rounds. `load` is what
other processes took, in cores.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from common import others, thread_counts
from cpu_decode import read
from cpu_forms import formed, pruned, rounding
from oneshot_kernels.cpu import library
from torch import nn
from tqdm import tqdm

from oneshot import models
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json

WAYS = {"transformers bf16": (None, "dense"), "transformers f32": (None, "dense"), "2:4 bf16": ("bf16", "2:4"),
        "2:4 f32": ("f32", "2:4"),
        **{f"{kind} {form}": (form, kind) for form in ("int8", "int4") for kind in ("dense", "2:4")}}
ROUNDED = ", rounded"


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(arguments(argv)))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/cpu_prompt.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default="smollm2,llama-1.1b", help="smollm2, a folder, or a shape, by commas")
    p.add_argument("--tokens", type=int, default=512, help="of the prompt")
    p.add_argument("--rounds", type=int, default=5, help="the median is kept")
    p.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="a toy model, two rounds")
    args = p.parse_args(argv)
    if args.toy:
        args.models, args.tokens, args.rounds = "toy", 80, 2
    args.threads = thread_counts(args.threads, args.toy)
    return args


def work(args: argparse.Namespace) -> None:
    """Measure everything; rows are stored model by model, in the place of older ones of the same model and threads."""
    models.quiet()
    file, before = args.out / "cpu_prompt.json", torch.get_num_threads()
    try:
        for name in args.models.split(","):
            made = make(name)
            for threads in args.threads:
                torch.set_num_threads(threads)
                kept = [row for row in read(file) if (row["model"], row["threads"]) != (name, threads)]
                write_json({"rows": [*kept, *measured(name, made, args)]}, file)
    finally:
        torch.set_num_threads(before)
    print(f"written: {file}; next: python scripts/tables/cpu_table.py")


def make(name: str) -> dict[str, nn.Module]:
    """{way: a model}, all of the same 2:4 weights; what they can share they share."""
    model, _ = pruned(name)
    wide = copy.deepcopy(model).float()
    made = {way: formed(wide if "f32" in way else model, *of, rounds=False)
            for way, of in tqdm(WAYS.items(), desc=f"{name}: models")}
    return made | {way + ROUNDED: rounding(made[way]) for way in WAYS if "int" in way}


def measured(name: str, made: dict[str, nn.Module], args: argparse.Namespace) -> list[dict]:
    """The rows of a model with the number of threads that torch has now."""
    size = made["transformers f32"].get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {way: [] for way in made}
    busy = others()
    for i in tqdm(range(args.rounds + 1), desc=f"{name}, {torch.get_num_threads()} threads", unit="round"):
        for way, model in made.items():
            rate = forward(model, ids)
            if i:  # the first round warms up
                found[way].append(rate)
    busy, where = max(busy, others()), environment.environment("cpu")
    return [{"model": name, "threads": torch.get_num_threads(), "way": way, "tokens": args.tokens,
             "tokens_per_second": statistics.median(rates), "spread": [min(rates), max(rates)], "load": round(busy, 1),
             "variant": library.why("linear"), "environment": where} for way, rates in found.items()]


@torch.no_grad()
def forward(model: nn.Module, ids: torch.Tensor) -> float:
    """Tokens per second until the keys and values of all of them, and the next token's logits, are there."""
    began = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return ids.shape[1] / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
