"""Tokens per second of whole models on a CPU, batch 1: 2:4 against its dense twin and transformers, interleaved.

    python scripts/bench/cpu_decode.py                     # results/bench/cpu_decode.json and .md; some minutes
    python scripts/bench/cpu_decode.py --toy --out DIR     # the same at toy size, for the tests

    transformers           generate as it is, weights as stored (bfloat16)
    transformers, compiled the same with a static cache and torch.compile
    dense, 2:4             generate with one compiled call a token (oneshot_kernels.fast_decode); bf16, int8, int4
    cut                    the same of --cut, a smaller dense model made from the first one
    rounded                inputs are rounded to int8 too, and so is the output head
    alone                  tokens per second of the compiled calls, without generate around them
    llama.cpp              what xllamacpp's server says of its own speed, for each file of --gguf (of the first model)

All but the cut ones have the same weights, 2:4 by magnitude, so that dense and 2:4 compute the same. Every way takes
its turn in every round; medians over the rounds. `same` is how many tokens, from the first on, are those of
transformers. MB: of weights, read for every token. `limit` is the share of the time that reading these takes, at the
speed of memory that is measured in the same run; above 1 where they stay in the cache. `load` is what other processes
took, in cores.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Memory, last_level, others, thread_counts, written
from llama_server import Server, named
from oneshot_kernels import fast_decode, sparsify
from oneshot_kernels.cpu import decode, integers, library
from torch import nn
from tqdm import tqdm

from oneshot import models
from oneshot.pipeline.generate import Clock
from oneshot.prune.patterns import NM
from oneshot.report.table import render
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text

SHAPES = {  # random weights of these shapes, Llama's architecture
    "llama-1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                   "num_key_value_heads": 4, "vocab_size": 32000},
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 211}}
KINDS = ("dense", "2:4", "cut")
WAYS = {"transformers": (None, "dense", False), "transformers, compiled": (None, "dense", False),
        **{f"{kind} {form}": (form, kind, False) for form in ("bf16", "int8", "int4") for kind in KINDS},
        **{f"{kind} {form}, rounded": (form, kind, True) for form in ("int8", "int4") for kind in KINDS}}
PROMPT = 16  # tokens
READ = max(256 << 20, 2 * last_level())  # bytes of memory that are read over and over, for its speed


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
    p.add_argument("--gguf", default="", help="files that llama.cpp runs beside the first model, by commas")
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
    args.ways = args.ways.split(";")
    if unknown := [way for way in args.ways if way not in WAYS]:
        raise ValueError(f"--ways {unknown[0]}: there are {'; '.join(WAYS)}")
    return args


def work(args: argparse.Namespace) -> None:
    """Measure everything; rows are stored model by model, in the place of older ones of the same model and threads."""
    models.quiet()
    file, before = args.out / "cpu_decode.json", torch.get_num_threads()
    try:
        for name in args.models.split(","):
            first = name == args.models.split(",")[0]
            made, args.files = make(name, args), [Path(file) for file in args.gguf.split(",") if file and first]
            for threads in args.threads:
                torch.set_num_threads(threads)
                kept = [row for row in read(file) if (row["model"], row["threads"]) != (name, threads)]
                write_json({"rows": [*kept, *measured(name, made, args)]}, file)
    finally:
        torch.set_num_threads(before)
    write_text(page(read(file)), args.out / "cpu_decode.md")
    print(f"written: {args.out / 'cpu_decode.md'}")


def read(file: Path) -> list[dict]:
    """The rows; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


# ------------------------------------------------------------------ models

