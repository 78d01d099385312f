"""The block loop: capture -> collect -> solve -> write back -> heal -> replay, one block at a time.

Every block is pruned on the outputs of the already pruned blocks before it, as in SparseGPT and Wanda. That takes two
passes over the data per block: one collects statistics with the block still dense, one runs the data through the pruned
block. If the dense model's outputs are a target (`dense_target`, healing), its activations are kept as well and pass
through the dense blocks: one more pass, and twice the memory for activations. `dense_target` takes a further pass each
time statistics are collected; its outputs are not kept, as they would be a third copy of the activations.

Several processes (torchrun) run the loop together: each has its share of the windows, solves the linears it owns, and
then has all of the block's new weights.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations, Limits, Wait, health
from ..models import Block, Weight
from ..runtime import distributed, products, together
from . import linear
from .job import Chain, Job, Result, Rows, make_plan, skipped_rows
from .linear import Solved
from .options import Options

__all__ = ["Chain", "Job", "Options", "Result", "Rows", "make_plan", "prune_block", "prune_model", "start"]


@torch.no_grad()
def prune_model(model: nn.Module, ids: torch.Tensor | None, mask: torch.Tensor | None, job: Job, *,
                finished: Iterable[tuple[dict, dict]] = (),
                on_block: Callable[[int, dict, dict], None] | None = None) -> Result:
    """Prune the model in place and return the Result.

    ids: calibration tokens, int64 (n, T); None if the job needs no data. mask: bool (n, T), False at padding, or None.
    finished: (state dict, rows) of the blocks that an earlier, interrupted run has pruned, in order. on_block(number,
    state dict, rows): called with each newly pruned block as it will be saved.

    Where other processes hold the model as well, all prune it together, and rank 0 has the Result.

    Raises ValueError naming the linear when weights or statistics cannot be used, and naming `--stop-on-collapse` when
    a block has collapsed.
    """
    return together.run(prune_blocks, model, ids, mask, job, finished=finished, on_block=on_block)


@torch.no_grad()
def prune_blocks(model: nn.Module, ids: torch.Tensor | None, mask: torch.Tensor | None, job: Job, *,
                 finished: Iterable[tuple[dict, dict]] = (),
                 on_block: Callable[[int, dict, dict], None] | None = None) -> Result:
    """`prune_model` in this process, on its share of the windows. finished, on_block: in rank 0."""
    job = replace(job, options=job.options.here) if distributed.ranks() > 1 else job
    result, finished = Result(skipped=skipped_rows(model)), iter(finished)
    last = len(models.blocks(model)[1]) - 1
    bar = tqdm(total=last + 1, desc=f"prune ({job.label})", unit="block", disable=not job.options.progress, leave=False)
    with models.experts_one_by_one(model), products.float32(job.options.tf32), bar:
        activations = start(model, ids, mask, job.options, job.held_out) if job.needs or job.follows_dense else None
        dense = activations.fork() if job.follows_dense else None
        pass_dropped(model, job, dense, -1)
        for block in models.walk(model, job.options.device, bar=bar):
            block.changed = True
            state, plain = next(finished, None) or ({}, None)
            if plain := distributed.first(plain):
                state, rows = Rows.of(distributed.given(state), plain)
                if block.number not in job.dropped:
                    restore(block, state, None if block.number == last else activations, dense)
                    pass_dropped(model, job, dense, block.number)
            elif block.number in job.dropped:
                rows = Rows(block={"block": block.number, "seconds": {}})
                if on_block:
                    on_block(block.number, *rows.saved({}))
            else:
                rows = prune_block(job, block, activations, dense, {row["name"] for row in result.layers}, model)
                if on_block:
                    on_block(block.number, *rows.saved(block.state()))
            result.add(rows)
            if job.options.stop_on_collapse and (found := health.collapses(rows.block)):
                raise ValueError(f"--stop-on-collapse: {block.name}: {'; '.join(found)}")
    result.dense = calibrate.whole(dense) if dense and (job.healers or job.staged) else None
    result.pruned = activations if distributed.ranks() == 1 else None
    result.warnings += not_aimed(result.layers, job.options.dense_target)
    return result


def pass_dropped(model: nn.Module, job: Job, dense: Activations | None, number: int) -> None:
    """Run the dense model's activations through the blocks that go right after block `number`."""
    end = number + 1
    while end in job.dropped:
        end += 1
    for block in models.walk(model, job.options.device, start=number + 1, end=end) if dense else ():
        calibrate.replay(block.module, dense, block.number)


