"""The block loop: capture -> collect -> solve -> write back -> repair -> replay, one block at a time.

Every block is pruned on what the already pruned blocks before it produce, as in SparseGPT and Wanda. Two passes over
the data a block: one to collect statistics with the block still dense, one to carry the data through the pruned block.
Where something aims at the dense model (`dense_target`, recovery), a second stream of hidden states passes through the
blocks as they were: one more pass, and the activations twice. `dense_target` takes another pass for each time that
statistics are collected, whose outputs it does not keep: they would be the activations a third time.
"""

import contextlib
import copy
import functools
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import health
from . import solvers
from .linalg import NumericalError, towards_dense
from .patterns import Dense
from .solvers import magnitude


@dataclass(frozen=True)
class Options:
    """How the loop computes (what it computes is in the plan and the chain).

    gram_budget: bytes of Gram matrices gathered at once. activations, activation_dtype: where and as what hidden states
    wait between blocks (None: on the device, as computed). layer_errors: measure each linear's error on sampled inputs.
    dense_target: how far each linear that all tokens reach aims at its output in the dense model, 0 to 1. dense_stream:
    keep the dense model's hidden states beside the pruned one's. held_out: numbers of the windows that no repair trains
    on; solvers use them all. stop_on_collapse: end with an error at the first block out of bounds (health.py).
    """

    device: str = "cpu"
    batch_size: int = 8
    true_sequential: bool = False
    gram_budget: int = 4 * 2**30
    activations: str | None = None
    activation_dtype: torch.dtype | None = None
    layer_errors: bool = True
    dense_target: float = 0.0
    dense_stream: bool = False
    held_out: tuple = ()
    stop_on_collapse: bool = False
    tf32: bool = False
    progress: bool = True


@dataclass
class Result:
    """Rows for the record: one per linear, one per block, what was skipped, every weaker path taken.

    recovery: what repaired the whole model afterwards. dense: the stream of the dense model behind its last block,
    where one was kept. seconds: this target's share of the time that solved many at once.
    """

    layers: list = field(default_factory=list)
    blocks: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    warnings: list = field(default_factory=list)
    recovery: dict = field(default_factory=dict)
    dense: object = None
    seconds: float = 0.0


def make_plan(model, pattern, steps, elsewhere=None):
    """{full linear name: Pattern} with `pattern` everywhere, its comparison group the solver's own unless named.

    elsewhere: the pattern of the layers whose shape cannot have it; without one, it raises ValueError naming the first.
    """
    plan, (name, block_list) = {}, models.blocks(model)
    pattern = pattern.with_default_group(steps[0][1].group)
    for b, block in enumerate(block_list):
        for weight in models.linears(block)[0]:
            full = f"{name}.{b}.{weight.name}"
            try:
                pattern.check(*weight.shape)
                plan[full] = pattern
            except ValueError as error:
                if elsewhere is None:
                    raise ValueError(f"--pattern {pattern}: {error} ({full}, "
                                     f"{weight.shape[0]}x{weight.shape[1]})") from None
                plan[full] = elsewhere
    if not plan:
        raise ValueError("--model: no block of this model holds a linear that can be pruned")
    return plan


