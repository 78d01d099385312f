"""Shrink: make the model smaller before anything else is done to it. From start to end:

    order of blocks -> cuts within the budget -> walk the best -> slice -> heal the whole -> an ordinary smaller model
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from .. import calibrate, heal, models
from ..checkpoint import Folder, compressed
from ..data import Tokens
from ..heal.train import held_out_windows, windows_per_step
from ..measure import latency
from ..models import groups, smaller, source
from ..prune import loop, solvers
from ..prune.job import Job, Result
from ..prune.patterns import NM, parse
from ..quantise import grids
from ..runtime import distributed, products, together
from ..settings import RunConfig
from ..structured import Cut, budget, cut, depth, mixture, origin, search, slices
from . import uneven
from .plan import kept_dense

ORDER, SEARCH = 2048, 16384  # tokens, at most, on which the order of blocks and the mixtures are measured


def shrink(cfg: RunConfig, model: nn.Module, calibration: Tokens, folder: Folder | None = None,
           finished: Iterator | tuple = (), on_block: Callable | None = None) -> Result:
    """Make the model smaller in place, as the settings ask; `result.shrunk` says what was done.

    folder: keeps what was found on the way to the cut, so that a run that resumes need not look again. finished,
    on_block: as for `loop.prune_model`.
    """
    together.release()  # the others of torchrun wait from here on: their model does not get smaller
    began, before = time.perf_counter(), cut.whole(model)
    ids, mask = calibration.ids, calibration.mask
    known = folder.found if folder else search.anew
    experts, of = fewer_experts(cfg, model, calibration, known)
    job = job_of(cfg, model, calibration)
    chosen = known("cut", lambda: choose(cfg, model, calibration, job, (before, known))) | {
        "experts": {key: origin.spans(kept) for key, kept in experts.items()}}
    found = Cut.of(chosen["cut"])
    warned, decided = chosen.pop("warnings", []), time.perf_counter()
    blocks = len(models.blocks(model)[1])
    widths = {f"{b.name}.{w.consumer}": (cut.key_of(b, w), w) for b, w in cut.consumers(model, found)
              if found.left(b, w) < w.count}
    result = loop.prune_model(model, ids, mask, search.job_for(job, model, found), finished=finished, on_block=on_block)
    made, report = slices.cut_model(model, found)
    left = sum(p.numel() for p in models.blocks(made)[1].parameters())
    source.remember(model, replace(models.source_of(model), entries={}, left=()))
    slices.become(model, made)
    heal_model(cfg, model, job.healers, result)
    result.shrunk = {
        "method": cfg.shrink_method, "share": left / before, "parameters": left, "parameters_before": before,
        "blocks": len(report.keep), "blocks_before": blocks, **chosen,
        "units": [unit_row(row, widths, report) for row in result.layers] + [
            {"name": key, "kind": groups.WHOLE, "of": of, "left": len(kept), "kept": origin.spans(kept)}
            for key, kept in experts.items() if mixture.block_of(key) in report.keep],
        "kept_blocks": report.keep, "seconds": {"choose": decided - began, "walk": time.perf_counter() - decided}}
    result.warnings += [*warned, *report.notes]
    result.layers = []
    return result


def fewer_experts(cfg: RunConfig, model: nn.Module, calibration: Tokens,
                  known: search.Known) -> tuple[dict[str, torch.Tensor], int]:
    """({`cut.pool_key`: which experts are left}, of how many), the others taken out in place; ({}, 0) without."""
    if cfg.experts is None:
        return {}, 0
    spans = known("experts", lambda: {key: origin.spans(kept) for key, kept in mixture.choose(
        model, calibration.ids, calibration.mask, cfg, cfg.experts).items()})
    found = {key: origin.numbers(text) for key, text in spans.items()}
    of = max(pool.count for block in models.walk(model) for pool in groups.pools(block.module))
    made = slices.without_experts(model, found)
    source.remember(model, replace(models.source_of(model), entries={}, left=()))
    slices.become(model, made)
    return found, of


def unit_row(row: dict, widths: dict, report: slices.Report) -> dict:
    """The record's row of one consumer."""
    key, width = widths[row["name"]]
    return {"name": key, "block": row["block"], "kind": width.kind, "of": width.segments * width.count,
            "left": len(report.units[key]), "kept": origin.spans(report.units[key]),
            "relative_error": row["relative_error"], "seconds": row["seconds"], "info": row["info"]}