def scales(activations: Activations, after: Activations) -> list[torch.Tensor]:
    """(B·T,) per batch: 1 / the norm of each token in `after`, of mean square 1 over the tokens that are not padding.

    A Gram matrix of inputs times these is that of tokens which count by 1 / their squared norm.
    """
    norms = [h.float().norm(dim=-1).flatten().clamp_min(torch.finfo(torch.float32).tiny) for h in after.hidden]
    real = [n if rows is None else n[rows.to(n.device)] for n, rows in zip(norms, activations.rows, strict=True)]
    weights = torch.cat([1 / n.double().square() for n in real])
    means = distributed.gathered((weights.mean().item(), len(weights)))
    mean = math.sqrt(sum(mean * (n / sum(n for _, n in means)) for mean, n in means))
    return [(1 / n / mean).to(activations.device) for n in norms]


def restore(block: Block, state: dict[str, torch.Tensor], activations: Activations | None,
            dense: Activations | None) -> None:
    """Load the weights of a block that was pruned earlier, and run the activations through it."""
    if dense:
        calibrate.replay(block.module, dense, block.number)
    for name in state.keys() - block.module.state_dict().keys():  # a bias that a solver added
        owner, _, last = name.rpartition(".")
        setattr(block.module.get_submodule(owner), last, nn.Parameter(state[name].clone(), requires_grad=False))
    block.module.load_state_dict(state)
    if activations:
        calibrate.replay(block.module, activations, block.number)


def not_aimed(layers: list[dict], dense_target: float) -> list[str]:
    """One warning for all linears that could not aim at the dense model's outputs.

    It is made from the rows of the record, so that a resumed run has it too.
    """
    names = [row["name"] for row in layers if row["info"].get("dense_target") == 0.0]
    return [f"dense target {dense_target:g}: {len(names)} of {len(layers)} linears ({names[0]} and others like it) aim "
            "at their own dense output instead: only some tokens reach an expert, in the dense model others than here"
            ] if names else []


def start(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, options: Options,
          held_out: Sequence[int] = ()) -> Activations:
    """The activations at the first block on ids int64 (n, T), mask bool (n, T) or None; this process's share of them.

    Raises ValueError naming `--nsamples` if there are fewer batches than processes.
    """
    calibrate.check_parts(len(ids), options.batch_size, held_out)
    return calibrate.capture(model, ids, mask, batch_size=options.batch_size, held_out=held_out, device=options.device,
                             wait=Wait(options.activations, options.waiting_dtype))


def prune_block(job: Job, block: Block, activations: Activations | None, dense: Activations | None = None,
                solved: Collection[str] = (), model: nn.Module | None = None) -> Rows:
    """Solve, write back and heal the resident block, then run the activations through it; returns the block's rows.

    activations: the pruned model's at this block, or None if no data is needed. dense: the dense model's at this block,
    if they are kept. solved: names of the linears that earlier blocks have solved, some of which this block may share.
    model: needed if the job drops blocks.
    """
    rows, seconds, device = Rows(block={"block": block.number, "seconds": {}}), {}, job.options.device
    rows.block["seconds"] = seconds
    if job.healers:
        with clock(seconds, "dense", device):
            for healer in job.healers:
                healer.before_block(block, dense)
    teacher = (copy.deepcopy(block.module), dense) if job.options.dense_target else None
    after = None if not dense or (teacher and not job.looks_ahead) else dense.fork() if teacher else dense
    if after:
        with clock(seconds, "dense", device):
            calibrate.replay(block.module, after, block.number)
            pass_dropped(model, job, after, block.number)
        activations.scales = scales(activations, after) if job.weighs else []
    if job.prepare:
        with clock(seconds, "prepare", device):
            rows.block |= job.prepare(block, activations, job.options)
    dense_out = solve_block(job, block, activations, teacher, rows, solved)
    if after:
        dense.hidden, dense.calls = after.hidden, after.calls
    elif teacher:
        with clock(seconds, "dense", device):
            calibrate.replay(teacher[0], dense, block.number)
    if job.healers:
        with clock(seconds, "heal", device):
            heal_block(job, block, activations, dense, rows)
    if activations:
        with clock(seconds, "replay", device):
            pruned_out = calibrate.replay(block.module, activations, block.number)
    if activations and dense_out is not None:
        rows.block |= distributed.first(health.compare(dense_out, pruned_out, activations.rows[0]))
        if found := health.collapses(rows.block):
            rows.warnings.append(f"{block.name} collapsed: {'; '.join(found)}")
    return rows