@torch.no_grad()
def prune_model(model, ids, mask, plan, steps, options=Options(), *, finished=(), repair=None, on_block=None):
    """Prune the model in place; Result.

    ids: int64 (n, T) calibration tokens, mask: bool (n, T) or None. plan: {full linear name: Pattern}. steps: the
    solver chain, [(module, cfg), ...]. finished: (state, rows) of blocks that an earlier, interrupted run has pruned,
    in order.
    repair(block, dense, b, stored) -> mend: called with each block on the device before it is pruned, the dense model's
    stream at it, and {parameter name: dtype it will be saved in}; mend(stream, targets) -> plain values: called when it
    is pruned, with the pruned model's stream at it and the dense block's outputs, one a batch. Needs `dense_stream`.
    on_block(b, block, rows): called with each newly pruned block at home.

    Raises ValueError naming the layer when weights or statistics cannot be used.
    """
    name, block_list = models.blocks(model)
    needs = frozenset().union(*(module.needs for module, _ in steps))
    needs |= {"sample"} if options.layer_errors else frozenset()
    needs |= {"outer", "cross"} if options.dense_target else frozenset()
    two_streams = options.dense_stream or bool(options.dense_target)
    result = Result(skipped=[{"name": n, "reason": why} for n, why in models.outside(model, block_list)])
    finished = iter(finished)
    bar = tqdm(block_list, desc=f"prune ({'+'.join(solvers.short(m) for m, _ in steps)})", unit="block",
               disable=not options.progress, leave=False)
    with models.experts_one_by_one(model), float32_products(options.tf32):
        activations = start(model, ids, mask, options) if needs or two_streams else None
        dense = activations.fork() if two_streams else None
        for b, block in enumerate(bar):
            weights, skipped = models.linears(block)
            result.skipped += [{"name": f"{name}.{b}.{n}", "reason": why} for n, why in skipped]
            done = next(finished, None)
            rows = done[1] if done else {"layers": [], "block": {"block": b, "seconds": {}}, "warnings": []}
            stored = {n: p.dtype for n, p in block.named_parameters()}
            with models.resident(models.tensors_of(block), options.device, write_back=not done):
                if not done:
                    prune_block(block, activations, b, weights, f"{name}.{b}.", plan, steps, needs, options, rows, dense,
                                repair and functools.partial(repair, stored=stored))
                elif dense:
                    calibrate.replay(block, dense, b)
            if done:
                block.load_state_dict(done[0])
                if activations and b + 1 < len(block_list):
                    with models.resident(models.tensors_of(block), options.device):
                        calibrate.replay(block, activations, b)
            result.layers += rows["layers"]
            result.blocks.append(rows["block"])
            result.warnings += rows["warnings"]
            if on_block and not done:
                on_block(b, block, rows)
            if options.stop_on_collapse and (found := health.collapses(rows["block"])):
                raise ValueError(f"--stop-on-collapse: {name}.{b}: {'; '.join(found)}")
    result.dense = dense
    result.warnings += not_aimed(result.layers, options.dense_target)
    return result


def not_aimed(layers, dense_target):
    """One warning for all linears that could not aim at the dense model; from their rows, so a killed run has it too.
    """
    names = [row["name"] for row in layers if row["info"].get("dense_target") == 0.0]
    return [f"dense target {dense_target:g}: {len(names)} of {len(layers)} linears ({names[0]} and others like it) aim "
            "at their own dense output instead: only some tokens reach an expert, in the dense model others than here"
            ] if names else []


@torch.no_grad()
def survey(model, ids, mask, needs, options=Options()):
    """Walk the DENSE model: yields (b, block, views, {view name: Statistics}) with the block on the device.

    Gram matrices beyond `gram_budget` come in further portions, so a block may be yielded several times, each time with
    other views.
    """
    _, block_list = models.blocks(model)
    bar = tqdm(block_list, desc="survey", unit="block", disable=not options.progress, leave=False)
    with models.experts_one_by_one(model), float32_products(options.tf32):
        activations = start(model, ids, mask, options) if needs else None
        for b, block in enumerate(bar):
            remaining, _ = models.linears(block)
            with models.resident(models.tensors_of(block), options.device):
                if not activations:  # the solver looks at no data
                    yield b, block, remaining, {}
                    continue
                while remaining:
                    statistics, deferred, _ = calibrate.collect(block, activations, b, remaining, needs,
                                                           budget=options.gram_budget)
                    waiting = {v.name for v in deferred}
                    yield b, block, [v for v in remaining if v.name not in waiting], statistics
                    remaining = deferred
                calibrate.replay(block, activations, b)