def origin_of(cfg: RunConfig, dense: nn.Module, model: nn.Module, record: dict) -> dict:
    """The manifest's `origin` of a smaller model. dense: the model as it was loaded. record: the run's."""
    units = mixture.before({row["name"]: origin.numbers(row["kept"]) for row in record["shrunk"]["units"]})
    return origin.describe(dense, model, record["shrunk"]["kept_blocks"], units, bool(set(cfg.heals) - {"fold"}))


def chain_of(cfg: RunConfig) -> list:
    """The chain of `--shrink-method`: [(module, its Config), ...]."""
    return [(module, cfg.solver[solvers.short(module)]) for module in solvers.chain(cfg.shrink_method)]


def job_of(cfg: RunConfig, model: nn.Module, calibration: Tokens) -> Job:
    """How a cut is done: the chain, the healers, the windows held out; which cut, `search.job_for` adds."""
    chain = chain_of(cfg)
    options = replace(cfg, dense_target=cfg.shrink_target, stop_on_collapse=False)
    healers = tuple(heal.module(name).Heal(cfg.healing[name], cfg.seed, cfg.progress) for name in cfg.window_heals)
    n, seqlen = calibration.ids.shape
    held = held_out_windows(n, seqlen, cfg.seed) if healers or "held" in chain_needs(chain) else ()
    if set(cfg.window_heals) - {"fold"}:  # those train on one batch a step
        options = replace(options, batch_size=windows_per_step(cfg.batch_size, seqlen))
    job = Job({}, chain, options, healers, held, staged=True)
    return replace(job, gradients=gradients(cfg, model, calibration, job)) if "gradient" in job.needs else job


def chain_needs(chain: list) -> frozenset[str]:
    """What statistics a chain needs."""
    return frozenset().union(*(module.needs for module, _ in chain))


def gradients(cfg: RunConfig, model: nn.Module, calibration: Tokens, job: Job) -> dict:
    """{full linear name: Gradient} of all linears, on the dense model."""
    return together.run(all_gradients, model, calibration.ids, calibration.mask, cfg, job.held_out)


def all_gradients(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, cfg: RunConfig,
                  held_out: tuple[int, ...]) -> dict:
    """`gradients`, from this process's share of the windows and those of all others."""
    cfg = cfg.here if distributed.ranks() > 1 else cfg
    activations = loop.start(model, ids, mask, cfg, held_out)
    return calibrate.gradients(model, activations, [w.name for w in models.all_weights(model)], cfg.progress)


def protected(cfg: RunConfig, model: nn.Module) -> tuple[set[int], set[str]]:
    """(numbers of blocks that never go, kinds of units that never go), by `--keep-dense`.

    Raises ValueError naming the flag where it keeps some units of a kind and not those of other blocks.
    """
    if not cfg.keep_dense:
        return set(), set()
    names = [w.name for w in models.all_weights(model)]
    kept = kept_dense(cfg.keep_dense, names)
    blocks = {b.number for b in models.walk(model) if any(w.name in kept for w in b.weights)}
    kinds: dict[str, list[bool]] = {}
    for block, width in cut.consumers(model):
        whole = [f"{block.name}.{name}" in kept for name in (width.consumer, *width.rows)]
        kinds.setdefault(width.kind, []).append(any(whole))
    held = {kind for kind, keeps in kinds.items() if any(keeps)}
    return blocks, held