def heal_block(job: Job, block: Block, activations: Activations, dense: Activations, rows: Rows) -> None:
    """Let every healer train the pruned block; what they report goes into the rows."""
    for healer in job.healers:
        if info := healer.after_block(block, activations, dense.hidden):
            rows.warnings += [f"{block.name}: {w}" for w in info.pop("warnings", [])]
            name = type(healer).__module__.rpartition(".")[2]
            rows.block.setdefault("heal", {})[name] = info
        for p in block.module.parameters():
            distributed.give(p.data, 0)


def solve_block(job: Job, block: Block, activations: Activations | None, teacher: tuple[nn.Module, Activations] | None,
                rows: Rows, solved: Collection[str] = ()) -> torch.Tensor | None:
    """Compute and write new weights for every linear of the block; returns the dense block's output on the first batch.

    teacher: (the dense block, the dense model's activations) if the linears aim at these. There are several passes if
    the Gram matrices exceed the budget, or with `true_sequential`. With the latter each pass sees what the previous one
    has pruned; otherwise all new weights are written after the last pass. Each process solves the linears it owns.
    """
    seconds, options = rows.block["seconds"], job.options
    remaining, dense_out = block.weights + [w for w in block.shared if w.name not in solved], None
    remaining = [w for w in remaining if w.name in job.plan]
    waiting: list[Solved] = []
    later: list[Weight] = []  # whose new weights wait, in all processes
    while remaining:
        statistics, deferred = {}, []
        with clock(seconds, "collect", options.device) if activations else contextlib.nullcontext():
            if activations:
                statistics, deferred, out = calibrate.collect(
                    block.module, activations, block.number, remaining, job.needs, dense=teacher,
                    limits=Limits(options.gram_bytes, options.true_sequential or job.staged))
                dense_out = out if dense_out is None else dense_out
            statistics, deferred, owner = calibrate.reduce(statistics, deferred, remaining, options.device)
            if deferred:  # an expert without tokens may get some once the attention before it is pruned
                deferred = [w for w in remaining if w.name not in statistics]
        put_off, written = {w.name for w in deferred}, []
        with clock(seconds, "solve", options.device):
            for weight in (w for w in remaining if w.name not in put_off):
                seen, own = weight.name in statistics, statistics.pop(weight.name, None)
                if activations and not seen and weight.name in block.recurring:
                    continue  # a later block, which holds it again, may feed it
                if owner[weight.name] != distributed.rank():
                    continue
                found = (job.solve or linear.solve)(job, weight, own)
                if deferred and not (options.true_sequential or job.staged):
                    waiting.append(found)
                else:
                    written.append(linear.write(found, block.number))
                own = found = None
            linear.settle(written, remaining, rows)
        later += [w for w in remaining if w.name not in put_off]
        remaining = deferred
    linear.settle([linear.write(found, block.number) for found in waiting], later, rows)
    return dense_out


@contextlib.contextmanager
def clock(seconds: dict[str, float], key: str, device: str) -> Iterator[None]:
    """Add the seconds spent within the context to seconds[key]."""
    began = time.perf_counter()
    yield
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - began