@torch.no_grad()
def prune_shared(model, ids, mask, targets, options=Options()):
    """Solve many targets from the DENSE model's inputs: [(Result, {full linear name: new weight}), ...]; the model is
    left as it was.

    One pass over the data serves all targets, and so does what solvers compute of a Gram matrix and keep with its
    Statistics (SparseGPT: one factorisation; ALPS: one for each penalty). targets: [(plan, steps), ...]. The new
    weights are kept in the stored dtype on the CPU: so many copies of the model's linears.
    """
    name, block_list = models.blocks(model)
    needs = frozenset().union(*(module.needs for _, steps in targets for module, _ in steps))
    needs |= {"sample"} if options.layer_errors else frozenset()
    skipped = [(n, why) for n, why in models.outside(model, block_list)]
    skipped += [(f"{name}.{b}.{n}", why) for b, block in enumerate(block_list) for n, why in models.linears(block)[1]]
    solved = [(Result(skipped=[{"name": n, "reason": why} for n, why in skipped]), {}) for _ in targets]
    for b, _, weights, statistics in survey(model, ids, mask, needs, options):
        for weight in weights:
            W, full = weight.get().clone(), f"{name}.{b}.{weight.name}"
            own = statistics.pop(weight.name, None)  # as in solve_block
            for (plan, steps), (result, weights) in zip(targets, solved, strict=True):
                rows = {"layers": result.layers, "warnings": result.warnings, "block": {"block": b}}
                solve(weight, own, full, plan, steps, rows)()
                weights[full] = weight.get().to("cpu", weight.stored, copy=True)
                weight.set(W)
        own = None
    return solved


def write(model, weights):
    """Put the weights of `prune_shared` into the model."""
    for name, weight in models.all_weights(model):
        weight.set(weights[name])


def start(model, ids, mask, options):
    """The stream of the calibration tokens at the first block."""
    return calibrate.capture(model, ids, mask, batch_size=options.batch_size, held_out=options.held_out,
                           device=options.device, place=options.activations, dtype=options.activation_dtype)


