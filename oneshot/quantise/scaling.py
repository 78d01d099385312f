"""Scaling: columns that see large inputs are made larger before they are rounded, and what computes these inputs
smaller, so that the model computes the same and its important weights are rounded finer (AWQ, arXiv:2306.00978).

    site       linears that read the same input, and what computes it: a norm's weight; v_proj's rows for o_proj; up's
               rows for down_proj. A site is tried with powers of two, which round nothing: where the block's outputs on
               a batch are not the same bits (an activation that is not linear, a norm that adds 1 to its weight, a
               router beside the experts), it is left as it is. So is one with a linear that is not to be rounded, and
               one with a parameter that the model holds outside the block as well
    factor     of each channel of that input: its root mean square to the power `strength`, of median 1; 1 where no
               token was, which says nothing of others. A norm's weight is rounded to its dtype once divided, so the
               columns get the factor that it then really has
    strength   that of STRENGTHS whose rounded weights, by the run's own quantiser, have the least error
               (W-Ŵ) G (W-Ŵ)ᵀ; 0, no scaling, is among them
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
from .mixed import Grids

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
MOST = 2.0**8  # a factor is between 1 / MOST and MOST


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

    @property
    def weights(self) -> list[Weight]:
        """The linears that scaling changes."""
        return [*self.readers, *([self.producer] if self.producer else [])]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that scaling changes."""
        return [*(w.parameter for w in self.weights), *(p for p, _, _ in self.vectors)]

    def apply(self, factors: torch.Tensor, rounds: bool = True) -> bool:
        """Multiply the columns by factors (channels,), and divide their source; whether the stored dtypes hold that.

        Where they do not, nothing changes. rounds: to the stored dtypes; otherwise all is as the block computes.
        """
        if rounds and not self.producer:  # the norm's weight is the first
            p, stored, rows = self.vectors[0]
            before = wide(p.data)[rows]
            there = (before / factors.to(before)).to(stored).to(before.dtype)
            factors = torch.where(there != 0, before / there, factors.to(before))
        vectors = [wide(p.data) for p, _, _ in self.vectors]
        vectors = [t.index_put((rows,), t[rows] / factors.to(t))
                   for t, (_, _, rows) in zip(vectors, self.vectors, strict=True)]
        weights = [(w, w.get() * factors[self.channel].to(w.get())) for w in self.readers]
        if self.producer:
            W = self.producer.get().clone()
            W[self.rows] /= factors.to(W).unsqueeze(1)
            weights.append((self.producer, W))
        if rounds and not (all(held(W, w.stored) for w, W in weights) and all(
                held(new, stored) for new, (_, stored, _) in zip(vectors, self.vectors, strict=True))):
            return False
        for w, W in weights:
            w.set(W, rounds)
        for new, (p, stored, _) in zip(vectors, self.vectors, strict=True):
            p.data.copy_(new.to(stored) if rounds else new)
        return True


def wide(t: torch.Tensor) -> torch.Tensor:
    """The values in float32, float64 if they are in that: a factor rounded to bfloat16 would be wrong by up to 2^-9."""
    return t if t.dtype == torch.float64 else t.float()


def held(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds these values to its rounding; those far below the root mean square may lose bits."""
    least = t.square().mean().sqrt()
    return bool(((t.to(dtype).to(t.dtype) - t).abs() <= torch.finfo(dtype).eps * t.abs().clamp_min(least)).all())


@torch.no_grad()
def scale(block: Block, activations: Activations, options: Options, *, method: ModuleType, cfg: Any,
          grids: Grids) -> dict[str, dict]:
    """Scale a resident block's sites in place; {"scaling": {site: its strength and what it leaves of the error}}, and
    "not_scaled", the sites where the block would not compute the same, if there are any.

    method, cfg, grids: of the rounding that follows. Raises ValueError where a linear's input cannot be collected.
    """
    held_elsewhere = {id(p) for name, p in block.module.named_parameters() if name in block.elsewhere}
    sites = [site for site in (*of_norms(block, activations), *of_producers(block))
             if all(grids.of(w.name) for w in site.weights) and held_elsewhere.isdisjoint(map(id, site.parameters))]
    names = [site.name for site in sites]
    sites = same_function(block, activations, sites)
    refused = [name for name in names if name not in {site.name for site in sites}]
    picked = [(site, distributed.first(best(site, statistics, method, cfg, grids) if statistics else None))
              for site, statistics in with_statistics(block, activations, options, sites)]
    found = {site.name: {"strength": own[0], "error": own[1]} for site, own in picked
             if own and own[0] and site.apply(own[2].to(activations.device))}
    return {"scaling": found} | ({"not_scaled": refused} if refused else {})


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
    for weight in block.weights:
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
    weights, found = {w.linear: w for w in block.weights}, []
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


def same_function(block: Block, activations: Activations, sites: Sequence[Site]) -> list[Site]:
    """The sites that can be scaled without a change of the block's outputs, bit for bit, on the first batch.

    They are tried with the largest factors, so that a limit which only other tokens reach shows (OLMo's clip_qkv).
    """
    if not sites:
        return []
    before = calibrate.forward(block.module, activations, block.number, 0)
    reach = MOST if torch.finfo(before.dtype).max > MOST ** 8 else 2.0  # float16 ends at 65504

    def same(some: Sequence[Site]) -> bool:
        kept = {p: p.data.clone() for site in some for p in site.parameters}
        for site in some:
            channels = torch.arange(int(site.channel.max()) + 1, device=site.channel.device)
            site.apply(reach ** (channels % 3 - 1).float(), rounds=False)
        after = calibrate.forward(block.module, activations, block.number, 0)
        for p, values in kept.items():
            p.data.copy_(values)
        return torch.equal(before, after)
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


def best(site: Site, statistics: Statistics, method: ModuleType, cfg: Any, grids: Grids
         ) -> tuple[float, float, torch.Tensor] | None:
    """(strength, its error as a share of the error without scaling, factors (channels,)) of the least error.

    None where the statistics are not usable, which the rounding itself says.
    """
    G, tried = statistics.G, []
    seen = G.diagonal() > 0
    sizes, of = G.diagonal()[seen].sqrt().log(), site.channel[seen]
    channels = int(site.channel.max()) + 1
    mean = sizes.new_zeros(channels).index_add(0, of, sizes) / torch.bincount(of, minlength=channels)
    above = (mean - mean.nanmedian()).nan_to_num(0.0)
    for strength in STRENGTHS if statistics.finite() else ():
        factors = (strength * above).exp().clamp(1 / MOST, MOST)
        by, error = factors[site.channel], 0.0
        inputs = statistics.divided(by) if strength else statistics
        try:
            for weight in site.readers:
                W = weight.get() * by.to(weight.get())
                W_hat = method.quantise(W, Solution(W, W != 0), inputs, grids.of(weight.name), cfg).W_hat
                lost = (W - W_hat) / by.to(W)
                error += ((lost @ G.to(W)) * lost).sum().item()
        except NumericalError:
            continue
        tried.append((error, strength, factors))
    if not tried:
        return None
    error, strength, factors = min(tried, key=lambda one: one[:2])
    return strength, error / tried[0][0] if tried[0][0] else 1.0, factors.cpu()