def choose(cfg: RunConfig, model: nn.Module, calibration: Tokens, job: Job, given: tuple[int, search.Known]) -> dict:
    """The cut, in plain values, and what was measured to choose it.

    given: how many parameters the blocks had at the start; what is known of the search already.
    """
    whole, known = given
    if smaller.is_uneven(model):
        raise ValueError(f"--model {cfg.model}: its layers differ in width already; give what it was made from")
    n, (fixed, kinds) = len(models.blocks(model)[1]), protected(cfg, model)
    check(cfg, n, fixed)
    if cfg.drop is not None:
        order, rows = list(cfg.dropped_blocks), []
    else:
        wanted = n - cfg.layers if cfg.layers is not None else 0 if cfg.says_what_goes else most_blocks(cfg, n)
        rows = known("order", lambda: order_of(cfg, model, calibration, wanted, fixed)) if wanted else []
        order = [row["block"] for row in rows]
        if cfg.layers is not None and len(order) < wanted:
            raise ValueError(f"--layers {cfg.layers}: only {len(order)} of the {n} blocks can go")
    parts = cut.parts(model, [part for part in cfg.dropped_parts if part[0]])
    heads = fewer_heads(cfg, model, kinds)
    if cfg.shrink is None:
        return {"cut": Cut(tuple(sorted(order)), heads, parts).plain(), "order": rows, "tried": []}
    pattern, (target, cost) = parse(cfg.pattern), cost_of(cfg, model, whole, bool(parts))
    biases = slices.biases_added(model) or (slices.can_add_biases(model)
                                            and any(getattr(own, "bias", False) for _, own in job.chain))
    whole_groups = math.lcm(pattern.m if isinstance(pattern, NM) else 1,
                            *(grid.group or 1 for grid in cfg.grids.kinds
                              if isinstance(grid, grids.GGUF) or cfg.format == compressed.METHOD))
    own = budget.Budget(target, cost, frozenset(kinds), whole_groups, parts,
                        lambda c: slices.says(model, c, biases))
    tokens, tried = first(calibration, SEARCH), []
    n = len(tokens[0])  # of which a quarter is held out, as mixtures are close to one another
    simple = replace(job, options=replace(job.options, batch_size=cfg.batch_size),
                     healers=tuple(h for h in job.healers if type(h).__module__.endswith("fold")),
                     held_out=tuple(range(0, n, 4)) if n > 1 else ())
    if cfg.says_what_goes:
        found = budget.neurons_for(model, own, order, heads)
        if found is None:
            raise ValueError(f"--shrink {cfg.shrink:g}: cannot be reached with the neurons of the blocks that are left")
    else:
        found, tried = search.best(model, (*tokens, known), simple, budget.Mixtures(model, own, order), cfg.tries,
                                   cfg.progress)
    warnings: list[str] = []
    if cfg.uneven:
        found, tried, warnings = uneven.choose(cfg, model, (*tokens, known), simple, own, (found, tried))
    return {"cut": found.plain(), "order": rows, "tried": tried, "warnings": warnings}


def fewer_heads(cfg: RunConfig, model: nn.Module, fixed: set[str]) -> tuple[tuple[str, int], ...]:
    """((KV groups or query heads, how many are left),) as the flags say; () without. fixed: kinds that never go.

    Raises ValueError naming the flag.
    """
    asked = {"--kv-groups": (groups.HEADS, cfg.kv_groups), "--query-heads": (groups.QUERIES, cfg.query_heads)}
    for flag, (kind, left) in asked.items():
        width = cut.kinds(model).get(kind)
        if left is not None and (width is None or kind in fixed or left >= width.count):
            why = f"the model cannot have fewer {kind}" if width is None else f"--keep-dense keeps its {kind}" \
                if kind in fixed else f"the model has {width.count}, so none would go"
            raise ValueError(f"{flag} {left}: {why}; leave it out")
    return tuple((kind, left) for kind, left in asked.values() if left is not None)