@contextlib.contextmanager
def float32_products(tf32):
    """Float32 products in full precision, unless the user asks for TF32 (10 bits of mantissa) on the GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def prune_block(block, activations, b, weights, prefix, plan, steps, needs, options, rows, dense=None, repair=None):
    """Collect, solve and write back until every linear of the resident block is done, repair it, then replay it.

    In several passes when the Gram matrices do not fit the budget at once or with `true_sequential`. Only the latter
    lets a pass see what the one before has pruned: otherwise new weights wait for the last pass.
    """
    seconds = rows["block"]["seconds"]
    if repair:
        with clock(seconds, "dense", options.device):
            mend = repair(block, dense, b)
    teacher = (copy.deepcopy(block), dense) if options.dense_target else None
    if dense and not teacher:
        with clock(seconds, "dense", options.device):
            calibrate.replay(block, dense, b)
    dense_out = solve_block(block, activations, b, weights, prefix, plan, steps, needs, options, rows, teacher)
    if teacher:
        with clock(seconds, "dense", options.device):
            calibrate.replay(teacher[0], dense, b)
    if repair:
        with clock(seconds, "repair", options.device):
            info = rows["block"]["repair"] = mend(activations, dense.hidden)
        rows["warnings"] += [f"{prefix.removesuffix('.')}: {w}" for w in info.pop("warnings", [])]
    if activations:
        with clock(seconds, "replay", options.device):
            pruned_out = calibrate.replay(block, activations, b)
        rows["block"] |= health.compare(dense_out, pruned_out, activations.rows[0])
        if found := health.collapses(rows["block"]):
            rows["warnings"].append(f"{prefix.removesuffix('.')} collapsed: {'; '.join(found)}")


def solve_block(block, activations, b, weights, prefix, plan, steps, needs, options, rows, teacher=None):
    """New weights for every linear of the block; returns the dense block's output on the stream's first batch."""
    seconds = rows["block"]["seconds"]
    remaining, waiting, dense_out = list(weights), [], None
    while remaining:
        statistics, deferred = {}, []
        if activations:
            with clock(seconds, "collect", options.device):
                statistics, deferred, out = calibrate.collect(block, activations, b, remaining, needs, dense=teacher,
                                                         budget=options.gram_budget, one_stage=options.true_sequential)
            dense_out = out if dense_out is None else dense_out
            if deferred:  # an expert idle so far may get tokens once the attention before it is pruned
                deferred = [v for v in remaining if v.name not in statistics]
        put_off = {v.name for v in deferred}
        with clock(seconds, "solve", options.device):
            for weight in (v for v in remaining if v.name not in put_off):
                own = statistics.pop(weight.name, None)  # with the last linear fed by an input goes all derived from it
                write = solve(weight, own, prefix + weight.name, plan, steps, rows, options.dense_target)
                if deferred and not options.true_sequential:
                    waiting.append(write)
                else:
                    write()
            own = None  # nor does the last one outlast its portion
        remaining = deferred
    for write in waiting:
        write()
    return dense_out


def solve(weight, statistics, name, plan, steps, rows, dense_target=0.0):
    """Find one linear's new weights; a function that writes them and adds the linear's row to the record."""
    W, pattern, began = weight.get(), plan.get(name, Dense()), time.perf_counter()
    if not torch.isfinite(W.sum()):  # a sum is finite only if all its terms are, and needs no second matrix
        raise ValueError(f"{name}: its weights are not finite; the checkpoint is damaged")
    if statistics is not None and not finite(statistics):
        raise ValueError(f"{name}: its inputs are not finite")
    note = None
    chain = steps
    if any(module.needs for module, _ in steps) and (statistics is None or statistics.n == 0):
        chain, note = [(magnitude, magnitude.Config())], "no calibration token reached it: pruned by magnitude instead"
    if isinstance(pattern, Dense):
        chain, note = [(magnitude, magnitude.Config())], None
    try:
        aiming = dense_target and chain is steps and statistics is not None
        aimed = aiming and statistics.cross is not None
        target, notes = towards_dense(W, statistics, dense_target) if aimed else (W, [])
        solution = solvers.solve(target, statistics, pattern, chain)
    except NumericalError as error:
        raise ValueError(f"{name}: {error}") from None
    solution.info |= {"dense_target": 0.0} if aiming and not aimed else {}
    notes += solution.info.pop("warnings", []) + ([note] if note else [])
    error = statistics.relative_error(W, solution.W_hat) if statistics else None
    spent = time.perf_counter() - began

    def write():
        weight.set(solution.W_hat)
        rows["layers"].append(check(weight, name, pattern, solution, error, spent, rows["block"]["block"]))
        rows["warnings"].extend(f"{name}: {n}" for n in notes)
    return write


def finite(statistics):
    """Whether no sum has met an infinity or a NaN (a Gram matrix's diagonal speaks for all of it)."""
    outer = None if statistics.outer is None else statistics.outer.diagonal()
    sums = (statistics.sum, statistics.sum_sq, outer, statistics.cross, statistics.sample)
    return statistics.derived("finite", lambda: all(bool(torch.isfinite(t).all()) for t in sums if t is not None))


def check(weight, name, pattern, solution, error, seconds, b):
    """The linear's row for the record, after proof that the stored weight has the pattern."""
    stored = weight.get()
    if not torch.isfinite(stored.sum()):
        raise ValueError(f"{name}: its new weights do not fit {weight.stored}; use --dtype bfloat16 or float32")
    R, C = weight.shape
    zeros, target = R * C - int(stored.count_nonzero()), pattern.zeros(R, C)
    removed = R * C - int(solution.mask.count_nonzero())
    assert removed == target and pattern.holds(stored), f"{name}: pattern {pattern} broken"
    return {"name": name, "block": b, "linear": weight.name, "shape": [R, C], "pattern": str(pattern),
            "group": pattern.group, "target_zeros": target, "zeros": zeros, "surplus": zeros - target,
            "relative_error": error, "seconds": seconds, "info": solution.info}


@contextlib.contextmanager
def clock(seconds, key, device):
    """Add the time spent inside to seconds[key]."""
    began = time.perf_counter()
    yield
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - began
