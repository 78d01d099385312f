"""`oneshot generate DIR --prompt "..."`: generate text with a dense or packed model and measure the speed.

With `--compare OTHER_DIR` the other model continues the same prompt, and both are shown side by side: text, time to the
first token, tokens per second after it, memory of the weights, peak memory. Greedy unless `--temperature` is given.

On a CPU every token after the first is one compiled call, for dense models as for packed ones, where the model is of a
family that oneshot_kernels.fast_decode knows; the table says what computed it, and why. There 2:4, int8 and int4 layers
that were saved dense are computed by their kernels too, unless `--dtype` asks for another dtype than the stored one.
"""

import argparse
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..checkpoint import MANIFEST, rounded
from ..checkpoint.packed import linears
from ..data import embedding
from ..models import Tokenizer
from ..models.loading import DTYPES
from ..report.table import render
from ..runtime import environment
from ..runtime.command import Parser, exit_code
from ..settings.values import MOST
from . import forms


class Clock:
    """A streamer for transformers' `generate` that records when each token arrives."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called at the end."""


@dataclass(frozen=True)
class Timed:
    """ids (1, T + n): the prompt and what follows. first: seconds to the first token. rate: tokens a second after it,
    NaN where there is one alone."""

    ids: torch.Tensor
    first: float
    rate: float


def timed(model: nn.Module, inputs: Mapping[str, torch.Tensor], n: int, device: str, **options: Any) -> Timed:
    """Generate n tokens, greedily unless the options of transformers' `generate` say otherwise.

    inputs: `input_ids` (1, T) and `attention_mask`, on the device.
    """
    clock, began = Clock(device), time.perf_counter()
    ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, **options},
                         streamer=clock)
    times = clock.times[1:]  # the first call is for the prompt
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float("nan")
    return Timed(ids, times[0] - began, rate)


def prepared(name: str, flag: str, args: argparse.Namespace) -> tuple[nn.Module, Tokenizer, str, str]:
    """(model, tokenizer, what computes a token, what its layers are beside dense) of a model, ready to generate.

    flag: the start of error messages. On a CPU every single token is one compiled call where that is possible; else it
    is said why not.
    """
    from oneshot_kernels import Rounded24Linear, fast_decode, sparsify
    from oneshot_kernels.cpu.integers import IntegerLinear

    on_cpu = torch.device(args.device).type == "cpu"
    used = forms.usable(name, args.device) if on_cpu and args.dtype == "auto" else {}
    slow = environment.emulates_bfloat16(args.device)  # the prompt would take several times as long
    dtype = "float32" if slow and args.dtype == "auto" and not used else args.dtype
    model, tokenizer = models.load(name, flag=flag, dtype=dtype, trust_remote_code=args.trust_remote_code)
    model.to(args.device)
    packed = bool(linears(model))
    if used:
        try:
            forms.with_kernels(model, used, rounded.read(Path(name)))
        except ValueError as error:
            raise ValueError(f"{flag} {name}: is not what {MANIFEST} says, {error}".strip()) from error
        model = model.float() if slow else model
    integers = [layer for layer in model.modules() if isinstance(layer, (IntegerLinear, Rounded24Linear))]
    if args.round_inputs and not flag and not integers:
        raise ValueError(f"--round-inputs: {name} has no int8 or int4 layer with a kernel; leave it out")
    form = "packed" if packed else " and ".join(forms.running(model))
    if packed:  # q, k, v and gate, up in one launch each
        sparsify(model, round_inputs=args.round_inputs)
    for layer in integers if used else ():
        layer.round_inputs = args.round_inputs
    if not on_cpu:
        return model, tokenizer, "transformers", form
    with models.own_code(cannot(name, flag, model), ()):
        why = "--static" if args.static else fast_decode(model)
    return model, tokenizer, f"transformers ({why})" if why else forms.ONE_CALL, form


def cannot(name: str, flag: str, model: nn.Module) -> str:
    """The start of the message for a model whose own code fails."""
    return f"{flag} {name}: {type(model).__name__} cannot generate".strip()


