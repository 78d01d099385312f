"""Steps: a plan as ordinary runs, each what `oneshot prune` would do, and what of their result is measured.

    round-3-cut     the blocks, KV groups and neurons that go (--drop, --kv-groups, --shrink)
    round-3-sparse  the blocks that become 2:4 (--pattern 2:4, --keep-dense for the others)
    round-3         the blocks that are rounded, by GPTQ (--quantise, with a grid for each block)

The last one of a round is called round-3. Healing on text belongs to the last one before rounding; the next round goes
on from there, not from rounded weights. Only the last one is measured.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from ...measure import latency
from ...models import Tokenizer, groups
from ...prune import solvers
from ...settings import RunConfig, flags, parse
from ...structured import Cut, budget
from ...structured.options import SMALLER
from .. import checks, command, forms, run
from .plans import Plan

SPARSE = "sparsegpt"  # the solver of 2:4
LATER = ("damage", "divergence", "say", "sensitivity", "robustness", "latency")  # measured of the last state alone
OURS = {*SMALLER, "pattern", "uneven", "shrink_method", "quantise", "keep_dense", "allocate", "heal", "heal_data",
        "heal_tokens", "heal_teacher", "results", "format", "quantised", "shared_inputs", "by", "tries", "order",
        "effort"}


@dataclass(frozen=True)
class State:
    """A model on disk. float: its folder before rounding. result: its folder, or the dense model's name.

    sparse: numbers of its blocks that are 2:4. grids, output: as in Plan.
    """

    float: str
    result: str
    sparse: tuple[int, ...] = ()
    grids: tuple[tuple[int, str], ...] = ()
    output: str | None = None

    @property
    def plan(self) -> Plan:
        """What the model is already."""
        return Plan(sparse=self.sparse, grids=self.grids, output=self.output)


@dataclass(frozen=True)
class Steps:
    """How plans become runs.

    words: the flags of the command that go to every run. model: the dense model. blocks: the name of its list of
    blocks. method: the solver of units. heal: the flags of healing on text, or none. folder: where the rounds are.
    head: the name of the output head, "" where it cannot be rounded.
    """

    words: tuple[str, ...]
    model: str
    blocks: str
    method: str
    heal: tuple[str, ...]
    folder: Path
    head: str = ""

    def config(self, *words: str, measured: bool = True) -> RunConfig:
        """The settings of one run. measured: whether anything is. Raises ValueError naming a flag."""
        [cfg] = parse([*self.words, "--model", self.model, "--results", str(self.folder / "records"), "--no-dense",
                       *words])
        off = {f.name: f.default for f in fields(cfg) if f.metadata and f.metadata["bears_on"] == "measuring"
               and (f.name in LATER or not measured)}
        in_blocks = cfg.quantise is not None and [grid for grid in (cfg.grids.default, *(
            grid for name, grid in cfg.grids.others if name != self.head)) if grid]
        off |= {"scale_columns": cfg.scale_columns and bool(in_blocks)}
        return replace(cfg, **off | ({} if measured else {"evaluate": "none"}))

    @property
    def dense(self) -> RunConfig:
        """The run that measures the dense model."""
        [cfg] = parse([*self.words, "--model", self.model, "--results", str(self.folder / "records"), "--method",
                       "dense"])
        return replace(cfg, scale_columns=False, **{name: type(cfg).__dataclass_fields__[name].default
                                                    for name in LATER})

    @property
    def cutting(self) -> RunConfig:
        """The settings with which candidates are cut."""
        return self.config("--method", self.method, "--pattern", "dense", "--shrink", "0.5", "--shrink-method",
                           self.method, "--heal", "none", measured=False)

    @property
    def sparsening(self) -> RunConfig:
        """The settings with which candidates become 2:4."""
        return self.config("--method", SPARSE, "--pattern", "2:4", measured=False)

    def plain(self, grid: str, head: str | None = None) -> RunConfig:
        """The run that rounds the dense model to nearest. grid: a key of forms.GRIDS. head: that of its output head."""
        cfg = self.config("--method", "dense", "--quantise", ",".join([forms.GRIDS[grid], *self.of_head(head)]),
                          "--quantiser", "rtn", "--save", str(self.folder / f"plain-{grid}"))
        return replace(cfg, scale_columns=False)

    def of(self, name: str, start: State, plan: Plan, dims: tuple[int, float]) -> list[RunConfig]:
        """The runs of one round, in order; the last saves into the folder `name`.

        dims: how many blocks are left by the plan, and the share of the blocks' parameters.
        """
        blocks, share = dims
        sparse = plan.sparse != kept_sparse(start, plan) or bool(plan.cut.dropped or plan.cut.kept)
        kinds = [("cut", bool(plan.drop or plan.heads or plan.widths)), ("sparse", sparse and bool(plan.sparse)),
                 ("rounded", bool(plan.grids or plan.output))]
        kinds = [kind for kind, wanted in kinds if wanted]
        floats = [kind for kind in kinds if kind != "rounded"]
        found, model = [], start.float
        for kind in kinds:
            last = kind == kinds[-1]
            folder = str(self.folder / (name if last else f"{name}-{kind}"))
            heal = self.heal if floats and kind == floats[-1] else ()
            words = self.words_of_cut(plan, share, heal) if kind == "cut" else \
                self.words_of_24(plan, blocks, heal) if kind == "sparse" else self.words_of_rounding(plan, blocks)
            found.append(self.config("--model", model, *words, "--save", folder, measured=last))
            model = folder
        return found

    def words_of_cut(self, plan: Plan, share: float, heal: Sequence[str]) -> list[str]:
        """Blocks, KV groups and neurons go."""
        folds = any(m.updates for m in solvers.chain(self.method))
        words = ["--method", self.method, "--shrink-method", self.method, "--pattern", "dense", *(
            ["--drop", ",".join(map(str, sorted(plan.drop)))] if plan.drop else [])]
        for kind, left in plan.heads:
            words += ["--query-heads" if kind == groups.QUERIES else "--kv-groups", str(left)]
        words += ["--shrink", repr(share), "--tries", "1"] if plan.widths else []
        ways = ["fold"] * folds + ["full"] * bool(heal)
        return [*words, "--heal", ",".join(ways) or "none", *heal]

    def words_of_24(self, plan: Plan, blocks: int, heal: Sequence[str]) -> list[str]:
        """Blocks become 2:4; those that are stay so."""
        return ["--method", SPARSE, *self.pattern(plan, blocks), *(["--heal", "full", *heal] if heal else [])]

    def words_of_rounding(self, plan: Plan, blocks: int) -> list[str]:
        """Blocks are rounded, each to its grid."""
        own = dict(plan.grids)
        kinds = [own.get(b) for b in range(blocks)]
        most = max(dict.fromkeys(kinds), key=kinds.count)
        others = [f"{self.blocks}.{b}.*={text_of(key)}" for b, key in enumerate(kinds) if key != most]
        return ["--method", "keep", *self.pattern(plan, blocks), "--quantise",
                ",".join([text_of(most), *others, *self.of_head(plan.output)])]

    def of_head(self, key: str | None) -> list[str]:
        """The entry of `--quantise` for the output head in a form; none for None."""
        return [f"{self.head}={forms.GRIDS[key]}"] if key else []

    def pattern(self, plan: Plan, blocks: int) -> list[str]:
        """The flags that say which blocks are 2:4."""
        if not plan.sparse:
            return ["--pattern", "dense"]
        dense = [f"{self.blocks}.{b}.*" for b in range(blocks) if b not in plan.sparse]
        return ["--pattern", "2:4", *(["--keep-dense", ",".join(dense)] if dense else [])]

    def healed(self, name: str, state: State, plan: Plan, blocks: int, heal: Sequence[str]) -> list[RunConfig]:
        """The runs of the long heal at the end: train, and round again."""
        words = ["--method", "keep", *self.pattern(plan, blocks), "--heal", "full", *heal]
        last = not (plan.grids or plan.output)
        first = str(self.folder / (name if last else f"{name}-heal"))
        found = [self.config("--model", state.float, *words, "--save", first, measured=last)]
        if not last:
            found.append(self.config("--model", first, *self.words_of_rounding(plan, blocks), "--save",
                                     str(self.folder / name)))
        return found

    def after(self, start: State, plan: Plan, configs: Sequence[RunConfig]) -> State:
        """The State that the runs leave."""
        floats = [cfg.save for cfg in configs if cfg.quantise is None]
        before = floats[-1] if floats else start.float
        return State(before, configs[-1].save if configs else start.result, plan.sparse, plan.grids, plan.output)


def text_of(key: str | None) -> str:
    """A block's grid as `--quantise` has it. key: of forms.GRIDS, or None."""
    return forms.GRIDS[key] if key else "none"


