"""A pruning job: what to do to a model, and the rows of the record that say what was done."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn

from .. import models
from ..calibrate import Activations, Gradient
from ..models import Block
from . import solvers
from .options import Options
from .patterns import Dense, Pattern

Chain = Sequence[tuple[ModuleType, Any]]  # [(solver or refiner, its Config), ...]
SCALES = "scales of "  # what a linear's scales are called among the tensors of a saved block


class Healer(Protocol):
    """What the block loop needs of a healing method; see heal/__init__.py."""

    def before_block(self, block: Block, dense: Activations) -> None:
        """Called while the block is still dense."""

    def after_block(self, block: Block, activations: Activations, targets: list[torch.Tensor]) -> dict | None:
        """Called when the block has been pruned."""


@dataclass(frozen=True)
class Job:
    """What to do to a model; the same for all of its blocks.

    plan: {full linear name: Pattern}. chain: the solver, then its refiners, each with its Config. options: how to
    compute. healers: the healing methods, in this order; with any, the dense model's activations are kept next to the
    pruned model's. held_out: numbers of the windows that no healer trains on (solvers use all windows). dropped:
    numbers of the blocks that go as a whole; the dense model's activations pass through them together with the block
    before, which so aims at the dense hidden state after them. staged: as `true_sequential`. gradients: {full linear
    name: Gradient} for solvers that need it. solve: what computes one linear's new weight, with the parameters and the
    result of `linear.solve`, which it is if None. prepare: called with each block, its activations and the options
    before any of its linears is solved; needs activations, and returns what the block's row says of it.
    """

    plan: dict[str, Pattern]
    chain: Chain
    options: Options = field(default_factory=Options)
    healers: tuple[Healer, ...] = ()
    held_out: tuple[int, ...] = ()
    dropped: frozenset[int] = frozenset()
    staged: bool = False
    gradients: Mapping[str, Gradient] = field(default_factory=dict)
    solve: Callable[..., Any] | None = None
    prepare: Callable[[Block, Activations, Options], dict] | None = None

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """The names of the calibration statistics to collect."""
        needs = frozenset().union(*(module.needs for module, _ in self.chain))
        needs |= {"sample"} if self.options.layer_errors else frozenset()
        needs |= {"outer"} if self.prepare else frozenset()
        return needs | ({"outer", "cross"} if self.options.dense_target else frozenset())

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's activations are kept next to the pruned model's."""
        return bool(self.healers or self.options.dense_target or self.weighs or self.staged)

    @property
    def weighs(self) -> bool:
        """Whether tokens count by 1 / the squared norm of the dense block's output."""
        return any(getattr(cfg, "weigh", False) for _, cfg in self.chain)

    @property
    def looks_ahead(self) -> bool:
        """Whether the dense block's outputs are needed before the block is solved."""
        return bool(self.weighs or self.dropped)

    @property
    def label(self) -> str:
        """The chain as it is written for `--method`: "wanda+refit"."""
        return "+".join(solvers.short(module) for module, _ in self.chain)


@dataclass
class Rows:
    """One block's rows of the record: one per linear, one for the block, and a warning for every fallback taken.

    scales: {full linear name: (R, groups) float16} of linears that were rounded to a grid.
    """

    layers: list[dict] = field(default_factory=list)
    block: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, other: "Rows") -> None:
        """Append the rows of further linears of the block."""
        self.layers += other.layers
        self.warnings += other.warnings
        self.scales |= other.scales

    def saved(self, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict]:
        """(the block's `state` with the scales, the rows as plain values) to be saved."""
        plain = {"layers": self.layers, "block": self.block, "warnings": self.warnings}
        return state | {SCALES + name: s for name, s in self.scales.items()}, plain

    @classmethod
    def of(cls, state: dict[str, torch.Tensor], plain: dict) -> tuple[dict[str, torch.Tensor], "Rows"]:
        """The inverse: (the block's state, its Rows)."""
        scales = {name.removeprefix(SCALES): s for name, s in state.items() if name.startswith(SCALES)}
        return {name: t for name, t in state.items() if not name.startswith(SCALES)}, cls(**plain, scales=scales)


@dataclass
class Result:
    """Rows of the record: one per linear, one per block, what was skipped, a warning for every fallback taken.

    heal: {method: what it reports} of healing the whole model. dense: the dense model's activations after its last
    block, where there are healers or it is staged. seconds: this job's share of the time if many jobs were solved at
    once. scales: as in Rows. head: what was done to the output head, {} for nothing (quantise/head.py).
    """

    layers: list[dict] = field(default_factory=list)
    blocks: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    heal: dict = field(default_factory=dict)
    dense: Activations | None = None
    pruned: Activations | None = None
    seconds: float = 0.0
    shrunk: dict | None = None
    head: dict = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, rows: Rows) -> None:
        """Append a block's rows."""
        self.layers += rows.layers
        self.scales |= rows.scales
        self.blocks.append(rows.block)
        self.warnings += rows.warnings


def skipped_rows(model: nn.Module) -> list[dict]:
    """The record's `skipped`: every matrix that is never pruned, with the reason and its number of weights."""
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    return [{"name": name, "reason": why, "weights": sizes.get(name, 0)} for name, why in models.skipped(model)]


def make_plan(model: nn.Module, pattern: Pattern, chain: Chain, elsewhere: Pattern | None = None,
              kept: Collection[str] = ()) -> dict[str, Pattern]:
    """{full linear name: Pattern} with `pattern` for every linear; its comparison group defaults to the solver's.

    elsewhere: the pattern for linears whose shape does not allow `pattern`. kept: names of linears that stay dense.

    Raises ValueError naming `--pattern` and the first linear whose shape does not allow it, if there is no `elsewhere`;
    and naming `--model` if it has no prunable linear.
    """
    plan = {}
    pattern = pattern.with_default_group(chain[0][1].group)
    for weight in models.all_weights(model):
        try:
            pattern.check(*weight.shape)
            plan[weight.name] = Dense() if weight.name in kept else pattern
        except ValueError as error:
            if elsewhere is None and weight.name not in kept:
                R, C = weight.shape
                raise ValueError(f"--pattern {pattern}: {error} ({weight.name}, {R}x{C})") from None
            plan[weight.name] = Dense() if weight.name in kept else elsewhere
    if not plan:
        raise ValueError("--model: no block of this model holds a linear that can be pruned")
    return plan
