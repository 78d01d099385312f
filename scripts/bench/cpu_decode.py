"""Tokens per second of whole models on a CPU, batch 1: 2:4 against its dense twin and transformers, interleaved.

    python scripts/bench/cpu_decode.py                     # results/bench/cpu_decode.json; an hour; then cpu_table.py
    python scripts/bench/cpu_decode.py --toy --out DIR     # the same at toy size, for the tests

    transformers           generate as it is, weights as stored (bfloat16)
    transformers, compiled the same with a static cache and torch.compile
    dense, 2:4             generate with one compiled call a token (oneshot_kernels.fast_decode); bf16, int8, int4
    cut                    the same of --cut, a smaller dense model made from the first one
    rounded                inputs are rounded to int8 too, and so is the output head
    alone                  tokens per second of the compiled calls, without generate around them
    llama.cpp              what xllamacpp's server says of its own speed, for each file of --gguf, with as many threads

All but the cut ones and files have the same weights, 2:4 by magnitude (a model that is 2:4 stays as it is), so that
dense and 2:4 compute the same. The prompt is the beginning of TEXT, where a model has a tokenizer. Every way takes its
turn in every round; medians over the rounds. `bytes`: of weights, read for every token. `limit` is the share of the
time that reading these takes, at the speed of memory that is measured in the same run; above 1 where they stay in the
cache. `load` is what other processes took, in cores.

Texts are compared with those of transformers' plain generate, greedy, of the way's own weights, dequantised and stored
dense in bfloat16: `same` tokens, from the first on, are the same, and at the next one the logit of what the way said
lies `gap` below that of what transformers said, by transformers' own logits there (the gap of its two best, where they
are these two): null where all are the same. A rounding of inputs is not undone.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from common import Memory, last_level, others, thread_counts
from cpu_forms import bytes_of, formed, pruned, unpacked
from llama_server import Server, named, ways_of
from oneshot_kernels import fast_decode
from oneshot_kernels.cpu import decode, library
from torch import nn
from tqdm import tqdm

from oneshot import models
from oneshot.models import Tokenizer
from oneshot.pipeline.generate import timed
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json

KINDS = ("dense", "2:4", "cut")
WAYS = {"transformers": (None, "dense", False), "transformers, compiled": (None, "dense", False),
        **{f"{kind} {form}": (form, kind, False) for form in ("bf16", "int8", "int4") for kind in KINDS},
        **{f"{kind} {form}, rounded": (form, kind, True) for form in ("int8", "int4") for kind in KINDS}}
PROMPT = 16  # tokens
TEXT = ("The history of science is the story of how people came to understand the world around them, from the first "
        "calendars to the structure of the atom.")
READ = max(256 << 20, 2 * last_level())  # bytes of memory that are read over and over, for its speed


class Told(NamedTuple):
    """What transformers says behind the prompt: tokens, and the logits (n, V) that it chose each of them by."""

    tokens: list[int]
    logits: torch.Tensor


class Subject(NamedTuple):
    """A model with all its ways. ids: the prompt (1, T). files: {way: GGUF file}. told: what `same` compares with."""

    made: dict[str, nn.Module]
    ids: torch.Tensor
    files: dict[str, Path]
    told: dict[str, Told]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    def run() -> None:
        with named("--gguf"):
            work(arguments(argv))
    return exit_code(run)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/cpu_decode.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default="smollm2,llama-1.1b", help="smollm2, a folder, or a shape, by commas")
    p.add_argument("--ways", default=";".join(WAYS), help="names separated by semicolons; transformers is always there")
    p.add_argument("--gguf", default="", help="files that llama.cpp runs, by commas: [MODEL=]FILE. "
                   "MODEL: of --models, by default the first, or cut")
    p.add_argument("--cut", help="folder of a smaller dense model, beside the first model")
    p.add_argument("--tokens", type=int, default=64, help="generated in each round")
    p.add_argument("--rounds", type=int, default=5, help="the median is kept")
    p.add_argument("--threads", default=f"1,{torch.get_num_threads()}")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="a toy model, two rounds")
    args = p.parse_args(argv)
    if args.toy:
        args.models, args.tokens, args.rounds = "toy", 8, 2
    args.threads = thread_counts(args.threads, args.toy)
    args.ways, args.models = args.ways.split(";"), args.models.split(",")
    if unknown := [way for way in args.ways if way not in WAYS]:
        raise ValueError(f"--ways {unknown[0]}: there are {'; '.join(WAYS)}")
    args.files = ways_of(args.gguf, (*args.models, "cut"))
    return args


def work(args: argparse.Namespace) -> None:
    """Measure everything; rows are stored model by model, in the place of older ones of the same model and threads."""
    models.quiet()
    file, before = args.out / "cpu_decode.json", torch.get_num_threads()
    try:
        for name in args.models:
            torch.set_num_threads(args.threads[-1])
            subject = make(name, args)
            for threads in args.threads:
                torch.set_num_threads(threads)
                kept = [row for row in read(file) if (row["model"], row["threads"]) != (name, threads)]
                write_json({"rows": [*kept, *measured(name, subject, args)]}, file)
    finally:
        torch.set_num_threads(before)
    print(f"written: {file}; next: python scripts/tables/cpu_table.py")


def read(file: Path) -> list[dict]:
    """The rows; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


# ------------------------------------------------------------------ models

