"""Scaling: columns that see large inputs are made larger before they are rounded, and what computes these inputs
smaller, so that the model computes the same and its important weights are rounded finer (AWQ, arXiv:2306.00978).

    site       linears that read the same input, and what computes it: a norm's weight; v_proj's rows for o_proj; up's
               rows for down_proj
    factor     2 to a whole power for each channel of that input, so that nothing is rounded but by the grid: a scaled
               block's outputs are the same bits. That is tried on a batch, and a site where it does not hold (an
               activation that is not linear, a norm that adds 1 to its weight, a router beside the experts) is left
               as it is
    strength   factors are the channel's root mean square to this power. Of STRENGTHS the one is taken whose rounded
               weights, by the run's own quantiser, have the least error (W-Ŵ) G (W-Ŵ)ᵀ; 0, no scaling, is among them
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .. import calibrate
from ..calibrate import Activations, Limits, Statistics
from ..models import Block, Weight, groups
from ..prune.linalg import NumericalError
from ..prune.options import Options
from ..prune.solvers import Solution
from ..runtime import distributed
from .grids import Grid

STRENGTHS = (0.0, 0.15, 0.3, 0.5, 0.75)
MOST = 8  # a factor is between 2^-8 and 2^8


@dataclass(frozen=True)
class Site:
    """Linears with one input, and what computes it.

    readers: their weights (R, C). channel: int64 (C,), which of the source's channels each column reads. vectors:
    [(parameter of one dimension, the dtype it is saved in, its entries, int64 (channels,))]. producer: the weight whose
    `rows`, int64 (channels,), compute the channels; None for a norm.
    """

    readers: tuple[Weight, ...]
    channel: torch.Tensor
    vectors: tuple[tuple[nn.Parameter, torch.dtype, torch.Tensor], ...]
    producer: Weight | None = None
    rows: torch.Tensor | None = None

    @property
    def name(self) -> str:
        """Of the first reader within the block."""
        return self.readers[0].linear

    def apply(self, powers: torch.Tensor) -> bool:
        """Multiply the columns by 2^powers, int64 (channels,), and divide their source; whether the dtypes allow it.

        Where they do not, nothing changes.
        """
        up, down = torch.exp2(powers[self.channel].float()), torch.exp2(-powers.float())
        new: list[tuple[Weight, torch.Tensor]] = [(w, w.get() * up.to(w.get())) for w in self.readers]
        if self.producer:
            W = self.producer.get().clone()
            W[self.rows] *= down.to(W).unsqueeze(1)
            new.append((self.producer, W))
        vectors = [(p, stored, p.data.index_put((rows,), p.data[rows] * down.to(p.data)))
                   for p, stored, rows in self.vectors]
        if not all(held(W, w.stored) for w, W in new) or not all(held(v, stored) for _, stored, v in vectors):
            return False
        for w, W in new:
            w.set(W)
        for p, _, v in vectors:
            p.data.copy_(v)
        return True


def held(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds these values exactly."""
    return torch.equal(t.to(dtype).to(t.dtype), t)


@torch.no_grad()
def scale(block: Block, activations: Activations, options: Options, *, method: ModuleType, cfg: Any,
          grid: Grid) -> dict[str, dict]:
    """Scale a resident block's sites in place; {"scaling": {site: its strength and what it leaves of the error}}.

    method, cfg, grid: of the rounding that follows. Raises ValueError where a linear's input cannot be collected.
    """
    sites = same_function(block, activations, [*of_norms(block, activations), *of_producers(block)])
    found: dict[str, dict] = {}
    for site, statistics in with_statistics(block, activations, options, sites):
        picked = distributed.first(best(site, statistics, method, cfg, grid) if statistics else None)
        if picked and picked[0] and site.apply(torch.tensor(picked[2], device=activations.device)):
            found[site.name] = {"strength": picked[0], "error": picked[1]}
    return {"scaling": found}


def of_norms(block: Block, activations: Activations) -> list[Site]:
    """The sites whose input is a norm's output: found on the first batch, as the same tensor."""
    made: dict[tuple, nn.Module] = {}
    read: dict[nn.Module, dict[str, Weight]] = {}
    alive, handles = [], []

    def keep(norm: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, torch.Tensor):
            alive.append(out)  # so that its address is not used again
            made[out.data_ptr(), out.shape] = norm

    def look(weight: Weight, x: torch.Tensor) -> None:
        if norm := made.get((x.data_ptr(), x.shape)):
            read.setdefault(norm, {})[weight.linear] = weight
    for module in block.module.modules():
        own = dict(module.named_parameters(recurse=False))
        if own and all(p.ndim == 1 for p in own.values()):
            handles.append(module.register_forward_hook(keep))
    for weight in usable(block):
        if weight.expert is None:
            handles.append(weight.owner.register_forward_pre_hook(lambda _, args, w=weight: look(w, args[0])))
    try:
        calibrate.forward(block.module, activations, block.number, 0)
    finally:
        for handle in handles:
            handle.remove()
    names = {id(p): name for name, p in block.module.named_parameters()}
    found = []
    for norm, readers in read.items():
        C = next(iter(readers.values())).shape[1]
        every = torch.arange(C, device=activations.device)
        vectors = [(p, block.stored[names[id(p)]], every) for p in norm.parameters(recurse=False)]
        if all(len(p) == C for p, _, _ in vectors):
            found.append(Site(tuple(readers.values()), every, tuple(vectors)))
    return found