def kept_sparse(start: State, plan: Plan) -> tuple[int, ...]:
    """The numbers of the blocks that are 2:4 already, of the model without those that go."""
    before = max(start.sparse, default=-1) + 1 + max(plan.drop, default=0) + 1
    left = [b for b in range(before) if b not in plan.drop]
    return tuple(place for place, b in enumerate(left) if b in start.sparse)


def dims(sizes: budget.Sizes, plan: Plan) -> tuple[int, float]:
    """(how many blocks a plan leaves, the share of the parameters)."""
    return len(sizes.blocks) - len(plan.drop), sizes.left(plan.cut) / sizes.left(Cut())


def done(configs: Sequence[RunConfig]) -> dict:
    """Do the runs; the record of the last. Raises ValueError naming a flag."""
    for cfg in configs:
        checks.check([cfg])
        record = run.run(cfg)
    return record


def refuse(words: Sequence[str]) -> None:
    """Raise ValueError naming a flag that rounds set themselves."""
    for name in flags.read([*words, "--method", "dense"]):
        if name in OURS:
            raise ValueError(f"--{name.replace('_', '-')}: `oneshot fit` decides that itself (--allow says what it "
                             "may do); leave it out")


def shares(record: dict, dense: dict) -> dict[str, float]:
    """{"parameters", "bytes": what is left of the dense model's}, by the records of two runs."""
    return {"parameters": record["model"]["in_blocks"] / dense["model"]["in_blocks"],
            "bytes": record["bytes"]["stored"] / dense["bytes"]["dense"]}