def measure(name: str, flag: str, prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    """Continue `prompt` with the model `name`: the text, seconds to the first token, tokens per second, bytes.

    flag: the start of error messages. The first generation is a warm-up and is not timed.
    """
    from oneshot_kernels import decoder_of

    gc.collect()
    environment.reset_peak_memory(args.device)
    model, tokenizer, decoding, form = prepared(name, flag, args)
    with models.own_code("--prompt: the tokenizer cannot take it"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise ValueError("--prompt: has no token; give some text")
    embedding.check(inputs["input_ids"].long(), model, tokenizer, "--prompt")
    inputs = inputs.to(args.device)
    most = models.max_positions(model)
    if most and length + args.max_new_tokens > most:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: with a prompt of {length} tokens that is more than "
                         f"the {most} positions of {name}")
    options = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    options["pad_token_id"] = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    if args.static:
        options["cache_implementation"] = "static"
    decoder = decoder_of(model)
    made = decoder.tokens if decoder else 0
    for _ in range(2):
        torch.manual_seed(args.seed)
        with models.own_code(cannot(name, flag, model), ()):
            out = timed(model, inputs, args.max_new_tokens, args.device, **options)
    tokens = out.ids.shape[1] - length
    if decoder and tokens > 1 and decoder.tokens == made:
        decoding = "transformers (it generates otherwise than token by token with the plain cache)"
    return {"model": str(name) + (f" ({form})" if form else ""), "decoding": decoding,
            "text": tokenizer.decode(out.ids[0, length:], skip_special_tokens=True), "tokens": tokens,
            "first_s": out.first, "tokens_per_s": out.rate,
            "peak_bytes": environment.peak_memory(args.device),
            "weights_bytes": sum(t.numel() * t.element_size() for t in models.tensors_of(model))}


def show(rows: list[dict], prompt: str) -> str:
    """The continuations, then a table with one line per model."""
    lines = []
    for row in rows:
        lines += [f"--- {row['model']}", prompt + row["text"], ""]
    body = [[row["model"], f"{row['first_s']:.3f}", f"{row['tokens_per_s']:.1f}", f"{row['weights_bytes'] / 2**20:.1f}",
             f"{row['peak_bytes'] / 2**20:.0f}", row["decoding"]] for row in rows]
    head = ["model", "first token s", "tokens/s", "weights MiB", "peak MiB", "a token by"]
    return "\n".join([*lines, render(head, body, "terminal", text={"model", "a token by"}).rstrip("\n")])


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code (runtime/command.py)."""
    return exit_code(lambda: run(argv))


def run(argv: list[str] | None) -> None:
    """Generate with one or two models and print their texts and speeds. Raises ValueError naming the flag."""
    args = arguments(argv)
    models.quiet()
    environment.check_device(args.device)
    if not args.model:
        raise ValueError("model: is empty; give a folder, a name on the hub, or demo")
    if args.max_new_tokens < 1:
        raise ValueError("--max-new-tokens: must be at least 1")
    if args.temperature is not None and not args.temperature > 0:
        raise ValueError(f"--temperature {args.temperature:g}: must be above 0; leave it out for greedy")
    if abs(args.seed) > MOST[int]:
        raise ValueError(f"--seed {args.seed}: must be a number from {-MOST[int]} to {MOST[int]}")
    rows = [measure(name, flag, args.prompt, args) for name, flag in ((args.model, ""), (args.compare, "--compare"))
            if name]
    print(show(rows, args.prompt))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line."""
    p = Parser(prog="oneshot generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="folder, name on the hub, or demo")
    p.add_argument("--prompt", default="The history of science", help="text to continue (default: %(default)r)")
    p.add_argument("--compare", metavar="MODEL", help="a second model, for instance the dense one")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                   help="number of tokens to generate (default: %(default)s)")
    p.add_argument("--temperature", type=float, help="sample at this temperature (default: greedy)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1")
    p.add_argument("--dtype", default="auto", choices=DTYPES,
                   help="auto: as stored; float32 on a CPU that emulates bfloat16")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository brings")
    p.add_argument("--round-inputs", action="store_true",
                   help="int8 and int4 layers on a CPU round their inputs to int8 too: faster, not as measured")
    p.add_argument("--static", action="store_true", help="use a static cache and compiled decoding (GPU)")
    args = p.parse_args(argv)
    args.device = environment.resolve_device(args.device)
    return args