def make(name: str, args: argparse.Namespace) -> Subject:
    """A model's ways, all but the cut ones of the same 2:4 weights; what they can share they share."""
    model, tokenizer = pruned(name)
    ids, made, told, first = prompt(model, tokenizer), {}, {}, name == args.models[0]
    cut = models.load(args.cut, dtype="bfloat16")[0] if args.cut and first else None
    ways = [way for way in args.ways if way != "transformers" and (cut or WAYS[way][1] != "cut")]
    for way in tqdm(["transformers", *ways], desc=f"{name}: models"):
        source = cut if WAYS[way][1] == "cut" else model
        made[way] = formed(source, *WAYS[way])
        told[way] = plainly(unpacked(made[way], source), ids, args.tokens)
        if "compiled" in way:
            made[way].forward = torch.compile(made[way].forward)
        if "transformers" not in way and (why := fast_decode(made[way])):
            raise ValueError(f"{name}, {way}: {why}")
    files = {way: file for (owner, way), file in args.files.items() if owner == name or (owner == "cut" and first)}
    for way, file in files.items():
        told[way] = plainly(models.load(str(file), dtype="bfloat16", flag="--gguf")[0], ids, args.tokens)
    return Subject(made, ids, files, told)


def prompt(model: nn.Module, tokenizer: Tokenizer | None) -> torch.Tensor:
    """Token ids (1, PROMPT) of TEXT, or random ones where there is no tokenizer."""
    if tokenizer is not None:
        return tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :PROMPT]
    size = model.get_input_embeddings().num_embeddings
    return torch.randint(size, (1, PROMPT), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ measuring

def measured(name: str, subject: Subject, args: argparse.Namespace) -> list[dict]:
    """The rows of a model with the number of threads that torch has now."""
    made, ids, files, told = subject
    turns: dict[str, Callable[[], tuple[float, list[int]]]] = {
        way: lambda model=model, way=way: generated(model, ids, args.tokens, "compiled" in way)
        for way, model in made.items()}
    turns |= {f"{way}, alone": lambda model=model: alone(model, ids, args.tokens) for way, model in made.items()
              if "transformers" not in way}
    servers = {way: Server(file, torch.get_num_threads(), "F16") for way, file in files.items()}
    turns |= {way: lambda server=server: llama_cpp(server, ids, args.tokens) for way, server in servers.items()}
    memory = Memory(READ >> 20)
    found: dict[str, list[tuple[float, list[int]]]] = {way: [] for way in turns}
    speeds, busy = [], others()
    for i in tqdm(range(args.rounds + 1), desc=f"{name}, {torch.get_num_threads()} threads", unit="round"):
        for way, turn in turns.items():
            result = turn()
            if i:  # the first round compiles and warms up
                found[way].append(result)
        speeds.append(memory.speed())
    busy, speed = max(busy, others()), statistics.median(speeds)
    where, rows = environment.environment("cpu"), []
    for way, results in found.items():
        rate = statistics.median(rate for rate, _ in results)
        size = files[way].stat().st_size if way in files else bytes_of(made[way.removesuffix(", alone")])
        same, gap = parted(results[0][1], told[way]) if way in told else (None, None)
        rows.append({"model": name, "threads": torch.get_num_threads(), "way": way, "tokens_per_second": rate,
                     "spread": [min(r for r, _ in results), max(r for r, _ in results)], "bytes": size,
                     "limit": rate * size / speed, "same": same, "gap": gap, "tokens": args.tokens,
                     "read": speed, "load": round(busy, 1), "variant": library.why("step"), "environment": where})
    return rows


def plainly(model: nn.Module, ids: torch.Tensor, n: int) -> Told:
    """What transformers' own generate says, greedy."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                         pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    return Told(out.sequences[0, ids.shape[1]:].tolist(), torch.cat(out.logits).float())


def parted(said: Sequence[int], told: Told) -> tuple[int, float | None]:
    """(`same`, `gap`), see above."""
    i = next((i for i, (ours, theirs) in enumerate(zip(said, told.tokens, strict=False)) if ours != theirs), None)
    if i is None:
        return min(len(said), len(told.tokens)), None
    return i, float(told.logits[i, told.tokens[i]] - told.logits[i, said[i]])


def generated(model: nn.Module, ids: torch.Tensor, n: int, compiled: bool) -> tuple[float, list[int]]:
    """(tokens per second after the first, the n tokens) of greedy generation."""
    options = {"cache_implementation": "static"} if compiled else {}
    out = timed(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, n, "cpu", pad_token_id=0, **options)
    return out.rate, out.ids[0, ids.shape[1]:].tolist()


def llama_cpp(server: Server, ids: torch.Tensor, n: int) -> tuple[float, list[int]]:
    """`generated` by llama.cpp."""
    found = server.complete(ids[0].tolist(), n)
    return found["timings"]["predicted_per_second"], found["tokens"]


@torch.no_grad()
def alone(model: nn.Module, ids: torch.Tensor, n: int) -> tuple[float, list[int]]:
    """(tokens per second, []) of the compiled calls by themselves, behind the same prompt."""
    cache, token, decoder = model(ids, use_cache=True).past_key_values, ids[:, :1], decode.decoder_of(model)
    decoder.step(token, cache)
    began = time.perf_counter()
    for _ in range(n - 1):
        decoder.step(token, cache)
    return (n - 1) / (time.perf_counter() - began), []


if __name__ == "__main__":
    sys.exit(main())