@torch.no_grad()
def time_share(cfg: RunConfig, folder: str) -> float:
    """The time of decoding a token with the forms' kernels, as a share of the dense model's; both take turns.

    What is timed: one token behind a prompt of 64, batch 1, the median of latency.STEPS of them, each model as fast as
    it decodes here (`forms.decoding`): on a CPU by one compiled call, the dense one too, as in `oneshot generate
    --compare`. cfg: the dense model's run. Both compute in its --dtype, by default the one that is stored.
    """
    named = {"model": loaded(cfg, folder), "dense": load(cfg, cfg.model)[0].to(cfg.device)}
    named = {name: forms.decoding(model, cfg.device)[0] for name, model in named.items()}
    times: dict[str, list[float]] = {name: [] for name in named}
    graph = latency.graphs(named.values(), cfg.device)
    for number in range(latency.ROUNDS + 1):
        for name, model in named.items():
            seconds = latency.one(model, "decode1", cfg.device, graph)
            times[name] += [seconds] if number else []  # the first is to warm up
    return statistics.median(a / b for a, b in zip(times["model"], times["dense"], strict=True))


def load(cfg: RunConfig, name: str) -> tuple[nn.Module, Tokenizer]:
    """(model, tokenizer), the model in the --dtype of the command."""
    own = name == cfg.model
    return command.load(replace(cfg, model=name, model_revision=cfg.model_revision if own else None))


def loaded(cfg: RunConfig, folder: str) -> nn.Module:
    """The model of a round with the kernels that run on the device."""
    return forms.load(folder, cfg.dtype, cfg.device, trust_remote_code=cfg.trust_remote_code)