def first(calibration: Tokens, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids, mask) of the first windows with at most `count` tokens, but of two windows at least."""
    few = max(2, count // calibration.ids.shape[1])
    return calibration.ids[:few], None if calibration.mask is None else calibration.mask[:few]


def cost_of(cfg: RunConfig, model: nn.Module, whole: int, parts: bool = False) -> tuple[float, budget.Cost]:
    """(the target, the cost of a cut) by `--by`. whole: as for `choose`. parts: whether attentions or MLPs go alone.

    bytes: of the blocks' weights in the pattern that the smaller model is pruned to. latency: the time of decoding one
    token, in turns with the dense model, as a share of that one's; every shape is built and measured once.
    """
    sizes = budget.Sizes.of(model)
    if (parts or cfg.uneven) and cfg.by != "parameters":
        raise ValueError(f"--by {cfg.by}: goes with the same width in every layer only; leave out --uneven and parts")
    if cfg.by == "parameters":
        return cfg.shrink * whole, (lambda c: cut.parameters(model, c)) if parts else sizes.left
    if cfg.by == "bytes":
        side, itemsize = 4096, torch.empty(0, dtype=model.dtype).itemsize
        share = parse(cfg.pattern, cfg.group).bytes(side, side, itemsize) / (side * side * itemsize)
        return cfg.shrink * whole, lambda c: sizes.left(c) * share

    @functools.cache
    def measured(c: Cut) -> float:
        named = {"model": slices.first_units(model, c), "dense": model}
        return 1 / latency.compare(named, cfg.device, rounds=5)["model"]["decode1"]["speedup"]
    return cfg.shrink, measured


def most_blocks(cfg: RunConfig, n: int) -> int:
    """How many blocks might go within the budget; 0 where neurons alone are asked for."""
    return 0 if cfg.tries == 1 else min(n - 1, int((1 - cfg.shrink) * n + 0.999))


def check(cfg: RunConfig, n: int, fixed: set[int]) -> None:
    """Raise ValueError naming the flag for blocks that do not exist, are protected, or would leave none."""
    for _, number in cfg.dropped_parts:
        if number >= n:
            raise ValueError(f"--drop {number}: the model has {n} blocks, numbered from 0 to {n - 1}")
        if number in fixed:
            raise ValueError(f"--drop {number}: --keep-dense keeps a linear of this block; leave out one of the two")
    if len(cfg.dropped_blocks) >= n:
        raise ValueError(f"--drop {cfg.drop}: would drop all {n} blocks")
    if cfg.layers is not None and cfg.layers >= n:
        raise ValueError(f"--layers {cfg.layers}: the model has {n} blocks, so nothing would go")


def order_of(cfg: RunConfig, model: nn.Module, calibration: Tokens, count: int, fixed: set[int]) -> list[dict]:
    """The rows of `depth`: which blocks go first."""
    ids, mask = first(calibration, ORDER)

    def allowed(blocks: list[int]) -> bool:
        return slices.possible(model, Cut(tuple(blocks)))
    with models.experts_one_by_one(model), products.float32(cfg.tf32):
        activations = loop.start(model, ids, mask, cfg)
        if cfg.order == "influence":
            return depth.by_influence(model, activations, count, fixed, allowed)
        return depth.by_kl(model, activations, count, fixed, allowed, cfg.progress)


def heal_model(cfg: RunConfig, model: nn.Module, healers: tuple[heal.Heal, ...], result: Result) -> None:
    """Let the healing methods train the whole model; what they report goes into the result."""
    result.pruned = None  # as large as the dense model's, and the model is about to change
    for name, healer in zip(cfg.window_heals, healers, strict=True):
        began = time.perf_counter()
        with products.float32(cfg.tf32):
            info = healer.after_model(model, result.dense)
        if info is not None:
            result.warnings += [f"--heal {name}: {w}" for w in info.pop("warnings", [])]
            result.heal[name] = info | {"seconds": time.perf_counter() - began}
    result.dense = None  # frees the hidden states of the whole calibration set
