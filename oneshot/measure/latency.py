"""Latency: how long a prompt and a token take on the device at hand, beside the dense model in the same run.

    prefill   one prompt of PROMPT tokens through the model, up to the logits of the next one: the time to first token
    decode    one token for each of 1 and of BATCH sequences, with the KV cache of what came before

Dense and changed model take turns, round by round, after one round to warm up; a number is the median over the rounds,
its spread the quartiles. A speedup is the median of the rounds' own ratios, so that what slows the machine down for a
while slows both. Everything is computed in the dtype of computing (float32 on a CPU) by the model's own code, without
a compiler: on a CPU a small model is bound by Python and by the number of operations, not by bytes. (`oneshot fit` and
`oneshot latency` time models that decode by one compiled call, pipeline/forms.py.) On a GPU launching kernels would
bind it the same way, so a decoded token is the replay of a CUDA graph with a static cache; where one of the models
cannot be captured, none is, and the row's `graph` is False.

Peak memory is that of the GPU while a prompt goes through. On a CPU it would be the whole process's, which holds both
models and whatever came before, so there it is not in the row.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import models
from ..runtime import environment
from ..runtime.flag import Settings, flag
from . import Found, Subject

PROMPT, BATCH, STEPS, ROUNDS = 512, 8, 16, 7
WARM = 3  # steps before a graph is captured
KINDS = ("prefill", "decode1", f"decode{BATCH}")
NO_GRAPHS = ("decoding was timed without CUDA graphs, which this model does not allow: launching kernels may take "
             "longer than they do")
higher = tuple(f"{kind}_speedup" for kind in KINDS)


@dataclass(frozen=True)
class Config:
    latency: bool = flag(False, "measure the time of a prompt and of a token, beside the dense model, in turns",
                         section="evaluation", bears_on="measuring", added=True)


def asked(cfg: Settings) -> bool:
    """Whether the flag is given."""
    return cfg.latency


def measure(subject: Subject) -> Found:
    """latency/KIND_ms of every kind, latency/KIND_speedup over the dense model, and the record's `latency`."""
    names = {"model": subject.model} | ({} if subject.cfg.row == "dense" else {"dense": subject.dense})
    rows = compare(names, subject.cfg.device)
    found = Found(parts={"latency": rows})
    if rows["model"].get("graph") is False:
        found.warnings.append(f"--latency: {NO_GRAPHS}")
    for kind in KINDS:
        for key, value in (("ms", rows["model"][kind]["median"]), ("speedup", rows["model"][kind].get("speedup"))):
            if value is not None:
                found.metrics[f"latency/{kind}_{key}"] = value
                found.info[f"latency/{kind}_{key}"] = {"window": None, "windows": ROUNDS}
    return found


@torch.no_grad()
def compare(named: dict[str, nn.Module], device: str, rounds: int = ROUNDS) -> dict[str, dict]:
    """{name: its row}: for each kind {"median", "low", "high"} in ms and, where there is a model "dense", {"speedup"}.

    A row also has parameters, bytes, multiply-adds of a token and the share of attention and MLP; on a GPU peak memory,
    and whether tokens were decoded by graphs.
    """
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in named}
    rows: dict[str, dict] = {name: {} for name in named}
    with contextlib.ExitStack() as stack:
        for model in named.values():
            stack.enter_context(models.resident(model, device))
        graph = graphs(named.values(), device)
        for number in range(rounds + 1):
            for name, model in named.items():
                for kind in KINDS:
                    environment.reset_peak_memory(device)
                    ms = 1000 * one(model, kind, device, graph)
                    if number:  # the first is to warm up
                        times[name][kind].append(ms)
                    elif kind == "prefill" and torch.device(device).type != "cpu":
                        rows[name]["peak_memory_bytes"] = environment.peak_memory(device)
        for name, model in named.items():
            rows[name] |= size(model) | {"parts": parts(model, device)} | ({"graph": graph} if on_gpu(device) else {})
    for name, own in times.items():
        for kind, values in own.items():
            low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values * 3)
            rows[name][kind] = {"median": statistics.median(values), "low": low, "high": high}
            if "dense" in times and name != "dense":
                ratios = [d / v for d, v in zip(times["dense"][kind], values, strict=True)]
                rows[name][kind]["speedup"] = statistics.median(ratios)
    return rows


def length(model: nn.Module, wanted: int) -> int:
    """A number of tokens that leaves the model room for those after it."""
    room = WARM + STEPS
    return max(2, min(wanted, (models.max_positions(model) or wanted + room) - room))