def make(name: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """{way: model}, all but the cut ones of the same 2:4 weights; what they can share they share."""
    model = random_model(name) if name in SHAPES else models.load(name, dtype="bfloat16")[0]
    with torch.no_grad():
        for weight in models.all_weights(model):
            W = weight.get()
            weight.set(W * NM(2, 4).keep(W.abs()))
    made = {}
    cut = models.load(args.cut, dtype="bfloat16")[0] if args.cut and name == args.models.split(",")[0] else None
    ways = [way for way in args.ways if way != "transformers" and (cut or WAYS[way][1] != "cut")]
    for way in tqdm(["transformers", *ways], desc=f"{name}: models"):
        made[way] = formed(cut if WAYS[way][1] == "cut" else model, *WAYS[way])
        if "compiled" in way:
            made[way].forward = torch.compile(made[way].forward)
        if "transformers" not in way and (why := fast_decode(made[way])):
            raise ValueError(f"{name}, {way}: {why}")
    return made


def random_model(name: str) -> nn.Module:
    """A Llama of this shape with random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name], pad_token_id=0)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def formed(model: nn.Module, form: str | None, kind: str, rounds: bool) -> nn.Module:
    """A model of the same weights in another form, which shares what stays as it is. kind: one of KINDS."""
    twin, sparse = copy.deepcopy(model, {id(t): t for t in models.tensors_of(model)}), kind == "2:4"
    if form == "bf16" and sparse:
        sparsify(twin)
    elif form in ("int8", "int4"):
        for weight in models.all_weights(twin):
            owner, _, child = weight.name.removesuffix(".weight").rpartition(".")
            setattr(twin.get_submodule(owner), child, integers.IntegerLinear.from_linear(
                weight.owner, bits=int(form[-1]), sparse=sparse, round_inputs=rounds))
    if rounds:
        twin.lm_head = integers.IntegerLinear.from_linear(twin.lm_head, round_inputs=True)
    return twin


def bytes_of(model: nn.Module) -> int:
    """What is read for a token: all tensors but an embedding that is no output head, of which one row is."""
    every = {t.data_ptr(): t.nbytes for t in models.tensors_of(model)}
    embedding, head = model.get_input_embeddings().weight, getattr(model.lm_head, "weight", None)
    return sum(every.values()) - (embedding.nbytes if head is None or head.data_ptr() != embedding.data_ptr() else 0)


# ------------------------------------------------------------------ measuring

def measured(name: str, made: dict[str, nn.Module], args: argparse.Namespace) -> list[dict]:
    """The rows of a model with the number of threads that torch has now."""
    size = made["transformers"].get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    turns: dict[str, Callable[[], tuple[float, list[int]]]] = {
        way: lambda model=model, way=way: generated(model, ids, args.tokens, "compiled" in way)
        for way, model in made.items()}
    turns |= {f"{way}, alone": lambda model=model: alone(model, ids, args.tokens) for way, model in made.items()
              if "transformers" not in way}
    servers = {f"llama.cpp {file.parent.name}/{file.name}": (Server(file, torch.get_num_threads(), "F16"),
                                                             file.stat().st_size) for file in args.files}
    turns |= {way: lambda server=server: llama_cpp(server, ids, args.tokens) for way, (server, _) in servers.items()}
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
    said = found["transformers"][0][1]
    where, rows = environment.environment("cpu"), []
    for way, results in found.items():
        rate = statistics.median(rate for rate, _ in results)
        size = servers[way][1] if way in servers else bytes_of(made[way.removesuffix(", alone")])
        same = next((i for i, (a, b) in enumerate(zip(results[0][1], said, strict=False)) if a != b), len(said))
        rows.append({"model": name, "threads": torch.get_num_threads(), "way": way, "tokens_per_second": rate,
                     "spread": [min(r for r, _ in results), max(r for r, _ in results)], "bytes": size,
                     "limit": rate * size / speed, "same": same if results[0][1] else None, "tokens": args.tokens,
                     "read": speed, "load": round(busy, 1), "variant": library.why("step"), "environment": where})
    return rows


def generated(model: nn.Module, ids: torch.Tensor, n: int, compiled: bool) -> tuple[float, list[int]]:
    """(tokens per second after the first, the n tokens) of greedy generation."""
    clock = Clock("cpu")
    options = {"cache_implementation": "static"} if compiled else {}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                         pad_token_id=0, streamer=clock, **options)
    times = clock.times[1:]
    return (len(times) - 1) / (times[-1] - times[0]), out[0, ids.shape[1]:].tolist()


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


# ------------------------------------------------------------------ the page

def page(rows: list[dict]) -> str:
    """One table for each model and number of threads."""
    parts = ["# Tokens per second on a CPU, batch 1\n"]
    for name, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        own = [row for row in rows if (row["model"], row["threads"]) == (name, threads)]
        rate = {row["way"]: row["tokens_per_second"] for row in own}
        busy = ": **busy**, only ratios count" if own[0]["load"] > 0.3 else ""
        parts += [f"## {name}, {threads} thread{'s' * (threads > 1)}\n",
                  written("cpu_decode.py", own[0]["environment"]) + "\n",
                  f"{own[0]['tokens']} tokens a round behind {PROMPT}; memory reads {own[0]['read'] / 1e9:.1f} GB/s; "
                  f"kernels: {own[0]['variant']}; load of others {own[0]['load']}{busy}.\n"]
        body = [[row["way"], f"{row['tokens_per_second']:.1f}", f"{row['spread'][0]:.1f}-{row['spread'][1]:.1f}",
                 f"{row['tokens_per_second'] / rate['transformers']:.2f}x", over(row["way"], rate),
                 f"{row['bytes'] / 1e6:.0f}", f"{row['limit']:.2f}", "-" if row["same"] is None else str(row["same"])]
                for row in own]
        head = ["way", "tokens/s", "of the rounds", "/ transformers", "/ dense twin", "MB", "limit", "same"]
        parts.append(render(head, body, "markdown", text={"way"}))
    return "\n".join(parts)


def over(way: str, rate: dict[str, float]) -> str:
    """A 2:4 way's speed over that of its dense twin."""
    twin = way.replace("2:4", "dense")
    return f"{rate[way] / rate[twin]:.2f}x" if twin != way and twin in rate else "-"


if __name__ == "__main__":
    sys.exit(main())