def of_producers(block: Block) -> list[Site]:
    """The sites whose input is computed channel by channel from another linear's rows."""
    weights, found = {w.linear: w for w in usable(block)}, []
    for width in groups.widths(block.module):
        last = list(width.rows)[-1]
        reader, producer = weights.get(width.consumer), weights.get(last)
        if width.kind == groups.QUERIES or not reader or not producer:
            continue
        if width.kind == groups.HEADS:
            module = block.module.get_submodule(width.consumer.rpartition(".")[0])
            head = getattr(module, "v_head_dim", None) or module.head_dim
            if getattr(getattr(module, "config", None), "num_kv_shared_layers", 0):
                continue  # another block reads the values as well
            rows = width.rows[last][:, -head:].flatten()  # v is the last of a group's rows
            channel = torch.arange(width.count * head).view(width.count, 1, head).expand(
                width.count, width.size // head, head).flatten()
        else:
            rows, channel = width.rows[last][:, -1], torch.arange(width.count)  # up is behind gate
        device, bias = producer.parameter.device, getattr(producer.owner, "bias", None)
        if producer.expert is not None and any("bias" in name for name, _ in producer.owner.named_parameters()):
            continue
        vectors = () if bias is None else ((bias, producer.stored, rows.to(device)),)
        found.append(Site((reader,), channel.to(device), vectors, producer, rows.to(device)))
    return found


def usable(block: Block) -> list[Weight]:
    """The block's weights that no other block holds."""
    return [w for w in block.weights if w.name not in block.recurring]


def same_function(block: Block, activations: Activations, sites: Sequence[Site]) -> list[Site]:
    """The sites that can be scaled without a change of the block's outputs, bit for bit, on the first batch."""
    if not sites:
        return []
    before = calibrate.forward(block.module, activations, block.number, 0)

    def same(some: Sequence[Site]) -> bool:
        powers = [(torch.arange(int(site.channel.max()) + 1, device=site.channel.device) * 7 + 1) % 3 - 1
                  for site in some]
        done = [(site, p) for site, p in zip(some, powers, strict=True) if site.apply(p)]
        after = calibrate.forward(block.module, activations, block.number, 0)
        for site, p in done:
            site.apply(-p)
        return len(done) == len(some) and torch.equal(before, after)
    if all(distributed.gathered(same(sites))):
        return list(sites)
    verdicts = distributed.gathered([same([site]) for site in sites])
    return [site for site, *every in zip(sites, *verdicts, strict=True) if all(every)]


def with_statistics(block: Block, activations: Activations, options: Options, sites: Sequence[Site]
                    ) -> Iterator[tuple[Site, Statistics | None]]:
    """The sites that a token has reached, with the statistics of their input (in rank 0), as memory allows."""
    by_name = {site.readers[0].name: site for site in sites}
    remaining = [site.readers[0] for site in sites]
    while remaining:
        statistics, deferred, _ = calibrate.collect(block.module, activations, block.number, remaining, {"outer"},
                                                    limits=Limits(options.gram_bytes))
        statistics, deferred, _ = calibrate.reduce(statistics, deferred, remaining, options.device, only_first=True)
        for name in [name for name in by_name if name in statistics]:
            yield by_name.pop(name), statistics.pop(name)
        remaining = deferred


def best(site: Site, statistics: Statistics, method: ModuleType, cfg: Any, grid: Grid
         ) -> tuple[float, float, list[int]] | None:
    """(strength, its error as a share of the error without scaling, powers of the channels) of the least error.

    None where the statistics are not usable, which the rounding itself says.
    """
    G = statistics.G
    sizes = G.diagonal().double().clamp_min(torch.finfo(torch.float32).tiny).log2() / 2
    channels = int(site.channel.max()) + 1
    total = sizes.new_zeros(channels).index_add(0, site.channel, sizes)
    mean = total / torch.bincount(site.channel, minlength=channels)
    tried: dict[tuple[int, ...], tuple[float, float]] = {}  # {powers: (error, strength)}
    for strength in STRENGTHS if statistics.finite() else ():
        powers = (strength * (mean - mean.median())).round().clamp(-MOST, MOST).long()
        if (key := tuple(powers.tolist())) in tried:
            continue
        by = torch.exp2(powers[site.channel].float())
        inputs, error = statistics.divided(by) if strength else statistics, 0.0
        try:
            for weight in site.readers:
                W = weight.get() * by.to(weight.get())
                W_hat = method.quantise(W, Solution(W, W != 0), inputs, grid, cfg).W_hat
                lost = (W - W_hat) / by.to(W)
                error += ((lost @ G.to(W)) * lost).sum().item()
        except NumericalError:
            continue
        tried[key] = error, strength
    if not tried:
        return None
    powers, (error, strength) = min(tried.items(), key=lambda item: item[1])
    plain = next(iter(tried.values()))[0]
    return strength, error / plain if plain else 1.0, list(powers)