def prompt(model: nn.Module, kind: str, device: str) -> torch.Tensor:
    """Token ids, int64 (batch, T), that a kind begins with."""
    batch = 1 if kind == "prefill" else int(kind.removeprefix("decode"))
    T = length(model, PROMPT if kind == "prefill" else 64)
    return (torch.arange(batch * T, device=device).view(batch, T) * 7919) % models.embedded(model)


def graphs(every: Iterable[nn.Module], device: str) -> bool:
    """Whether all of these models decode by CUDA graphs on a device, one sequence and many: all are timed alike."""
    return on_gpu(device) and all(captured(model, prompt(model, kind, device)) for model in every for kind in KINDS[1:])


def one(model: nn.Module, kind: str, device: str, graph: bool) -> float:
    """Seconds of one prefill, or of one step of decoding: the median over STEPS steps.

    graph: whether a step is the replay of a CUDA graph, as `graphs` said.
    """
    ids = prompt(model, kind, device)
    if kind == "prefill":
        return timed(lambda: model(input_ids=ids, use_cache=True), device)
    if graph and (replay := captured(model, ids)):
        return statistics.median(timed(replay, device) for _ in range(STEPS))
    return statistics.median(steps(model, model(input_ids=ids, use_cache=True), device))


def captured(model: nn.Module, ids: torch.Tensor) -> Callable[[], object] | None:
    """What decodes one more token for each sequence at each call, on a GPU; None where the model does not allow it.

    ids: int64 (batch, T), the tokens before.
    """
    try:
        cache = models.static_cache(model, ids.shape[1] + WARM + STEPS)
        token = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        def step() -> None:
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token.copy_(out.logits[:, -1:].argmax(-1))
        return graphed(step)
    except Exception:  # another cache, experts that are counted on the CPU: a family's code can raise anything
        return None


def graphed(work: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of some work, which is done WARM times before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def on_gpu(device: str) -> bool:
    """Whether a device has CUDA graphs."""
    return torch.device(device).type == "cuda"


def steps(model: nn.Module, out: Any, device: str) -> list[float]:
    """Seconds of each of STEPS tokens that are decoded one after the other. out: what the model gave for the prompt."""
    seconds = []
    for _ in range(STEPS):
        token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        found = []
        seconds.append(timed(lambda token=token, cache=cache, found=found: found.append(
            model(input_ids=token, past_key_values=cache, use_cache=True)), device))
        out = found[0]
    return seconds


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that some work takes, to its end on the device."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: str) -> None:
    """Wait for the device."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def size(model: nn.Module) -> dict[str, int]:
    """{"parameters", "bytes", "multiply_adds"}: bytes as they would be stored, multiply-adds of one token's linears."""
    own = {id(p): p for p in model.parameters()}.values()
    linears = sum(w.size for w in models.all_weights(model))
    head = model.get_output_embeddings()
    return {"parameters": sum(p.numel() for p in own),
            "bytes": sum(p.numel() for p in own) * torch.empty(0, dtype=model.config.dtype or torch.float32).itemsize,
            "multiply_adds": linears + (head.weight.numel() if head is not None else 0)}


def parts(model: nn.Module, device: str) -> dict[str, float]:
    """{"attention", "mlp", "rest"}: their shares of the time of one decoded token, batch 1."""
    spent = {"attention": 0.0, "mlp": 0.0}
    ids = (torch.arange(length(model, 64), device=device).view(1, -1) * 7919) % models.embedded(model)
    out = model(input_ids=ids, use_cache=True)
    with watched(models.blocks(model)[1], spent, device):
        whole = sum(steps(model, out, device))
    shares = {name: seconds / whole for name, seconds in spent.items()}
    return shares | {"rest": 1 - sum(shares.values())}


@contextlib.contextmanager
def watched(block_list: nn.ModuleList, spent: dict[str, float], device: str) -> Iterator[None]:
    """Within the context, the seconds in the blocks' attentions and MLPs are added to `spent`."""
    handles, began = [], {}

    def enter(module: nn.Module, *_: object) -> None:
        synchronize(device)
        began[id(module)] = time.perf_counter()

    def leave(module: nn.Module, *_: object, part: str) -> None:
        synchronize(device)
        spent[part] += time.perf_counter() - began[id(module)]

    for block in block_list:
        for name, child in block.named_children():
            attends = any(word in name for word in models.ATTENTION)
            known = attends or any(word in name for word in ("mlp", "feed", "ffn", "moe"))
            if known and next(child.parameters(), None) is not None:
                handles.append(child.register_forward_pre_hook(enter))
                handles.append(child.register_forward_hook(
                    lambda module, *args, part="attention" if attends else "mlp": leave(module, part=part)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
